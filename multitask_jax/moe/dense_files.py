"""Checkpoints of mixtures, read as dense models: one an expert.

Names decide, by a layout of `files`. Only feed-forward tensors are experts'; what all
experts share is the mixture's, once.

Legend: E experts.
"""

import re
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo
from multitask_jax.moe.files import Layout, Part, expert_name, filled
from multitask_jax.moe.upcycling import (
    NO_ROOM,
    Found,
    mlp_leaves,
    renamed,
    shared_beside,
)


class View:
    """A `Reader` of parts of others, under the names that these get."""

    def __init__(
        self,
        like: Reader,
        parts: Mapping[str, tuple[TensorInfo, Part]],
        label: Path | None = None,
    ):
        """`like`: whose path, format and ties it has. `label`: its name in reports."""
        self.path, self.format = like.path, like.format
        self.label = label or like.path
        self.tensors = {name: info for name, (info, _) in parts.items()}
        self.aliases = {k: v for k, v in like.aliases.items() if v in self.tensors}
        self._parts = {name: part for name, (_, part) in parts.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop) of a tensor."""
        part = self._parts[name]
        stop = self.tensors[name].size if stop is None else stop
        return part.reader.read(part.name, part.start + start, part.start + stop)

    def close(self) -> None:
        """Nothing: the readers belong to others."""


class Dense(NamedTuple):
    """A mixture as dense models that differ in their experts alone."""

    # Of each expert its own tensors; without a base, the first has the shared ones too.
    experts: list[View]
    base: View | None  # the base's feed-forward tensors, and the mixture's shared ones
    own: list[str]  # names of the experts' tensors; all others are the mixture's
    gates: list[str]  # names in the mixture; left out


def dense_models(moe: Reader, layout: Layout, base: Reader | None = None) -> Dense:
    """A mixture as dense models, one an expert.

    Args:
      moe: the mixture.
      layout: names.
      base: a dense checkpoint whose names the dense model has, where the layout has
        several. Its feed-forward tensors are those that the layout's pattern matches.

    Raises:
      ValueError: the pattern matches nothing in the base.
      CheckpointError: there are no experts by this layout, or some are missing; a gate
        is missing, or of another number of experts; the layer has a shared expert,
        which a dense one has no room for; or the base has other tensors besides.
    """
    matches = {n: m for n in moe.tensors if (m := _expert(layout).fullmatch(n))}
    gated = any(re.search(r"/gate/\w+$", name) for name in matches)
    known = None
    if base is not None:
        try:
            dense_leaves = mlp_leaves(list(base.tensors), layout.pattern)
        except ValueError as e:
            raise ValueError(f"{base.path}: {e}") from None
        known = {expert_name(layout, f): name for name, f in dense_leaves.items()}
    own: dict[int, dict[str, tuple[TensorInfo, Part]]] = {}
    around: set[str] = set()  # names of gates but for their last word
    for name, m in matches.items():
        info, parts = moe.tensors[name], m.groupdict()
        found = Found(m["block"], m["leaf"], parts.get("between") or "")
        around.add(_stem(filled(layout.gate, found)))
        if known is None:
            name_there = _usual_name(layout, found, gated=gated)
        elif (plain := filled(layout.expert, found)) in known:
            name_there = known[plain]
        else:
            raise CheckpointError(
                f"{base.path}: got none of {moe.path}'s {name} among"
                f" {', '.join(list(known.values())[:3])}, ..., which the pattern"
                f" {layout.pattern!r} matches; give the base that the experts came from"
            )
        if "expert" in parts:
            own.setdefault(int(m["expert"]), {})[name_there] = (
                info._replace(name=name_there),
                Part(moe, name),
            )
            continue
        one = TensorInfo(name_there, info.shape[1:], info.dtype)
        for e in range(info.shape[0]):
            own.setdefault(e, {})[name_there] = one, Part(moe, name, e * one.size)
    names = {frozenset(parts) for parts in own.values()}
    if sorted(own) != list(range(len(own))) or len(names) != 1:
        raise CheckpointError(
            f"{moe.path}: got experts {sorted(own)} of"
            f" {sorted(len(n) for n in names)} tensors by the layout"
            f" {layout.expert!r}; expected 0, 1, ... of the same tensors each"
        )
    rest = [name for name in moe.tensors if name not in matches]
    parents = {re.sub(r"\w+[./]$", "", stem) for stem in around}
    if beside := shared_beside(rest, parents):
        raise CheckpointError(f"{moe.path}: {beside[0]} {NO_ROOM}")
    gates = [name for name in rest if _stem(name) in around]
    _check_gates(moe, layout, gates, around, len(own))
    shared = {n: (moe.tensors[n], Part(moe, n)) for n in rest if n not in gates}
    whole = None
    if base is None:
        own[0] = shared | own[0]
    else:
        whole = View(base, _with_shared(base, moe, shared, set(own[0])))
    experts = [View(moe, own[e], moe.path / f"expert_{e}") for e in sorted(own)]
    return Dense(experts, whole, sorted(names.pop()), gates)


def _check_gates(
    moe: Reader,
    layout: Layout,
    gates: Sequence[str],
    around: Set[str],
    count: int,
) -> None:
    """Refuses gates of another number of experts: some would then be of all tokens.

    A mixture without any gate is taken for one whose experts are chosen by ids.
    """
    for name in gates:
        shape = moe.tensors[name].shape
        width = shape[0 if layout.transposed else -1] if shape else 0
        if width != count:
            raise CheckpointError(
                f"{moe.path}: {name}: got a gate {list(shape)}, expected one of {count}"
                " experts; those that it can't choose serve all tokens: a dense layer"
                " has no room for them beside a merged one"
            )
    lacking = around - {_stem(name) for name in gates}
    if gates and lacking:
        raise CheckpointError(
            f"{moe.path}: got no {sorted(lacking)[0]}..., but {gates[0]}; expected a"
            " gate in each layer of experts, or none where ids choose them"
        )


def _stem(name: str) -> str:
    """Before/after: "l.0.gate.weight" -> "l.0.gate."."""
    return re.sub(r"\w+$", "", name)


def _with_shared(
    base: Reader,
    moe: Reader,
    shared: Mapping[str, tuple[TensorInfo, Part]],
    own: Collection[str],
) -> dict[str, tuple[TensorInfo, Part]]:
    """The base's tensors: `own` as they are there, all others of the mixture."""
    parts, lacking = {}, []
    for name, info in base.tensors.items():
        tied = moe.aliases.get(name)
        if name in own:
            parts[name] = info, Part(base, name)
        elif name in shared:
            parts[name] = shared[name]
        elif tied in shared:
            parts[name] = shared[tied][0]._replace(name=name), Part(moe, tied)
        else:
            lacking.append(name)
    extra = [name for name in shared if name not in base.tensors]
    others = [
        f"{name} {info.shape} for {base.tensors[name].shape}"
        for name, (info, _) in parts.items()
        if info.shape != base.tensors[name].shape
    ]
    if lacking or extra or others:
        raise CheckpointError(
            f"{moe.path}: got other tensors besides experts and gates than in"
            f" {base.path}: {len(lacking)} are missing"
            f" ({', '.join(lacking[:3]) or 'none'}), {len(extra)} are not there"
            f" ({', '.join(extra[:3]) or 'none'}), {len(others)} have another shape"
            f" ({', '.join(others[:3]) or 'none'}); give the base that the experts came"
            " from"
        )
    return parts


def _expert(layout: Layout) -> re.Pattern[str]:
    """What names of experts look like."""
    template = re.escape(layout.expert)
    groups = {"block": ".*", "between": r"[./](?:\w+[./])?", "expert": r"\d+"}
    for group, regex in (groups | {"leaf": ".*"}).items():
        escaped = re.escape("{" + group + "}")
        template = template.replace(escaped, f"(?P<{group}>{regex})")
    return re.compile(template)


def _usual_name(layout: Layout, found: Found, *, gated: bool) -> str:
    """What the dense tensor was called, where no base tells it."""
    # A stack of experts with a gate of their own: SwiGLU, in a module named mlp.
    if gated:
        return filled(layout.dense[-1], found)
    back = {there: here for here, there in layout.rename.items()}
    return filled(layout.dense[0], found._replace(leaf=renamed(found.leaf, back)))
