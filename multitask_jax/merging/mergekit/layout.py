"""Which input tensors make which output tensor: whole models, or slices of layers.

Names decide. Layers are found by `tree.block_depths`; slices renumber them in the order
of the output. Tensors outside the layers come from the first slice if they feed the
layers (embeddings) and from the last one if they follow them (final norm, head).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from multitask_jax import tree
from multitask_jax.checkpoints import CheckpointError, Reader
from multitask_jax.merging.mergekit.parameters import layer_position
from multitask_jax.merging.mergekit.recipe import Slice

# What comes before the layers: embeddings of tokens, positions and patches, and norms
# and projections of these. GPT-NeoX's embed_out is a head.
_FEEDS_LAYERS = re.compile(
    r"(?:^|[._/])(?:\w*embed(?!_?out)\w*|wte|wpe|shared|tok\w*|pos\w*|patch\w*|cls_token"
    r"|\w*class_embedding|pre_\w+|project_in|stem\w*)(?:[._/]|$)",
    re.IGNORECASE,
)


class Layers(NamedTuple):
    """The one stack of layers of a model, and each tensor's layer in it."""

    count: int
    layer: dict[str, int | None]  # None: outside
    digits: dict[str, tuple[int, int]]  # where in the name the number stands

    def renumbered(self, path: str, layer: int) -> str:
        """layers.3.mlp.weight, 5 -> layers.5.mlp.weight."""
        start, stop = self.digits[path]
        return f"{path[:start]}{layer}{path[stop:]}"


def find_layers(reader: Reader, block_pattern: str | None = None) -> Layers:
    """The layers of a model that slices cut.

    Raises:
      CheckpointError: no layers, several stacks of them, or holes in their numbers.
    """
    paths = list(reader.tensors)
    where = f"{reader.path}: slices need layers numbered 0, 1, ..."
    try:
        depths = tree.block_depths(paths, block_pattern=block_pattern)
    except ValueError as e:
        raise CheckpointError(f"{where}: {e}") from None
    stacks = sorted({d.stack for d in depths.values() if d is not None})
    if len(stacks) > 1:
        raise CheckpointError(
            f"{where} in one stack, got {len(stacks)}: {', '.join(stacks)}; `models`"
            " merges such models whole, or pass a block_pattern that finds one stack"
        )
    layer: dict[str, int | None] = dict.fromkeys(paths)
    digits: dict[str, tuple[int, int]] = {}
    for path, depth in depths.items():
        if depth is None:
            continue
        found = re.compile(r"[./_]?(\d+)").match(path, len(depth.stack))
        if found is None:
            raise CheckpointError(f"{where}: can't tell the number in {path}")
        layer[path], digits[path] = int(found[1]), found.span(1)
    numbers = sorted({n for n in layer.values() if n is not None})
    count = next(d.count for d in depths.values() if d is not None)
    if numbers != list(range(count)):
        raise CheckpointError(
            f"{where}: the stack {stacks[0]} has the numbers {numbers[:20]}, expected 0"
            f" to {count - 1}; is a shard missing, or are layers counted in stages?"
        )
    return Layers(count, layer, digits)


class Target(NamedTuple):
    """An output tensor."""

    name: str
    inputs: tuple[str | None, ...]  # its name in each source of its slice; None: lacks
    slice: int
    position: float  # that gradients are evaluated at, in [0, 1]
    layer: bool  # whether it belongs to one


def whole_models(
    sources: Sequence[Reader],
    reference: Reader,
    *,
    gradients: bool,
    block_pattern: str | None = None,
) -> list[Target]:
    """One slice over everything; each stack of layers has its own positions.

    Raises:
      ValueError: there are gradients, but no layers.
    """
    paths = list(reference.tensors)
    depths: dict[str, tree.Depth | None] = dict.fromkeys(paths)
    if gradients:
        depths = tree.block_depths(paths, block_pattern=block_pattern)
    targets = []
    for path in paths:
        depth = depths[path]
        position = 0.0 if depth is None else layer_position(depth.index, depth.count)
        inputs = tuple(
            path if path in r.tensors or path in r.aliases else None for r in sources
        )
        targets.append(Target(path, inputs, 0, position, depth is not None))
    return targets


