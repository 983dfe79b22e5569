"""Gram matrices X^T X of the inputs of a model's dense layers, for RegMean."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from multitask_jax import tree
from multitask_jax.merging.fitted import capture
from multitask_jax.merging.fitted.batching import batch_size, check_list
from multitask_jax.merging.task_statistics import Gram

Measure = Callable[[jax.Array], jax.Array]
Total = Callable[[jax.Array], jax.Array]  # [k, ..., m, n], of k uses -> [..., m, n]
RowsFn = Callable[[Any], jax.Array]  # inputs -> weight of each row of X


class Dense(NamedTuple):
    """What `dense_leaves` found out about a model's parameters."""

    axes: dict[str, tuple[int, ...]]  # contracted axes of each weight with a Gram
    averaged: dict[str, str]  # the other leaves: why
    order: tuple[str, ...]  # all used leaves, as the model first comes to them


def squares(x: jax.Array) -> jax.Array:
    """X^T X of inputs X: [..., rows, n] -> [..., n, n]."""
    return jnp.einsum(
        "...ri,...rj->...ij",
        x,
        x,
        precision="highest",
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )


def _added(measured: jax.Array) -> jax.Array:
    return measured.sum(axis=0)


class _Record:
    """Grams of the products seen so far, and what else leaves are used for."""

    def __init__(
        self,
        params: dict[str, Any],
        measure: Measure = squares,
        wanted: Mapping[str, jax.Array] | None = None,
        total: Total = _added,
    ):
        self.params = params
        self.measure = measure
        self.total = total
        self.wanted = wanted  # bool [] by path; all without it
        self.grams: dict[str, Gram] = {}
        self.reasons: dict[str, str] = {}
        self.order: dict[str, None] = {}
        self.hooks = capture.Hooks(
            lambda view: self.params[view.path], self.product, self.other, self.scan
        )

    def product(self, product: capture.Product) -> None:
        path = product.view.path
        self.order.setdefault(path)
        found = capture.layout(product)
        if found is None:
            self.reasons.setdefault(path, "a product contracts parts of its axes")
            return
        x = capture.inputs_of(product)
        if self.wanted is None:
            matrix = self.measure(x)
        else:
            like = jax.eval_shape(self.measure, x)
            matrix = jax.lax.cond(
                self.wanted[path],
                self.measure,
                lambda _: jnp.zeros(like.shape, like.dtype),
                x,
            )
        self.add(path, Gram(matrix, *found))

    def add(self, path: str, new: Gram) -> None:
        old = self.grams.get(path)
        if old is None:
            self.grams[path] = new
        elif (old.axes, old.batch) == (new.axes, new.batch):
            both = self.total(jnp.stack([old.matrix, new.matrix]))
            self.grams[path] = Gram(both, new.axes, new.batch)
        else:
            self.reasons.setdefault(path, "products contract different axes of it")

    def other(self, view: capture.View, use: str) -> None:
        self.order.setdefault(view.path)
        self.reasons.setdefault(view.path, f"used by {use}")

    def scan(self, eqn: Any, ins: Sequence[Any]) -> Sequence[Any]:
        """A scan over stacked layers, or with weights that all steps share."""
        p = eqn.params
        consts, carry = p["num_consts"], p["num_carry"]
        ins = list(ins)
        for k in range(consts, consts + carry):
            ins[k] = capture.value(ins[k], "the carry of a scan", self.hooks)
        values: list[Any] = []
        views: list[capture.View | None] = []
        for k, x in enumerate(ins):
            view = x if isinstance(x, capture.View) else None
            stacked = k >= consts + carry
            if view is not None and stacked:
                (*first,) = view.atoms[0]
                if len(first) != 1 or first[0].size != view.shape[first[0].axis]:
                    capture.value(view, "a scan over parts of an axis", self.hooks)
                    view = None
                else:
                    view = view._replace(
                        atoms=view.atoms[1:], stack=(*view.stack, first[0].axis)
                    )
            views.append(view)
            values.append(
                x.replay(self.params[x.path]) if isinstance(x, capture.View) else x
            )

        def body(carried: Any, xs: Any) -> Any:
            inner = _Record(self.params, self.measure, self.wanted, self.total)
            now = [*values[:consts], *carried, *xs]
            args = [
                x if v is None else v._replace(replay=lambda _, x=x: x)
                for v, x in zip(views, now, strict=True)
            ]
            outs = capture.run(p["jaxpr"], args, inner.hooks)
            outs = [capture.value(x, "the output of a scan", inner.hooks) for x in outs]
            self.order |= inner.order
            for path, reason in inner.reasons.items():
                self.reasons.setdefault(path, reason)
            return outs[:carry], (outs[carry:], inner.grams)

        last, (ys, grams) = jax.lax.scan(
            body,
            values[consts : consts + carry],
            values[consts + carry :],
            length=p["length"],
            reverse=p["reverse"],
        )
        paths = {v.path for v in views[consts + carry :] if v is not None}
        for path, g in grams.items():
            if path not in paths:  # a shared weight: the total over steps
                g = Gram(self.total(g.matrix), g.axes, g.batch)
            self.add(path, g)
        return [*last, *ys]


