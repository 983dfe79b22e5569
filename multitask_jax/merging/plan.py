"""What a merge from disk will do, decided and checked before any weights are read."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from multitask_jax import tree
from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo
from multitask_jax.merging import task_statistics
from multitask_jax.merging.core import (
    NO_FLOAT64_RANKS,
    Method,
    is_float,
    statistics_kind,
)
from multitask_jax.merging.parallel import cores
from multitask_jax.merging.task_statistics import StatisticsFile

CHUNK = 1 << 19  # entries that are computed at once
_LARGE = 1 << 22  # entries of a tensor that is merged whole and alone
# Chunks are padded to one of these, so that few programs are compiled.
BUCKETS = (1 << 12, 1 << 16, 1 << 18, CHUNK)


class Entry(NamedTuple):
    """A tensor that is merged."""

    path: str
    shape: tuple[int, ...]
    size: int
    base: np.dtype
    models: tuple[np.dtype, ...]
    compute: np.dtype  # float32 or float64
    out: np.dtype
    statistics: int = 0  # bytes of all models' statistics of it
    whole: bool = False  # not to be cut into chunks

    @property
    def nbytes(self) -> int:
        """Bytes read in one pass."""
        dtypes = (self.base, *self.models)
        return self.size * sum(np.dtype(d).itemsize for d in dtypes) + self.statistics


class Chunk(NamedTuple):
    """Entries [start, stop) of a tensor."""

    entry: Entry
    start: int
    stop: int


class Pass(NamedTuple):
    """One reading of the inputs: statistics per tensor, then one of these ends.

    Each is (transform, measure). `model` is a statistic over the whole model; a pass
    without one applies the chain and writes.
    """

    tensor: tuple[tuple[int, int], ...]
    model: tuple[int, int] | None


class Plan(NamedTuple):
    """Tensors in file order, and what to say about them."""

    merged: tuple[Entry, ...]
    copied: tuple[TensorInfo, ...]  # from the base, as they are
    outputs: tuple[TensorInfo, ...]
    passes: tuple[Pass, ...]
    notes: tuple[str, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs, read once."""
        return sum(e.nbytes for e in self.merged) + sum(c.nbytes for c in self.copied)

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(t.nbytes for t in self.outputs)


def plan_passes(method: Method) -> tuple[Pass, ...]:
    """Cuts a chain where a whole-model statistic must be known before going on.

    Raises:
      ValueError: ranks over the model of values that need statistics of tensors first:
        their sample would need those of all tensors at once.
    """
    out: list[Pass] = []
    tensor: list[tuple[int, int]] = []
    for i, transform in enumerate(method.transforms):
        for j, measure in enumerate(transform.measures):
            if measure.scope == "tensor":
                tensor.append((i, j))
            elif tensor and measure.kind == "kth":
                raise ValueError(
                    f"transform {i} of the chain ranks magnitudes over the whole model"
                    f" after transform {tensor[0][0]} measured single tensors: such a"
                    " chain is not streamed; choose one scope for both, or merge in"
                    " memory (merging.merge)"
                )
            else:
                out.append(Pass(tuple(tensor), (i, j)))
                tensor = []
    return (*out, Pass(tuple(tensor), None))


