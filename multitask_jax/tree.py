"""Leaf paths: the one way this library names parameters.

A path is "encoder/block_3/mlp/kernel" for pytrees and the stored name for checkpoints
("model.layers.3.mlp.up_proj.weight"). Regexes on paths choose leaves; numbers in paths
tell the depth of a block.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order: {"a": [x, y]} -> {"a/0": x, "a/1": y}.

    Raises:
      ValueError: two leaves share a path (a key contains "/").
    """
    out: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in out:
            raise ValueError(f"two leaves have the path {path!r}; rename one of them")
        out[path] = leaf
    return out


def unflatten(like: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`: a tree of the structure of `like`.

    Raises:
      ValueError: a path is missing or unexpected.
    """
    expected = flatten(like)
    if set(expected) != set(leaves):
        missing, extra = set(expected) - set(leaves), set(leaves) - set(expected)
        raise ValueError(
            f"leaves do not fit the tree: missing {sorted(missing)[:5]}, unexpected"
            f" {sorted(extra)[:5]}"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[p] for p in expected])


def nest(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Before/after: {"a/b": x, "c.d": y} -> {"a": {"b": x}, "c.d": y}.

    Raises:
      ValueError: a name is both a tensor and a group of tensors.
    """
    out: dict[str, Any] = {}
    for name, x in tensors.items():
        *groups, last = name.split("/")
        node = out
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: {group} is a tensor too, not only a group")
        if last in node:
            raise ValueError(f"{name} is a tensor and a group of tensors")
        node[last] = x
    return out


def select(
    paths: Sequence[str], *, include: str | None = None, exclude: str | None = None
) -> list[bool]:
    """Which paths `include` finds (all by default) and `exclude` does not.

    Raises:
      ValueError: a regex is invalid or finds no path at all (a typo, most likely).
    """
    chosen = [True] * len(paths)
    for name, pattern, wanted in (
        ("include", include, True),
        ("exclude", exclude, False),
    ):
        if not pattern:
            continue
        found = [bool(_compile(name, pattern).search(p)) for p in paths]
        if not any(found):
            raise ValueError(
                f"{name}={pattern!r} matches none of {len(paths)} paths, among them"
                f" {_sample(paths)}"
            )
        chosen = [c and (f is wanted) for c, f in zip(chosen, found, strict=True)]
    return chosen


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{name}={pattern!r} is not a regex: {e}") from None


def _sample(paths: Sequence[str], count: int = 6) -> str:
    step = max(1, len(paths) // count)
    return ", ".join(list(paths)[::step][:count])


class Depth(NamedTuple):
    """Where a leaf lies: block `index` of `count` in a stack ("encoder/layers")."""

    stack: str
    index: int
    count: int


# Words that name a repeated block, as the last word of a path component: layer, layers,
# encoderblock, TransformerBlock, resblocks, blk, h (GPT-2). Not layernorm, not experts.
_BLOCK = re.compile(
    r"(?:.*(?:layer|block|blk|stage|cell)s?|h)(?:_?(?P<number>\d+))?", re.IGNORECASE
)
# Hierarchical models (Swin, ConvNeXt) count blocks within stages.
_STAGE = re.compile(r"(?:.*stage|.*level|layer)s?", re.IGNORECASE)
_BLOCK_IN_STAGE = re.compile(r"(?:.*block|layer)s?", re.IGNORECASE)


def block_depths(
    paths: Sequence[str], *, block_pattern: str | None = None
) -> dict[str, Depth | None]:
    """The block each path belongs to; None for embeddings, final norms and heads.

    Knows Hugging Face, Flax, timm and OpenCLIP names by their words ("layers.3",
    "encoderblock_11", "resblocks.3", "h.3"); the outermost number counts, so the 0 in
    "blk.3.mlp.0.w" does not. Stacks (encoder and decoder) count on their own; stages of
    blocks ("stages.1.blocks.2") count through.

    Args:
      paths: all leaf paths of the model.
      block_pattern: overrides the words: a regex with one group (or one named `index`)
        for the number and perhaps one named `stack`, or a template "layers.{i}.".

    Raises:
      ValueError: no block found, or the pattern has no group; shows some paths.
    """
    if block_pattern is not None:
        found = _by_pattern(paths, block_pattern)
    else:
        found = {p: _locate(p) for p in paths}
        found = _drop_simple_stacks(found)
    blocks: dict[str, set[tuple[int, ...]]] = {}
    for located in found.values():
        if located is not None:
            blocks.setdefault(located[0], set()).add(located[1])
    if not blocks:
        how = f"block_pattern {block_pattern!r}" if block_pattern else "their names"
        raise ValueError(
            f"can't tell the blocks of {len(paths)} leaves by {how}, among them"
            f" {_sample(paths)}; pass a block_pattern that finds the block's number,"
            r" for example 'layers\.(\d+)\.' or 'layers.{i}.'"
        )
    order = {
        stack: {number: i for i, number in enumerate(sorted(numbers))}
        for stack, numbers in blocks.items()
    }
    return {
        p: None
        if located is None
        else Depth(located[0], order[located[0]][located[1]], len(order[located[0]]))
        for p, located in found.items()
    }


_Located = tuple[str, tuple[int, ...]] | None


def _by_pattern(paths: Sequence[str], pattern: str) -> dict[str, _Located]:
    if "{i}" in pattern:
        before, after = map(re.escape, pattern.split("{i}", 1))
        # A template must match whole components: layers.{i}. is not sublayers.1.
        pattern = rf"(?:^|(?<=[./])){before}(?P<index>\d+){after}"
    regex = _compile("block_pattern", pattern)
    group: int | str = "index" if "index" in regex.groupindex else 1
    if regex.groups == 0 or (group == 1 and "stack" in regex.groupindex):
        raise ValueError(
            f"block_pattern={pattern!r} has no group for the block's number; write"
            r" 'layers\.(\d+)\.', 'layers.{i}.' or name groups (?P<stack>..)"
            r" (?P<index>\d+)"
        )
    out: dict[str, _Located] = {}
    for p in paths:
        m = regex.search(p)
        if m is None:
            out[p] = None
            continue
        if not (m[group] or "").isdigit():
            raise ValueError(
                f"block_pattern={pattern!r} finds {m[group]!r} in {p}, expected digits"
            )
        named = "stack" in regex.groupindex
        stack = (m["stack"] or "") if named else p[: m.start(group)]
        out[p] = (stack, (int(m[group]),))
    return out


def _locate(path: str) -> _Located:
    """(stack, numbers of the block in it) by the outermost word that names a block."""
    parts = re.split(r"[./]", path)
    for i, part in enumerate(parts[:-1]):
        m = _BLOCK.fullmatch(part)
        if m is None:
            continue
        if m["number"] is not None:
            word, number, rest = part[: m.start("number")], m["number"], parts[i + 1 :]
        elif parts[i + 1].isdigit():
            word, number, rest = part, parts[i + 1], parts[i + 2 :]
        else:
            continue
        if not rest:
            return None
        stack = "/".join([*parts[:i], word])
        return _locate_in_stage(stack, word, int(number), rest, bool(m["number"]))
    return None


def _locate_in_stage(
    stack: str, word: str, number: int, rest: Sequence[str], joined: bool
) -> _Located:
    word = word.rstrip("_")
    # torchvision: layer1.0.conv1; timm: stages.1.blocks.2; but T5: block.1.layer.0.
    if joined and word.lower() == "layer" and len(rest) > 1 and rest[0].isdigit():
        return stack, (number, int(rest[0]))
    if (
        word.lower() != "layer"
        and _STAGE.fullmatch(word)
        and len(rest) > 2
        and rest[1].isdigit()
        and _BLOCK_IN_STAGE.fullmatch(rest[0])
    ):
        return stack, (number, int(rest[1]))
    return stack, (number,)


def _drop_simple_stacks(found: Mapping[str, _Located]) -> dict[str, _Located]:
    """Leaves out stacks of single dense layers (a head's MLP) beside real blocks."""
    names: dict[str, set[str]] = {}
    for p, located in found.items():
        if located is not None:
            names.setdefault(located[0], set()).add(re.split(r"[./]", p)[-2])
    # In a block some leaf has a module of its own ("layers.3.mlp.weight").
    real = {s for s, last in names.items() if not all(_numbered(w) for w in last)}
    # A model may be dense layers alone; a few of them among others are its head.
    few = sum(x is not None for x in found.values()) < len(found) / 2
    if real or few:
        found = {
            p: x if x is not None and x[0] in real else None for p, x in found.items()
        }
    # Beside blocks in stages, what a stage has of its own (downsampling) is outside.
    staged = {x[0] for x in found.values() if x is not None and len(x[1]) > 1}
    return {
        p: None if x is not None and x[0] in staged and len(x[1]) == 1 else x
        for p, x in found.items()
    }


def _numbered(word: str) -> bool:
    m = _BLOCK.fullmatch(word)
    return word.isdigit() or (m is not None and m["number"] is not None)