def captured(
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    measure: Measure = squares,
    wanted: Mapping[str, jax.Array] | None = None,
    total: Total = _added,
) -> tuple[dict[str, Gram], _Record]:
    """What `measure` makes of the inputs of each dense layer, in all of its uses.

    Args:
      apply_fn, params, inputs: as for `gram_matrices`.
      measure: [..., rows, n] -> [..., m, n], of one use.
      wanted: bool [] by leaf path: others are 0 and not computed. All by default.
      total: of several uses; their sum by default.

    Returns:
      By leaf path, as the matrix of a Gram, and what else was found out.
    """
    leaves = tree.flatten(params)
    arrays = {p: jnp.asarray(x) for p, x in leaves.items()}
    record = _Record(arrays, measure, wanted, total)
    capture.evaluate(
        lambda by_path, inputs: apply_fn(tree.unflatten(params, by_path), inputs),
        record.params,
        (inputs,),
        record.hooks,
    )
    grams = {p: g for p, g in record.grams.items() if p not in record.reasons}
    return grams, record


def dense_leaves(apply_fn: Callable[..., Any], params: Any, inputs: Any) -> Dense:
    """Which leaves get a Gram matrix, which are averaged and why; computes nothing.

    Args:
      apply_fn, params, inputs: as for `gram_matrices`; shapes are enough.
    """
    found = {}

    def look(params: Any, inputs: Any) -> None:
        grams, record = captured(apply_fn, params, inputs)
        averaged = {
            p: record.reasons.get(p, "not used")
            for p in record.params
            if p not in grams
        }
        axes = {p: g.axes for p, g in grams.items()}
        found["all"] = Dense(axes, averaged, tuple(record.order))

    jax.eval_shape(look, params, inputs)
    return found["all"]


def gram_matrices(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rows: RowsFn | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Gram]:
    """Sums of X^T X over batches, for each dense layer that apply_fn turns out to have.

    A weight may reach its product through transposes, reshapes and casts, inside jit,
    remat, custom derivatives and scans (a stack of layers gets one matrix each).
    Weights that are used in another way as well (a tied embedding), by parts, or in
    convolutions get none and are averaged by RegMean: `dense_leaves` lists them.

        grams = [gram_matrices(apply_fn, p, b) for p, b in zip(models, data)]
        merged = merging.merge(merging.regmean(), base, models, statistics=grams)

    Args:
      apply_fn: (params, inputs) -> anything.
      params: any pytree of arrays.
      batches: inputs with a leading axis of examples. A smaller last batch is compiled
        on its own. Give all models as many examples, or weigh them in the merge.
      rows: inputs -> the weight of each row of X, such as a mask's [B L] where 0 is
        padding, a function of a module (programs are kept by it). Grams are then means
        over rows, not sums: however many tokens a model's examples have.
      only: leaf paths; others are not computed, and left out.

    Returns:
      {leaf path: Gram}, summed in float32.

    Raises:
      ValueError: no batches, or one that is not in a list; no dense layer in apply_fn;
        weights of another number of rows than a dense layer has.
    """
    check_list(batches)
    total: tuple[dict[str, Gram], jax.Array] | None = None
    wanted = None if only is None else {p: p in only for p in tree.flatten(params)}
    for batch in batches:
        batch_size(batch)
        if total is None:
            shapes = _grams.eval_shape(apply_fn, rows, params, batch, wanted)
            total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total = _add_grams(apply_fn, rows, total, params, batch, wanted)
    if total is None:
        raise ValueError("got no batches, expected at least one")
    grams, weight = total
    if rows is not None:
        grams = jax.tree.map(lambda x: x / weight, grams)
    return {p: g for p, g in grams.items() if only is None or p in only}


# Jitted, and so one trace and one compilation serve all models of a function.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _grams(
    apply_fn: Callable[..., Any],
    rows: RowsFn | None,
    params: Any,
    inputs: Any,
    wanted: Mapping[str, jax.Array] | None,
) -> tuple[dict[str, Gram], jax.Array]:
    """Sums over rows, and the sum of their weights."""
    measure, weight = squares, jnp.float32(0)
    if rows is not None:
        weights = rows(inputs).astype(jnp.float32)
        measure, weight = functools.partial(_weighted, weights), jnp.sum(weights)
    grams, record = captured(apply_fn, params, inputs, measure, wanted)
    if not grams:
        raise no_product(record.reasons)
    return grams, weight


def no_product(reasons: Mapping[str, str]) -> ValueError:
    """Of a function without dense layers; the reasons are by leaf."""
    return ValueError(
        "apply_fn multiplies its inputs with no parameter (or only by parts);"
        f" how leaves are used: {dict(reasons)}"
    )


def _weighted(weights: jax.Array, x: jax.Array) -> jax.Array:
    """sum_r w_r x_r x_r^T."""
    check_weights(weights, x)
    return squares(x * jnp.sqrt(weights)[:, None].astype(x.dtype))


def check_weights(weights: jax.Array, x: jax.Array) -> None:
    """Refuses weights of other rows than X [..., rows, n] has."""
    if x.shape[-2:-1] != weights.shape:
        raise ValueError(
            f"rows: got weights {list(weights.shape)} for a dense layer's inputs"
            f" {list(x.shape)}; expected one for each of its rows"
        )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add_grams(
    apply_fn: Callable[..., Any],
    rows: RowsFn | None,
    total: tuple[dict[str, Gram], jax.Array],
    params: Any,
    inputs: Any,
    wanted: Mapping[str, jax.Array] | None,
) -> tuple[dict[str, Gram], jax.Array]:
    found = _grams(apply_fn, rows, params, inputs, wanted)
    return jax.tree.map(jnp.add, total, found)