def plan_merge(
    method: Method,
    base: Reader,
    models: Sequence[Reader],
    *,
    include: str | None = None,
    exclude: str | None = None,
    dtype: np.dtype | None = None,
    out_dtype: np.dtype | None = None,
    allow_missing: Literal["", "base"] = "",
    statistics: Sequence[StatisticsFile] | None = None,
) -> Plan:
    """Aligns the tensors of base and models by name.

    Args:
      method: the chain.
      base, models: open checkpoints.
      include, exclude: regexes; other tensors are copied from the base.
      dtype: of the computation (float32; float64 for float64 tensors).
      out_dtype: of merged tensors; by default each keeps the base's.
      allow_missing: "base" copies tensors that a model lacks from the base.
      statistics: one open file a model, if the method needs them.

    Raises:
      CheckpointError: names or shapes differ; lists them.
      ValueError: a regex matches nothing.
    """
    task_statistics.check(
        statistics_kind(method),
        {p: info.shape for p, info in base.tensors.items()},
        None if statistics is None else [s.specs for s in statistics],
        len(models),
        names=[str(s.path) for s in statistics or ()],
        aliases=base.aliases,
    )
    paths = list(base.tensors)
    chosen = dict(
        zip(paths, tree.select(paths, include=include, exclude=exclude), strict=True)
    )
    notes: list[str] = []
    lacking = _compare(base, models, chosen, allow_missing, notes)
    ranks = any(m.kind == "kth" for t in method.transforms for m in t.measures)
    merged, copied, outputs = [], [], []
    for path, info in base.tensors.items():
        if not chosen[path] or path in lacking or not is_float(info.dtype):
            copied.append(info)
            outputs.append(info)
            continue
        if not info.size:  # nothing to read or write
            outputs.append(info._replace(dtype=np.dtype(out_dtype or info.dtype)))
            continue
        dtypes = tuple(m.tensors[_stored(m, path)].dtype for m in models)
        integers = [d for d in dtypes if not is_float(d)]
        if integers:
            raise CheckpointError(
                f"{path}: {info.dtype} in the base, {integers[0]} in a model (a"
                " quantised checkpoint?); convert it to floating point first, or"
                " exclude the tensor"
            )
        wide = np.float64 if info.dtype == np.float64 else np.float32
        compute = np.dtype(dtype or wide)
        if ranks and compute == np.float64:
            raise CheckpointError(f"{path}: {NO_FLOAT64_RANKS}")
        out = np.dtype(out_dtype or info.dtype)
        known = sum(s.nbytes(path) for s in statistics or ())
        merged.append(
            Entry(
                path,
                info.shape,
                info.size,
                info.dtype,
                dtypes,
                compute,
                out,
                known,
                # What only statistics make whole is averaged by entries without them.
                whole=any(
                    t.needs == "tensor" and (known or not t.statistics)
                    for t in method.transforms
                ),
            )
        )
        outputs.append(TensorInfo(path, info.shape, out))
    if statistics:
        averaged = [e.path for e in merged if not e.statistics]
        if averaged:
            notes.append(f"No statistics of {_listed(averaged)}: averaged.")
        tied = [p for p in statistics[0].specs if p in base.aliases]
        if tied:
            notes.append(f"Statistics of {_listed(tied)} (tied) are not used.")
    if not merged:
        raise CheckpointError(
            f"{base.path}: no floating point tensor with entries is selected: nothing"
            " to merge"
        )
    return Plan(
        tuple(merged),
        tuple(copied),
        tuple(outputs),
        plan_passes(method),
        tuple(notes),
    )


def _stored(reader: Reader, path: str) -> str:
    return reader.aliases.get(path, path)


def _compare(
    base: Reader,
    models: Sequence[Reader],
    chosen: dict[str, bool],
    allow_missing: str,
    notes: list[str],
) -> set[str]:
    """Paths to copy because a model lacks them; raises where checkpoints differ."""
    lacking: set[str] = set()
    lines: list[str] = []
    for m in models:
        name = m.path.name or str(m.path)
        known = set(m.tensors) | set(m.aliases)
        missing = [p for p, keep in chosen.items() if keep and p not in known]
        extra = [p for p in m.tensors if p not in chosen and p not in base.aliases]
        shapes = [
            f"{p} {m.tensors[_stored(m, p)].shape} for {base.tensors[p].shape}"
            for p, keep in chosen.items()
            if keep
            and p in known
            and m.tensors[_stored(m, p)].shape != base.tensors[p].shape
        ]
        if allow_missing == "base":
            lacking.update(missing)
            if missing:
                notes.append(
                    f"{_listed(missing)} missing in {name}: copied from the base;"
                    " changes of other models to it are left out."
                )
            if extra:
                notes.append(f"{_listed(extra)} only in {name}: left out of the merge.")
        else:
            lines += [f"  missing in {name}: {_listed(missing)}"] if missing else []
            lines += [f"  only in {name}: {_listed(extra)}"] if extra else []
        lines += [f"  shapes in {name}: {_listed(shapes)}"] if shapes else []
        # A head that a model stores apart, but the base ties, would be lost.
        for alias, stored in base.aliases.items():
            if alias in m.tensors and chosen.get(stored) and alias not in m.aliases:
                lines.append(
                    f"  {alias} is tied to {stored} in the base but not in {name}"
                )
    if lines:
        raise CheckpointError(
            f"the checkpoints differ from the base {base.path}:\n"
            + "\n".join(lines)
            + "\nMerge models of one architecture, leave tensors to the base by"
            " exclude=REGEX, or (missing or additional tensors only) pass"
            " allow_missing='base'"
        )
    return lacking


