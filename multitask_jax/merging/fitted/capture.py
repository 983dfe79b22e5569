"""What flows into a model's dense layers, found in the jaxpr of its function.

A dense layer is a `dot_general` one of whose operands is a parameter, perhaps through
transposes, reshapes and casts (a *view* of it). The interpreter here evaluates a jaxpr
and tells of each such product, so no model class needs to be known, and which axes of
the weight are contracted is read off, never guessed. (A function with a custom
derivative that takes a parameter gets the derivative of its body.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

Array = jax.Array

# Calls that are looked into where a parameter goes in.
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_vmap_call",
)
_INNER = ("jaxpr", "call_jaxpr", "call")  # what they call theirs
_UNCHANGED = (
    "convert_element_type",
    "copy",
    "copy_p",
    "reduce_precision",
    "sharding_constraint",
    "stop_gradient",
)


class Atom(NamedTuple):
    """A factor of a leaf's axis: its entries are `stride` apart along that axis."""

    axis: int  # -1: made by broadcasting
    stride: int
    size: int


Atoms = tuple[Atom, ...]


class View(NamedTuple):
    """A parameter as an operation sees it."""

    path: str
    shape: tuple[int, ...]  # of the leaf
    atoms: tuple[Atoms, ...]  # for each axis of the view, what of the leaf it is
    replay: Callable[[Any], Any]  # leaf -> view
    stack: tuple[int, ...] = ()  # axes of the leaf that enclosing scans go along


class Product(NamedTuple):
    """A dot_general of activations with a view of a parameter."""

    view: View
    x: Array  # the activations
    # The view's contracting and batch axes, and x's.
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    x_axes: tuple[tuple[int, ...], tuple[int, ...]]


class Layout(NamedTuple):
    """How a product's inputs meet the leaf: see `Gram`."""

    axes: tuple[int, ...]
    batch: tuple[int, ...]


def leaf_view(path: str, leaf: Any) -> View:
    """The leaf itself."""
    shape = tuple(jnp.shape(leaf))
    atoms = tuple((Atom(i, 1, n),) if n != 1 else () for i, n in enumerate(shape))
    return View(path, shape, atoms, lambda x: x)


def layout(product: Product) -> Layout | None:
    """The leaf's axes that are contracted and batched; None if only parts of them."""
    view, (contracting, batch) = product.view, product.axes
    inner = [a for d in contracting for a in view.atoms[d]]
    stack = [view.atoms[d] for d in batch]
    if not _whole(inner, view.shape) or not all(
        len({a.axis for a in atoms}) == 1 and _whole(atoms, view.shape)
        for atoms in stack
    ):
        return None
    axes = tuple(sorted({a.axis for a in inner}))
    return Layout(axes, (*view.stack, *(atoms[0].axis for atoms in stack)))


def _whole(atoms: Sequence[Atom], shape: tuple[int, ...]) -> bool:
    """Whether the atoms make up whole axes of the leaf."""
    sizes: dict[int, int] = {}
    for a in atoms:
        sizes[a.axis] = sizes.get(a.axis, 1) * a.size
    return -1 not in sizes and all(shape[i] == n for i, n in sizes.items())


def inputs_of(product: Product) -> Array:
    """x as [*batch, rows, n], n in the order of the leaf's contracted axes."""
    contracting, batch = product.x_axes
    x = product.x
    free = [i for i in range(x.ndim) if i not in (*contracting, *batch)]
    sizes = [x.shape[i] for i in batch]
    rows = math.prod(x.shape[i] for i in free)
    atoms = [a for d in product.axes[0] for a in product.view.atoms[d]]
    x = x.transpose(*batch, *free, *contracting)
    x = x.reshape(*sizes, rows, *(a.size for a in atoms))
    before = len(sizes) + 1
    order = sorted(range(len(atoms)), key=lambda k: (atoms[k].axis, -atoms[k].stride))
    x = x.transpose(*range(before), *(before + k for k in order))
    return x.reshape(*sizes, rows, math.prod(a.size for a in atoms))


class Hooks(NamedTuple):
    """What happens at parameters."""

    resolve: Callable[[View], Any]  # the leaf's value
    product: Callable[[Product], None]  # before a product with activations
    other: Callable[[View, str], None]  # before any other use, by primitive's name
    # Instead of evaluating a scan over or with parameters; None: it is another use.
    scan: Callable[[Any, Sequence[Any]], Sequence[Any]] | None = None


