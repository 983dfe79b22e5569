"""How much task vectors get in each other's way, per task and per depth.

TIES names two kinds of interference: redundant parameters, which change little and can
be trimmed, and sign conflicts, where models pull an entry in opposite directions.

Legend: T models. Sums are kept per leaf and added up over a depth or the whole model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from multitask_jax import tree
from multitask_jax.merging.selection import kth_largest

# Beyond these, warn. Independent task vectors disagree about half of the signs and
# still merge well while they are small beside the base; it takes both to lose.
_FAR, _CONFLICT, _OPPOSED, _UNRELATED = 0.25, 0.25, 0.2, 0.2


@dataclasses.dataclass
class LeafStatistics:
    """Additive sums over a leaf; all arrays are float64.

    `gram` and `size` are about every entry. The rest is about `counted` entries: all of
    them, or those of a sample.
    """

    size: int
    gram: np.ndarray  # (T + 1, T + 1) inner products of tau_1..tau_T and theta_0
    counted: float
    kept: np.ndarray  # (T,) entries left after trimming
    mass: np.ndarray  # (T,) sum tau_t^2
    kept_mass: np.ndarray  # (T,) sum tau_t^2 where kept
    contested: float  # entries that two or more models keep
    conflicts: float  # of these, entries with both signs

    @classmethod
    def zeros(cls, models: int) -> "LeafStatistics":
        """Sums over nothing."""
        zeros = [np.zeros(models) for _ in range(3)]
        return cls(0, np.zeros((models + 1, models + 1)), 0.0, *zeros, 0.0, 0.0)


@np.errstate(invalid="ignore")
def add(parts: Sequence[LeafStatistics]) -> LeafStatistics:
    """Sums over all leaves of a part of the model."""
    zeros = LeafStatistics.zeros(len(parts[0].gram) - 1)
    totals = {
        field.name: sum(
            (getattr(part, field.name) for part in parts), getattr(zeros, field.name)
        )
        for field in dataclasses.fields(LeafStatistics)
    }
    return LeafStatistics(**totals)


def count_signs(kept: Sequence[np.ndarray]) -> tuple[float, float]:
    """(contested, conflicts): entries kept by two or more models; with both signs."""
    positive = sum((x > 0).astype(np.int32) for x in kept)
    negative = sum((x < 0).astype(np.int32) for x in kept)
    contested = np.count_nonzero(positive + negative >= 2)
    return float(contested), float(np.count_nonzero((positive > 0) & (negative > 0)))


def leaf_statistics(
    base: np.ndarray, deltas: Sequence[np.ndarray], thresholds: Sequence[float]
) -> LeafStatistics:
    """Statistics of a leaf in memory, trimmed where |tau_t| < thresholds[t]."""
    flat = [x.reshape(-1).astype(np.float64) for x in deltas]
    pairs = zip(flat, thresholds, strict=True)
    kept = [np.where(np.abs(x) >= t, x, 0) for x, t in pairs]
    vectors = np.stack([*flat, base.reshape(-1).astype(np.float64)])
    return LeafStatistics(
        base.size,
        vectors @ vectors.T,
        float(base.size),
        np.array([np.count_nonzero(x) for x in kept], np.float64),
        np.array([x @ x for x in flat]),
        np.array([x @ x for x in kept]),
        *count_signs(kept),
    )


@dataclasses.dataclass(frozen=True)
class Interference:
    """What a report shows of a group of leaves (a depth, or the whole model)."""

    size: int
    cosines: np.ndarray  # (T, T) between task vectors; nan where one is zero
    norms: np.ndarray  # (T,) |tau_t|
    relative_norms: np.ndarray  # (T,) |tau_t| / |theta_0|
    base_cosines: np.ndarray  # (T,) cosine of theta_t and theta_0
    redundant: np.ndarray  # (T,) share of parameters that trimming removes
    trimmed_mass: np.ndarray  # (T,) share of sum tau_t^2 that goes with them
    conflict_rate: float  # conflicts / contested


def _ratio(a: Any, b: Any) -> Any:
    """a / b, nan where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


@np.errstate(invalid="ignore", over="ignore")  # values may be infinite, if allowed
def summarise(s: LeafStatistics) -> Interference:
    """Sums -> shares, norms and cosines."""
    tau = s.gram[:-1, :-1]
    to_base, base = s.gram[:-1, -1], s.gram[-1, -1]
    norms = np.sqrt(np.maximum(np.diag(tau), 0))
    # |theta_t|^2 and <theta_t, theta_0> for theta_t = theta_0 + tau_t
    squares = np.maximum(base + 2 * to_base + np.diag(tau), 0)
    return Interference(
        s.size,
        np.clip(_ratio(tau, np.outer(norms, norms)), -1, 1),
        norms,
        _ratio(norms, np.sqrt(base)),
        np.clip(_ratio(base + to_base, np.sqrt(base * squares)), -1, 1),
        1 - _ratio(s.kept, s.counted),
        1 - _ratio(s.kept_mass, s.mass),
        float(_ratio(s.conflicts, s.contested)),
    )