def slices_of_layers(
    slices: Sequence[Slice],
    sources: Sequence[Sequence[Reader]],
    layers: Sequence[Sequence[Layers]],
) -> list[Target]:
    """The output of slices, in its order: what feeds the layers, layers, the rest.

    Args:
      slices: of the recipe.
      sources: of each slice, a reader for each source.
      layers: likewise.

    Raises:
      ValueError: a range leaves a model's layers, or sources of a slice differ.
    """
    _check_ends(slices, sources, layers)
    before: list[Target] = []
    middle: list[Target] = []
    after: list[Target] = []
    offset = 0
    for s, part in enumerate(slices):
        first, last = s == 0, s == len(slices) - 1
        found = [
            _named(i, part, reader, known, offset, first, last)
            for i, (reader, known) in enumerate(zip(sources[s], layers[s], strict=True))
        ]
        count = _length(part)
        outside = [n for n, (_, i) in found[0].items() if i is None]
        inside = [n for n, (_, i) in found[0].items() if i is not None]
        inside.sort(key=lambda n: found[0][n][1] or 0)
        _check_same([set(f) for f in found], part)
        for name in [*outside, *inside]:
            index = found[0][name][1]
            position = 0.0 if index is None else layer_position(index, count)
            inputs = tuple(f[name][0] if name in f else None for f in found)
            target = Target(name, inputs, s, position, index is not None)
            ahead = first and _FEEDS_LAYERS.search(name)
            (middle if target.layer else before if ahead else after).append(target)
        offset += count
    return [*before, *middle, *after]


def _check_ends(
    slices: Sequence[Slice],
    sources: Sequence[Sequence[Reader]],
    layers: Sequence[Sequence[Layers]],
) -> None:
    """What is outside of layers comes from the first slice or the last: from both.

    A tensor of only one of them, at its wrong end, would be in no slice.

    Raises:
      CheckpointError: there is such a tensor.
    """
    outside = [
        {path for path, layer in layers[s][0].layer.items() if layer is None}
        for s in (0, -1)
    ]
    for own, other, s, feeds in (
        (outside[0], outside[1], 0, False),
        (outside[1], outside[0], -1, True),
    ):
        lost = {p for p in own - other if bool(_FEEDS_LAYERS.search(p)) == feeds}
        if lost:
            where, there = (slices[i].sources[0].model for i in (s, -1 - s))
            raise CheckpointError(
                f"slices: {where} has {sorted(lost)[:5]} ({len(lost)} in all) outside"
                f" of its layers, {there} has not: what"
                f" {'feeds' if feeds else 'follows'} the layers is taken from the"
                f" {'first' if feeds else 'last'} slice, so it would be lost"
            )


def _length(part: Slice) -> int:
    start, stop = part.sources[0].layers or (0, 0)
    return stop - start


def _named(
    i: int,
    part: Slice,
    reader: Reader,
    layers: Layers,
    offset: int,
    first: bool,
    last: bool,
) -> dict[str, tuple[str, int | None]]:
    """Output name -> (input name, layer of the slice) of source i."""
    source = part.sources[i]
    assert source.layers is not None
    start, stop = source.layers
    if stop > layers.count:
        raise ValueError(
            f"{source.where}.layer_range: got [{start}, {stop}], but {source.model} has"
            f" {layers.count} layers: expected at most [.., {layers.count}]"
        )
    out: dict[str, tuple[str, int | None]] = {}
    for path in reader.tensors:
        layer = layers.layer[path]
        if layer is None:
            if first if _FEEDS_LAYERS.search(path) else last:
                out[path] = (path, None)
        elif start <= layer < stop:
            name = layers.renumbered(path, offset + layer - start)
            out[name] = (path, layer - start)
    return out


def _check_same(names: Sequence[set[str]], part: Slice) -> None:
    for source, found in zip(part.sources, names, strict=True):
        missing, extra = sorted(names[0] - found), sorted(found - names[0])
        if missing or extra:
            raise CheckpointError(
                f"{source.where}: {source.model} has other tensors than"
                f" {part.sources[0].model} in this slice: missing {missing[:5]},"
                f" additional {extra[:5]} ({len(missing)} and {len(extra)} in all);"
                " layers of one kind are merged with each other"
            )