def evaluate(
    apply_fn: Callable[..., Any], params: Mapping[str, Any], args: Any, hooks: Hooks
) -> Any:
    """apply_fn(params, *args), with hooks at every use of a parameter.

    Args:
      apply_fn: takes params as a dict by path.
      params: leaves by path (only their shapes count: values are the hooks').
      args: the other arguments.
      hooks: called while tracing, in the order of execution.
    """
    closed, out = jax.make_jaxpr(apply_fn, return_shape=True)(params, *args)
    views = [leaf_view(p, params[p]) for p in sorted(params)]  # as a dict flattens
    outs = run(closed, [*views, *jax.tree.leaves(args)], hooks)
    values = [value(x, "the output", hooks) for x in outs]
    return jax.tree.unflatten(jax.tree.structure(out), values)


def value(x: Any, use: str, hooks: Hooks) -> Any:
    """An array, or a view's value."""
    if not isinstance(x, View):
        return x
    hooks.other(x, use)
    return x.replay(hooks.resolve(x))


def run(closed: Any, args: Sequence[Any], hooks: Hooks) -> list[Any]:
    """Evaluates a closed jaxpr; arguments and results are arrays or views."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    for eqn in jaxpr.eqns:
        outs = _step(eqn, [read(v) for v in eqn.invars], hooks)
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(eqn: Any, ins: list[Any], hooks: Hooks) -> Sequence[Any]:
    name = eqn.primitive.name
    views = [x for x in ins if isinstance(x, View)]
    if views and name in _CALLS:
        inner = next(eqn.params[k] for k in _INNER if k in eqn.params)
        if isinstance(inner, jex.Jaxpr):
            inner = jex.ClosedJaxpr(inner, ())
        return run(inner, ins, hooks)
    if views and name == "scan" and hooks.scan is not None:
        return hooks.scan(eqn, ins)
    if len(views) == 1 and name == "dot_general":
        return [_dot(eqn, ins, hooks)]
    if len(views) == 1:
        seen = _view(eqn, views[0])
        if seen is not None:
            return [seen]
    return bind(eqn, [value(x, name, hooks) for x in ins])


def bind(eqn: Any, ins: Sequence[Any]) -> Sequence[Any]:
    """Evaluates one equation on arrays."""
    found = eqn.primitive.get_bind_params(eqn.params)
    # Up to jax 0.9 functions come apart from the parameters.
    functions, params = found if isinstance(found, tuple) else ((), found)
    out = eqn.primitive.bind(*functions, *ins, **params)
    return out if eqn.primitive.multiple_results else [out]


def _dot(eqn: Any, ins: list[Any], hooks: Hooks) -> Any:
    (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
    axes = [(tuple(lhs_c), tuple(lhs_b)), (tuple(rhs_c), tuple(rhs_b))]
    k = 0 if isinstance(ins[0], View) else 1
    view, x = ins[k], ins[1 - k]
    hooks.product(Product(view, x, axes[k], axes[1 - k]))
    ins[k] = view.replay(hooks.resolve(view))
    return bind(eqn, ins)[0]


def _view(eqn: Any, view: View) -> View | None:
    """The view after an operation that only moves entries; None for all others."""
    name, p, old = eqn.primitive.name, eqn.params, view.atoms
    if name in _UNCHANGED:
        atoms: tuple[Atoms, ...] | None = old
    elif name == "transpose":
        atoms = tuple(old[i] for i in p["permutation"])
    elif name == "squeeze":
        atoms = tuple(a for i, a in enumerate(old) if i not in p["dimensions"])
    elif name == "reshape" and p.get("dimensions") is None:
        atoms = _regroup([a for axis in old for a in axis], p["new_sizes"])
    elif name == "broadcast_in_dim":
        source = dict(zip(p["broadcast_dimensions"], old, strict=True))
        atoms = tuple(
            source.get(i) or ((Atom(-1, 1, n),) if n != 1 else ())
            for i, n in enumerate(p["shape"])
        )
    else:
        return None
    if atoms is None:
        return None
    before = view.replay
    return view._replace(atoms=atoms, replay=lambda x: bind(eqn, [before(x)])[0])


def _regroup(atoms: Sequence[Atom], sizes: Sequence[int]) -> tuple[Atoms, ...] | None:
    """Deals atoms out to axes of these sizes, splitting an atom where needed.

    Before/after: one axis of 12 (stride 1), sizes (3, 4) -> stride 4 size 3, stride 1
    size 4. None where sizes have no common factor.
    """
    left = list(reversed(atoms))
    out = []
    for n in sizes:
        group: list[Atom] = []
        while n > 1:
            a = left.pop()
            if n % a.size == 0:
                group.append(a)
                n //= a.size
                continue
            if a.size % n:
                return None
            inner = a.size // n
            group.append(Atom(a.axis, a.stride * inner, n))
            left.append(Atom(a.axis, a.stride, inner))
            n = 1
        out.append(tuple(group))
    return tuple(out)
