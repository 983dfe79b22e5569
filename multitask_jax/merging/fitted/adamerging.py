"""AdaMerging (Yang et al. 2024): coefficients of task vectors from unlabelled data.

theta^l = theta_0^l + sum_t lambda_t^l tau_t^l, with lambda that makes the merged model
sure of its predictions: min_lambda sum_t mean_x H(f_t(theta, x)). l is the whole model
(task-wise), or each leaf (what the paper calls layer-wise).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from multitask_jax import tree
from multitask_jax.merging import core
from multitask_jax.merging.arguments import check_choice
from multitask_jax.merging.core import Array, Method, add_up, is_float
from multitask_jax.merging.fitted.batching import check_batches
from multitask_jax.merging.fitted.entropy import (
    ApplyFn,
    Data,
    Progress,
    entropy_gradient,
    minimise_entropy,
    one_each,
)
from multitask_jax.merging.transforms import elect_sign, trim

if TYPE_CHECKING:  # imported on use: merging without data does without it
    import optax

ApplyFns = ApplyFn | Sequence[ApplyFn]
Level = Literal["task", "leaf", "block"]
_AS_THEY_ARE = Method(())


class AdaMerging(NamedTuple):
    """What `adamerging` found."""

    params: Any  # the merged model, a pytree like the base
    # [T] by leaf path, by block ("encoder/layers/3"; "" outside blocks), or by "".
    coefficients: dict[str, Array]
    entropy: Array  # [steps], before each step: sum over tasks of means, in nats


def adamerging(
    apply_fn: ApplyFns,
    base: Any,
    models: Sequence[Any],
    batches: Sequence[Iterable[Any]],
    *,
    level: Level = "leaf",
    init: float = 0.3,
    steps: int = 500,
    optimiser: "optax.GradientTransformation | None" = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    block_pattern: str | None = None,
    prepare: Method = _AS_THEY_ARE,
    progress: Progress | None = None,
) -> AdaMerging:
    """Fits the coefficients of task vectors on unlabelled batches of each task.

        batches = [[images_a], [images_b]]
        found = merging.adamerging(apply_fn, base, models, batches)
        found.params, found.coefficients["encoder/block_3/mlp/kernel"]

    Args:
      apply_fn: (params, inputs) -> logits [B, C] (or [B, L, C]); one for all tasks, or
        one a task, where heads differ (and are not part of params). Each function is
        compiled on its own and kept: heads among the inputs do with one.
      base, models: parameter pytrees, all in memory.
      batches: T lists (or re-iterables) of inputs with a leading axis of examples.
      level: coefficients by "task", by task and "leaf" (the paper's layer-wise), or by
        task and "block".
      init: all coefficients at the start.
      steps: of the optimiser, on one batch a task.
      optimiser: Adam, learning rate 1e-3, by default.
      clip: range that coefficients are put back into after each step; the authors'
        code has (0, 1), but clips in the forward pass, where they then get stuck.
      block_pattern: as for LiNeS, where block names are unusual.
      prepare: a chain on the task vectors first, which leaves one a model.
      progress: called with a step's number and its entropy.

    Raises:
      ValueError: trees that differ, no batches, iterators, numbers of tasks that
        differ, blocks that can't be told, `init` outside of `clip`, steps below 0.
    """
    count = len(models)
    functions = one_each(apply_fn, count)
    check_batches(batches, count)
    if clip is not None and not clip[0] <= init <= clip[1]:
        raise ValueError(f"init: got {init}, expected a number within clip={clip}")
    groups = _groups(list(tree.flatten(base)), level, block_pattern)
    base = jax.tree.map(jnp.asarray, base)
    taus = task_vectors(base, models, prepare)

    def by_path(coefficients: dict[str, Array]) -> dict[str, Array]:
        return {path: coefficients[group] for path, group in groups.items()}

    @jax.jit
    def by_group(coefficients: dict[str, Array], slopes: dict[str, Array]) -> Any:
        return jax.vjp(by_path, coefficients)[1](slopes)[0]

    def gradient(coefficients: dict[str, Array], data: Data) -> tuple[Array, Any]:
        spread = by_path(coefficients)
        params = _merged(spread, base, taus)
        floats = _floats(params)
        value, slopes = entropy_gradient(_predict, functions, floats, params, data)
        return value, by_group(coefficients, _pulled(spread, base, taus, slopes))

    def project(coefficients: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(lambda x: jnp.clip(x, *clip) if clip else x, coefficients)

    coefficients, entropy = minimise_entropy(
        gradient,
        {g: jnp.full(count, init, jnp.float32) for g in groups.values()},
        batches,
        steps=steps,
        learning_rate=1e-3,
        optimiser=optimiser,
        project=project,
        progress=progress,
    )
    params = _merged(by_path(coefficients), base, taus)
    return AdaMerging(params, coefficients, entropy)


def adamerging_plus_plus(
    apply_fn: ApplyFns,
    base: Any,
    models: Sequence[Any],
    batches: Sequence[Iterable[Any]],
    *,
    density: float = 0.2,
    **options: Any,
) -> AdaMerging:
    """AdaMerging++: the same on task vectors after steps 1 and 2 of TIES.

    Each is trimmed to the `density` largest changes of the whole model, and entries
    that go against the elected sign are zero. `options` as for `adamerging`.
    """
    agree = core.chain(trim(density=density), elect_sign())
    return adamerging(apply_fn, base, models, batches, prepare=agree, **options)


def task_vectors(
    base: Any, models: Sequence[Any], prepare: Method = _AS_THEY_ARE
) -> list[Any]:
    """tau_t as trees like the base, in float32, after a chain that leaves T values."""
    wide = jax.tree.map(
        lambda x: x.astype(core.compute_dtype(x.dtype)) if is_float(x.dtype) else x,
        base,
    )

    def stack(values: core.Values, leaf: core.Leaf, stats: tuple[Any, ...]) -> Any:
        if len(values) != len(models):
            raise ValueError(
                f"prepare: the chain left {len(values)} values of {len(models)} models,"
                " expected one a model"
            )
        return (jnp.stack(values),)

    # A method that ends with "parameters" leaves its value as it is: no base is added.
    every = Method((*prepare.transforms, core.Transform(stack)), end="parameters")

    def task(found: Any, t: int) -> Any:
        return jax.tree.map(lambda x: x[t] if is_float(x.dtype) else x, found)

    @jax.jit
    def made(base: Any, models: list[Any]) -> list[Any]:
        found = core.merge(every, base, models)
        return [task(found, t) for t in range(len(models))]

    return made(wide, list(models))


def add_task_vectors(
    base: Any, taus: Sequence[Any], coefficients: Callable[[str], Array]
) -> Any:
    """theta_0 + sum_t lambda_t tau_t, with the [T] coefficients of each leaf path."""
    changes = [tree.flatten(tau) for tau in taus]
    leaves = tree.flatten(base)
    for path, theta in leaves.items():
        if is_float(theta.dtype):
            by_task = coefficients(path)
            moves = [by_task[t] * change[path] for t, change in enumerate(changes)]
            leaves[path] = (theta + add_up(moves)).astype(theta.dtype)
    return tree.unflatten(base, leaves)


# At the level of the module, so that all calls with models alike share programs.
@jax.jit
def _merged(coefficients: dict[str, Array], base: Any, taus: Sequence[Any]) -> Any:
    return add_task_vectors(base, taus, lambda path: coefficients[path])


@jax.jit
def _pulled(
    coefficients: dict[str, Array], base: Any, taus: Sequence[Any], slopes: Any
) -> dict[str, Array]:
    """dH / d lambda by path, from dH / d theta."""
    floats, pull = jax.vjp(lambda c: _floats(_merged(c, base, taus)), coefficients)
    return pull({p: slopes[p].astype(x.dtype) for p, x in floats.items()})[0]


def _floats(params: Any) -> dict[str, Array]:
    return {p: x for p, x in tree.flatten(params).items() if is_float(x.dtype)}


def _predict(
    apply_fn: ApplyFn, floats: dict[str, Array], params: Any, inputs: Any
) -> Array:
    leaves = tree.flatten(params) | floats
    return apply_fn(tree.unflatten(params, leaves), inputs)


def _groups(
    paths: list[str], level: Level, block_pattern: str | None
) -> dict[str, str]:
    """The name of the coefficients that each leaf shares."""
    check_choice("level", level, ("task", "leaf", "block"))
    if level == "task":
        return dict.fromkeys(paths, "")
    if level == "leaf":
        return {p: p for p in paths}
    depths = depths_of(paths, block_pattern)
    return {p: f"{d.stack}/{d.index}" if d else "" for p, d in depths.items()}


def depths_of(
    paths: Sequence[str], block_pattern: str | None
) -> dict[str, tree.Depth | None]:
    """As `tree.block_depths`, for what can do without blocks.

    Raises:
      ValueError: no block found; names level="leaf".
    """
    try:
        return tree.block_depths(paths, block_pattern=block_pattern)
    except ValueError as e:
        raise ValueError(f'{e}; or pass level="leaf", which needs no blocks') from None