def by_depth(
    leaves: Mapping[str, LeafStatistics],
    paths: Sequence[str] = (),
    block_pattern: str | None = None,
) -> dict[str, Interference]:
    """One row a block, in order, then one for what lies outside the blocks.

    Args:
      leaves: statistics by path.
      paths: all paths of the model, if `leaves` is a part of it.
      block_pattern: as in `tree.block_depths`. A model whose blocks can't be told has a
        single row.
    """
    try:
        depths = tree.block_depths(
            list(paths) or list(leaves), block_pattern=block_pattern
        )
    except ValueError:
        if block_pattern is not None:
            raise
        depths = dict.fromkeys(leaves)
    groups: dict[tuple[str, int], list[LeafStatistics]] = {}
    for path, statistics in leaves.items():
        depth = depths.get(path)
        place = ("", -1) if depth is None else (depth.stack, depth.index)
        groups.setdefault(place, []).append(statistics)
    stacks = {stack for stack, _ in groups if stack}
    out = {}
    for stack, index in sorted(groups, key=lambda g: (g[0] == "", g)):
        prefix = f"{stack.rstrip('_./')} " if len(stacks) > 1 else "block "
        label = f"{prefix}{index}" if stack else "outside blocks"
        out[label] = summarise(add(groups[stack, index]))
    return out


def warnings_in_words(
    total: Interference,
    names: Sequence[str],
    same_paths: Sequence[int] = (),
    *,
    base_is_first: bool = False,
) -> list[str]:
    """What a reader should know before using the merge.

    Args:
      total: of the whole model.
      names: of the models.
      same_paths: indices of models given more than once.
      base_is_first: there is no base; the first model stands for it.
    """
    out = []
    count = len(names)
    for t in same_paths:
        out.append(f"{names[t]} is given more than once: its changes count repeatedly.")
    for t in range(count):
        if base_is_first and t == 0:
            continue
        if total.norms[t] == 0:
            out.append(f"{names[t]} equals the base: it adds nothing to the merge.")
        elif abs(total.base_cosines[t]) < _UNRELATED:
            out.append(
                f"{names[t]} and the base look unrelated (cosine of parameters"
                f" {total.base_cosines[t]:.2f}): no shared base? Merging needs models"
                " that were fine-tuned from this very base."
            )
    for i in range(count):
        for j in range(i + 1, count):
            if total.cosines[i, j] > 0.9999 and j not in same_paths:
                out.append(f"{names[i]} and {names[j]} make the same changes.")
            elif total.cosines[i, j] < -_OPPOSED:
                out.append(
                    f"{names[i]} and {names[j]} undo each other: cosine of task vectors"
                    f" {total.cosines[i, j]:.2f}."
                )
    out += _norm_warnings(total, names)
    relative = np.where(np.isfinite(total.relative_norms), total.relative_norms, 0)
    far = [names[t] for t in range(count) if relative[t] > _FAR]
    if far and total.conflict_rate > _CONFLICT:
        out.append(
            f"Heavy interference: {', '.join(far)} moved far from the base (norm of the"
            f" task vector up to {relative.max():.2f} of the base's) and models"
            f" disagree about the sign of {total.conflict_rate:.0%} of the entries that"
            " two or more of them keep. Expect the merge to lose much: try a smaller"
            " scale, fewer models or a lower density, and evaluate it."
        )
    return out


def _norm_warnings(total: Interference, names: Sequence[str]) -> list[str]:
    changed = total.norms[total.norms > 0]
    if len(names) < 2 or len(changed) < 2:
        return []
    middle = float(np.median(changed))
    return [
        f"{names[t]}'s task vector is out of line: norm {norm:.3g}, median"
        f" {middle:.3g}; it {'dominates' if norm > middle else 'hardly counts in'} the"
        " merge. Weights can balance them."
        for t, norm in enumerate(total.norms)
        if norm > 0 and not 1 / 3 <= norm / middle <= 3
    ]


def analyse(
    base: Any, models: Sequence[Any], *, density: float = 0.2
) -> tuple[Interference, dict[str, Interference]]:
    """Interference of pytrees, trimmed over the whole model: (total, by depth).

    Args:
      base: theta_0, a pytree of arrays.
      models: T pytrees of the same structure.
      density: share of parameters that trimming keeps.
    """
    bases = {p: np.asarray(x) for p, x in tree.flatten(base).items()}
    bases = {p: x for p, x in bases.items() if x.dtype.kind in "fV"}
    deltas = {p: [] for p in bases}
    for m in models:
        leaves = tree.flatten(m)
        for p, x in bases.items():
            delta = np.asarray(leaves[p], np.float32) - x.astype(np.float32)
            deltas[p].append(delta)
    d = sum(x.size for x in bases.values())
    k = min(d, int(d * density) + 1)
    thresholds = [
        float(kth_largest([x[t] for x in deltas.values()], k))
        for t in range(len(models))
    ]
    leaves = {p: leaf_statistics(x, deltas[p], thresholds) for p, x in bases.items()}
    return summarise(add(list(leaves.values()))), by_depth(leaves)