def _listed(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def batches_of(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    """Runs of tensors of at most `size` entries together, or one larger tensor."""
    batch: list[Entry] = []
    held = 0
    for e in entries:
        if batch and held + e.size > size:
            yield batch
            batch, held = [], 0
        batch.append(e)
        held += e.size
    yield batch


def threads_for(method: Method, threads: int) -> int:
    """Of whole tensors no more at a time than there are cores."""
    return min(threads, cores()) if merges_whole(method) else threads


def merges_whole(method: Method) -> bool:
    """Whether it must see whole tensors, some at least."""
    return any(t.needs == "tensor" for t in method.transforms)


def is_large(c: Chunk) -> bool:
    """Whether nothing else is merged meanwhile, where tensors are merged whole."""
    return c.stop - c.start > _LARGE


def peak_memory(
    plan: Plan, readers: Sequence[Reader], threads: int, method: Method
) -> int:
    """Estimate of anonymous memory in bytes, the interpreter and JAX included."""
    models = len(readers) - 1
    rows = any(t.needs == "row" for t in method.transforms)

    def chunk(e: Entry) -> int:
        if e.whole:
            return e.size
        return min(max(CHUNK, e.shape[-1] if rows and e.shape else 1), e.size)

    sizes = sorted(map(chunk, plan.merged))
    if merges_whole(method):
        small = [n for n in sizes if n <= _LARGE]
        at_once = max(sizes[-1], sum(small[-threads:]))
    else:
        at_once = sum(sizes[-threads:])
    chunks = 4 * (models + 1) * at_once * 4
    kept = 3 * models * min(1 << 22, sum(e.size for e in plan.merged)) * 4
    ranked = any(p.tensor or p.model for p in plan.passes)
    # Large stored chunks (Orbax): each reader keeps one, and a thread that goes on to
    # the next holds that encoded and decoded.
    caches = sorted(getattr(r, "cache_bytes", 0) for r in readers)
    held = sum(caches) + 2 * sum(caches[-threads:])
    held += ((24 + 8 * threads) << 20) * any(r.format == "orbax" for r in readers)
    # Statistics, as stored and to compute with: whole Grams, a chunk of a Fisher.
    known = sorted(
        e.statistics if e.whole else min(e.statistics, 4 * models * CHUNK)
        for e in plan.merged
    )
    held += 3 * sum(known[-threads:])
    held += (100 << 20) * any(t.ranks for t in method.transforms)
    names = 4000 * len(plan.outputs)
    return (120 << 20) + chunks + ranked * kept + held + names


def describe(plan: Plan, models: Sequence[Path], memory: int) -> str:
    """The plan in words, for `--dry_run`."""
    d = sum(e.size for e in plan.merged)
    kinds = sorted({str(t.dtype) for t in plan.outputs})
    merged = sum(e.nbytes for e in plan.merged)
    reads = plan.read_bytes + merged * (len(plan.passes) - 1)
    names = ", ".join(_pass_name(p) for p in plan.passes)
    once, total = human(plan.read_bytes), human(reads)
    lines = [
        f"tensors      {len(plan.merged)} merged ({d:,} parameters), {len(plan.copied)}"
        " copied",
        f"models       {len(models)}: {', '.join(p.name for p in models)}",
        f"passes       {len(plan.passes)} ({names})",
        f"read         {once} of inputs, {total} over all passes",
        f"write        {human(plan.write_bytes)} ({', '.join(kinds)})",
        f"peak memory  about {human(memory)}",
    ]
    return "\n".join([*lines, *(f"note         {n}" for n in plan.notes)])


def _pass_name(p: Pass) -> str:
    return "merge and write" if p.model is None else "whole-model statistic"


def human(n: float) -> str:
    """1536 -> "1.5 kB" (powers of 1000)."""
    if n < 1000:
        return f"{n:.0f} B"
    power = min(4, int(math.log10(n) // 3))
    return f"{n / 1000**power:.1f} {' kMGT'[power]}B"
