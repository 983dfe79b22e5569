"""The core: a merge is a chain of task-vector transformations, as in optax.

A transform turns one value per model (task vectors, or parameters) into others; the
last one of a chain leaves a single value. It sees one tensor, or one chunk of it, at a
time. What it must know of the whole tensor or model it states as a `Measure`, an
associative reduction that each driver computes in its own way: in one traversal in
memory (`merge`), as one more pass over the disk (`merge_checkpoints`), as a psum on a
mesh.

Legend: T models; values are tuples of T arrays, all of the tensor's (or chunk's) shape.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax import tree
from multitask_jax.merging import statistics, task_statistics

Array = jax.Array
Values = tuple[Array, ...]
Scope = Literal["model", "tensor"]
Space = Literal["task_vectors", "parameters"]


class Leaf(NamedTuple):
    """What a transform sees besides the values, of one tensor or a chunk of it."""

    base: Array  # theta_0, in the dtype of the computation
    weights: Values  # T scalars
    setting: Any = ()  # this transform's own scalars for this tensor
    offset: tuple[Any, Any] = (0, 0)  # flat index of the first entry: high, low 32 bits
    size: Any = 0  # entries of the whole tensor, as a float
    # T Fisher arrays of the values' shape, or T Grams; () for a tensor without.
    statistics: tuple[Any, ...] = ()
    # Places of |value| in its row by size, T arrays, where a driver sorts rows itself.
    ranks: Values = ()


class Measure(NamedTuple):
    """A statistic over a tensor or the whole model, before `apply` can run.

    `values(values, leaf, earlier)` returns a tuple of arrays of the tensor's shape
    (`earlier`: this transform's statistics so far). They are reduced by `kind`:
      sum: float32 totals; where all inputs are 0 the terms must be 0.
      count: exact numbers of True, each as (high, low): high * 2**16 + low.
      kth: the rank[t](d)-th largest magnitude of array t, of d entries in scope. Or
        `rank(d, T, earlier)` lists the ranks, all T arrays' first, then second ones
        and so on; a rank may be traced, as (high, low).
    """

    kind: Literal["sum", "count", "kth"]
    scope: Scope
    values: Callable[[Values, Leaf, tuple[Any, ...]], Values]
    rank: tuple[Callable[[int], int], ...] | Callable[..., Sequence[Any]] | None = None
    # What to tell the user of a whole-model statistic: (it, T) -> a sentence.
    says: Callable[[tuple[Any, ...], int], str] | None = None


class Transform(NamedTuple):
    """A task-vector transformation: pure functions and what they need to know."""

    apply: Callable[[Values, Leaf, tuple[Any, ...]], Values]
    measures: tuple[Measure, ...] = ()
    # Host-side: all leaf paths -> one pytree of scalars a path (depths, hash seeds).
    settings: Callable[[Sequence[str]], Mapping[str, Any]] | None = None
    needs: Literal["element", "row", "tensor"] = "element"
    # Zeroes entries of single models for what they are, not at random: what the report
    # counts.
    trims: bool = False
    ranks: bool = False  # whether it sorts rows: the values' places go into Leaf.ranks
    scales: bool = False  # only multiplies, by a factor that no value has a part in
    # What it needs of each model's data. Tensors without are streamed in chunks even if
    # it needs whole ones.
    statistics: task_statistics.Kind | None = None


class Method(NamedTuple):
    """A chain: what it starts from, its transforms, and what it leaves."""

    transforms: tuple[Transform, ...]
    start: Space = "task_vectors"
    end: Space = "task_vectors"
    models: int | None = None  # the exact number of models, if it matters
    weighted: bool = True  # whether weights count
    # What a merge from disk writes beside its result: (directory in the making, plan,
    # readers of base and models, the models' names) -> notes.
    aside: Callable[..., list[str]] | None = None


# theta - theta_0: from merged parameters back to a task vector.
SUBTRACT_BASE = Transform(
    lambda values, leaf, stats: tuple(v - leaf.base for v in values)
)


def chain(*transforms: Transform | Method) -> Method:
    """Composes transforms, after a whole method perhaps, into a method.

    Transforms are about task vectors: after a method that ends with parameters (linear,
    slerp) the base is subtracted first.

    Raises:
      ValueError: a whole method comes after something else.
    """
    method = Method(())
    for i, t in enumerate(transforms):
        if isinstance(t, Transform):
            steps = method.transforms
            if method.end == "parameters":
                steps += (SUBTRACT_BASE,)
            method = method._replace(transforms=(*steps, t), end="task_vectors")
        elif i == 0:
            method = t
        else:
            raise ValueError(
                f"chain: a whole method can only come first; got one at place {i}. Pass"
                " its transforms instead"
            )
    return method


def split_scales(method: Method) -> tuple[Method, tuple[Transform, ...]]:
    """A method without its last transforms that only scale (lambda), and these.

    Before/after: trim, mean, scale, scale_by_depth -> (trim, mean), (scale, ..).
    """
    stop = len(method.transforms)
    while stop and method.transforms[stop - 1].scales:
        stop -= 1
    head = method._replace(transforms=method.transforms[:stop])
    return head, method.transforms[stop:]


def check_models(
    method: Method, count: int, weights: Sequence[Any] | None
) -> tuple[Any, ...]:
    """The weights, one a model (1 by default); errors say got and expected."""
    if count == 0:
        raise ValueError("no models to merge: pass at least one fine-tuned model")
    if method.models is not None and count != method.models:
        raise ValueError(
            f"this method merges exactly {method.models} models, got {count}"
        )
    if weights is None:
        return (1.0,) * count
    if not method.weighted:
        raise ValueError("got weights, but this method takes none: leave them out")
    if len(weights) != count:
        raise ValueError(f"got {len(weights)} weights for {count} models")
    return tuple(weights[i] for i in range(count))


def statistics_kind(method: Method) -> task_statistics.Kind | None:
    """The kind of statistics that a method's transforms need of each model, if any."""
    kinds = sorted({t.statistics for t in method.transforms if t.statistics})
    if len(kinds) > 1:
        raise ValueError(
            f"the chain needs statistics of kinds {kinds}; a merge takes one"
        )
    return kinds[0] if kinds else None


def settings_of(method: Method, paths: Sequence[str]) -> list[Mapping[str, Any]]:
    """Per transform: the scalars of each leaf path."""
    nothing = dict.fromkeys(paths, ())
    return [t.settings(paths) if t.settings else nothing for t in method.transforms]


def settings_by_path(
    method: Method, paths: Sequence[str]
) -> dict[str, tuple[Any, ...]]:
    """Per leaf path: the scalars of each transform, for one that runs a method."""
    of_each = settings_of(method, paths)
    return {p: tuple(of_path[p] for of_path in of_each) for p in paths}


def run_transforms(
    method: Method,
    values: Values,
    leaf: Leaf,
    settings: Sequence[Any],
    stats: Sequence[tuple[Any, ...]],
    stop: int | None = None,
) -> Values:
    """Applies transforms [0, stop) to the values of one tensor or chunk."""
    for i, t in enumerate(method.transforms[:stop]):
        values = t.apply(values, at_transform(leaf, i, settings), stats[i])
    return values


def at_transform(leaf: Leaf, i: int, settings: Sequence[Any]) -> Leaf:
    """What transform i sees: its own setting; ranks are of the first one's values."""
    return leaf._replace(setting=settings[i], ranks=() if i else leaf.ranks)


def unchanged(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
    """A measure of the values as they are (the stream then stays on the host)."""
    return values


def add_up(values: Sequence[Any]) -> Any:
    """Sum from left to right: chunks, shards and whole tensors give the same bits.

    `jnp.sum` over a stacked axis does not: it may add in another order.
    """
    return functools.reduce(operator.add, values)


def times(a: Any, x: Array) -> Array:
    """a x, rounded before anything is added to it.

    XLA fuses products into sums (FMA) or folds constants together depending on shapes
    and on what is traced. The comparison, always true but for NaN, keeps it from that:
    eager, jitted, streamed and sharded merges then agree bit for bit.
    """
    product = a * x
    return jnp.where(product == product, product, jnp.nan)


def start_values(method: Method, base: Array, models: Values) -> Values:
    """tau_t = theta_t - theta_0, or theta_t for methods on the parameters."""
    if method.start == "parameters":
        return models
    return tuple(m - base for m in models)


def finish(method: Method, values: Values, base: Array) -> Array:
    """theta_0 + tau, or theta itself; a chain must leave one value."""
    if len(values) != 1:
        raise ValueError(
            f"the chain left {len(values)} values, expected 1: end it with a combining"
            " transform (weighted_sum, disjoint_mean, ...)"
        )
    return values[0] if method.end == "parameters" else base + values[0]


NO_FLOAT64_RANKS = (
    "float64, but this method ranks magnitudes in float32; cast to float32 first (from"
    " disk: dtype='float32')"
)


def is_float(dtype: Any) -> bool:
    """Whether a merge computes on this dtype (integers and bool come from the base)."""
    return jnp.issubdtype(dtype, jnp.floating)


def compute_dtype(dtype: Any) -> np.dtype:
    """float64 stays float64, everything else is computed in float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def merge(
    method: Method,
    base: Any,
    models: Sequence[Any],
    *,
    weights: Sequence[Any] | None = None,
    statistics: Sequence[Any] | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Any:
    """Merges parameter pytrees; works under jit, vmap, grad and any sharding.

    Args:
      method: a chain or recipe.
      base: theta_0, any pytree of arrays (Linen, NNX pure dicts, lists, ...).
      models: T pytrees of the same structure and shapes.
      weights: T scalars, may be traced; 1 each by default.
      statistics: T pytrees or dicts by path, for methods that need data (fisher:
        `fisher_diagonal`, regmean: `gram_matrices`); leaves they lack are averaged.
      include, exclude: regexes on leaf paths; other leaves come from the base.

    Returns:
      A pytree like `base`: its structure, shapes, dtypes and shardings. Leaves that
      are not floating point come from the base.

    Raises:
      ValueError: structures, shapes or the numbers of models and weights differ;
        statistics are missing or do not fit.
    """
    weights = check_models(method, len(models), weights)
    bases = tree.flatten(base)
    others = [tree.flatten(m) for m in models]
    _check_alike(bases, others)
    known = None if statistics is None else [*map(task_statistics.by_path, statistics)]
    task_statistics.check(
        statistics_kind(method),
        {p: np.shape(x) for p, x in bases.items()},
        known and [{p: task_statistics.spec(x) for p, x in k.items()} for k in known],
        len(models),
    )
    chosen = tree.select(list(bases), include=include, exclude=exclude)
    paths = [
        p
        for p, keep in zip(bases, chosen, strict=True)
        if keep and is_float(_dtype(bases[p], p))
    ]
    settings = settings_of(method, list(bases))
    leaves: dict[str, Leaf] = {}
    values: dict[str, Values] = {}
    ranks = any(m.kind == "kth" for t in method.transforms for m in t.measures)
    for p in paths:
        dtype = compute_dtype(_dtype(bases[p], p))
        if ranks and dtype == np.float64:
            raise ValueError(f"{p}: {NO_FLOAT64_RANKS}")
        theta = jnp.asarray(bases[p]).astype(dtype)
        cast = functools.partial(jnp.asarray, dtype=dtype)
        leaves[p] = Leaf(
            theta,
            tuple(map(cast, weights)),
            size=float(theta.size),
            statistics=tuple(jax.tree.map(cast, k[p]) for k in known or () if p in k),
        )
        values[p] = start_values(
            method, theta, tuple(jnp.asarray(m[p]).astype(dtype) for m in others)
        )
    for t, setting in zip(method.transforms, settings, strict=True):
        at = {p: leaves[p]._replace(setting=setting[p]) for p in paths}
        values = apply(t, values, at, measure(t, values, at))
    merged = dict(bases)
    for p in paths:
        theta = finish(method, values[p], leaves[p].base)
        merged[p] = theta.astype(_dtype(bases[p], p))
    return tree.unflatten(base, merged)


def apply(
    t: Transform,
    values: Mapping[str, Values],
    leaves: Mapping[str, Leaf],
    stats: Mapping[str, tuple[Any, ...]],
) -> dict[str, Values]:
    """A transform of all leaves; whole tensors of one shape in one batch.

    One SVD is then compiled a shape, not one a leaf.
    """
    inputs = {p: (values[p], leaves[p], stats[p]) for p in values}
    if t.needs != "tensor":
        return {p: t.apply(*x) for p, x in inputs.items()}
    groups: dict[Any, list[str]] = {}
    for p, x in inputs.items():
        arrays, structure = jax.tree.flatten(x)
        shapes = tuple((np.shape(a), jnp.result_type(a)) for a in arrays)
        groups.setdefault((structure, shapes), []).append(p)
    out: dict[str, Values] = {}
    for paths in groups.values():
        batch = [inputs[p] for p in paths]
        if len(batch) == 1:
            out[paths[0]] = t.apply(*batch[0])
            continue
        stacked = jax.tree.map(_stacked, *batch)
        results = jax.vmap(t.apply)(*stacked)
        out |= {p: tuple(x[i] for x in results) for i, p in enumerate(paths)}
    return {p: out[p] for p in values}


def _stacked(*xs: Any) -> Array:
    """Arrays, or settings; seeds among these have all of 32 bits."""
    return jnp.stack([np.uint32(x) if isinstance(x, int) else x for x in xs])


def measure(
    t: Transform, values: Mapping[str, Values], leaves: Mapping[str, Leaf]
) -> dict[str, tuple[Any, ...]]:
    """All statistics of a transform, per leaf (a whole-model one is shared)."""
    stats: dict[str, tuple[Any, ...]] = dict.fromkeys(values, ())
    for m in t.measures:
        terms = {p: m.values(values[p], leaves[p], stats[p]) for p in values}
        # Leaves by scope: each on its own, or all together.
        scopes = [[p] for p in terms] if m.scope == "tensor" else [list(terms)]
        reduced = reduce_terms(
            m,
            [[terms[p] for p in paths] for paths in scopes],
            [stats[p] for p, *_ in scopes],
        )
        for paths, new in zip(scopes, reduced, strict=True):
            for p in paths:
                stats[p] = (*stats[p], new)
    return stats


def reduce_terms(
    m: Measure, groups: Sequence[Sequence[Values]], earlier: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """Reduces the terms of each group of leaves; `earlier`: its statistics so far."""
    columns = [list(zip(*leaves, strict=True)) for leaves in groups]
    if m.kind == "sum":
        return [tuple(map(statistics.total, group)) for group in columns]
    if m.kind == "count":
        return [tuple(map(statistics.count, group)) for group in columns]
    ranks = [
        ranks_of(m, sum(x.size for x in group[0]), len(group), known)
        for group, known in zip(columns, earlier, strict=True)
    ]
    flat = [
        group[i % len(group)]
        for group, ks in zip(columns, ranks, strict=True)
        for i in range(len(ks))
    ]
    found = iter(statistics.kth_magnitudes(flat, [k for ks in ranks for k in ks]))
    return [tuple(next(found) for _ in ks) for ks in ranks]


def ranks_of(
    m: Measure, size: int, terms: int, earlier: tuple[Any, ...] = ()
) -> list[Any]:
    """The ranks wanted of a kth measure's terms, of `size` entries in scope."""
    assert m.rank is not None
    if callable(m.rank):
        return list(m.rank(size, terms, earlier))
    ranks = m.rank * terms if len(m.rank) == 1 else m.rank
    if len(ranks) != terms:
        raise ValueError(
            f"got {len(ranks)} densities for {terms} models; give one, or one per model"
        )
    return [r(size) for r in ranks]


def _dtype(x: Any, path: str) -> np.dtype:
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        dtype = np.asarray(x).dtype
        return np.dtype(np.float32) if np.issubdtype(dtype, np.floating) else dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{path}: got {dtype}, expected real numbers; split the leaf")
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ValueError(
            f"{path}: float64 needs jax.config.update('jax_enable_x64', True); without"
            " it JAX would round to float32. Or cast the leaf first"
        )
    return dtype


def _check_alike(base: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    for i, other in enumerate(others):
        missing = [p for p in base if p not in other]
        extra = [p for p in other if p not in base]
        if missing or extra:
            raise ValueError(
                f"model {i} has other leaves than the base: missing {missing[:5]},"
                f" unexpected {extra[:5]} ({len(missing)} and {len(extra)} in all)"
            )
        for p, x in base.items():
            if np.shape(x) != np.shape(other[p]):
                raise ValueError(
                    f"{p}: model {i} has shape {np.shape(other[p])}, the base"
                    f" {np.shape(x)}"
                )
