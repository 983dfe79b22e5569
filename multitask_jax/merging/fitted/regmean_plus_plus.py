"""RegMean++ (Nguyen et al. 2025): RegMean on what the merged model itself computes.

RegMean's Gram matrices are of activations in the single models; the merged model feeds
its layers others. Here layer l is merged with Grams of inputs that come through the
merged layers 0..l-1, then through model t's own layer l.

The paper defines this for the transformer blocks of vision models. What it leaves open
is reconstructed from the order in which the function executes: a dense leaf outside the
blocks is a layer of its own, and when layer l is merged every leaf that is used before
it, biases, norms and embeddings too, is the merged one already.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from multitask_jax import tree
from multitask_jax.merging import core
from multitask_jax.merging.arguments import check_choice
from multitask_jax.merging.fitted.adamerging import depths_of
from multitask_jax.merging.fitted.batching import check_batches
from multitask_jax.merging.fitted.entropy import one_each
from multitask_jax.merging.fitted.gram import (
    RowsFn,
    dense_leaves,
    gram_matrices,
    no_product,
)
from multitask_jax.merging.fitted.regmean import regmean
from multitask_jax.merging.transforms import weighted_sum


def regmean_plus_plus(
    apply_fn: Callable[[Any, Any], Any] | Sequence[Callable[[Any, Any], Any]],
    models: Sequence[Any],
    batches: Sequence[Iterable[Any]],
    *,
    off_diagonal: float = 0.9,
    weights: Sequence[float] | None = None,
    level: Literal["block", "leaf"] = "block",
    block_pattern: str | None = None,
    rows: RowsFn | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Merges dense layers in the order of execution; averages all other leaves.

    One round over the batches for each layer, compiled once. Layers stacked in one leaf
    for a scan are merged at once, as in RegMean.

        merged = merging.regmean_plus_plus(apply_fn, models, [[images_a], [images_b]])

    Args:
      apply_fn: (params, inputs) -> anything; one for all models, or one a model.
      models: T parameter pytrees, all in memory.
      batches: T lists (or re-iterables) of inputs with a leading axis of examples.
      off_diagonal: as for `regmean`.
      weights: one a model (1 each).
      level: merge a "block" at a time (the paper), or every dense "leaf" on its own.
      block_pattern: as for LiNeS, where block names are unusual.
      rows: as for `gram_matrices`: which rows are no padding.
      progress: called with a layer's number and how many there are.

    Returns:
      A pytree like the models.

    Raises:
      ValueError: trees that differ, no dense layer, blocks that can't be told (of a
        plain MLP: level="leaf" does without), numbers of tasks that differ, no batches,
        iterators.
    """
    check_choice("level", level, ("block", "leaf"))
    count = len(models)
    functions = one_each(apply_fn, count)
    check_batches(batches, count)
    average = core.Method(
        (weighted_sum(normalise=True),), start="parameters", end="parameters"
    )
    merged = tree.flatten(core.merge(average, models[0], models, weights=weights))
    own = [tree.flatten(m) for m in models]
    example = next(iter(batches[0]), None)
    if example is None:
        raise ValueError("batches[0]: got no batches, expected at least one")
    found = dense_leaves(functions[0], models[0], example)
    if not found.axes:
        raise no_product(found.averaged)
    place = {p: i for i, p in enumerate(found.order)}
    layers = _layers(list(found.axes), list(merged), place, level, block_pattern)
    for i, (start, paths) in enumerate(layers):
        grams = []
        for f, mine, data in zip(functions, own, batches, strict=True):
            mixed = {
                p: merged[p] if place.get(p, start) < start else x
                for p, x in mine.items()
            }
            params = tree.unflatten(models[0], mixed)
            grams.append(gram_matrices(f, params, data, rows=rows, only=paths))
        merged |= core.merge(
            regmean(off_diagonal=off_diagonal),
            {p: own[0][p] for p in paths},
            [{p: mine[p] for p in paths} for mine in own],
            weights=weights,
            statistics=grams,
        )
        if progress is not None:
            progress(i, len(layers))
    return tree.unflatten(models[0], merged)


def _layers(
    dense: list[str],
    paths: list[str],
    place: dict[str, int],
    level: str,
    block_pattern: str | None,
) -> list[tuple[int, list[str]]]:
    """(place of its first leaf, dense leaves) of each layer, in order of execution."""
    if level == "leaf":
        return sorted((place[p], [p]) for p in dense)
    depths = depths_of(paths, block_pattern)
    blocks: dict[Any, list[str]] = {}
    for p in paths:
        if p in place:
            blocks.setdefault(depths[p] or p, []).append(p)
    layers = [
        (min(place[p] for p in members), [p for p in members if p in dense])
        for members in blocks.values()
    ]
    return sorted((start, members) for start, members in layers if members)
