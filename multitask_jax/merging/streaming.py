"""The chain, streamed: a few chunks of a few tensors in memory, whatever the model.

The same `Transform`s as in memory, jitted once per chunk size. What is about bits
rather than arithmetic (thresholds, checks for NaN) is done by NumPy on the host.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from multitask_jax.checkpoints import CheckpointError, Reader, Writer
from multitask_jax.merging import core, statistics
from multitask_jax.merging.census import Census
from multitask_jax.merging.checks import check_fits, refuse_nonfinite
from multitask_jax.merging.chunk_program import (
    as_scalar,
    compute_chunk,
    for_jax,
    from_jax,
    pad,
    to_compute,
)
from multitask_jax.merging.journal import Past
from multitask_jax.merging.parallel import large_alone, parallel
from multitask_jax.merging.plan import (
    BUCKETS,
    CHUNK,
    Chunk,
    Entry,
    Pass,
    Plan,
    batches_of,
    is_large,
    merges_whole,
)
from multitask_jax.merging.processes import ALONE, Group
from multitask_jax.merging.selection import (
    INFINITE,
    Bracket,
    Selection,
    bracket,
    keys_of,
    row_ranks,
)
from multitask_jax.merging.task_statistics import StatisticsFile
from multitask_jax.merging.totals import KthTotal, SumTotal

_SMALL = 1 << 20  # tensors up to this size keep all keys; larger ones sample a bracket
# Entries (of all models) whose own statistics are gathered at a time: more where sums
# are all that is kept of them, since threads wait for each other between batches.
_BATCH, _BATCH_OF_SUMS = 3 << 23, 3 << 25
_SLICES, _SLICE = 4096, 256  # a sample of the whole model: slices of neighbours


class Seen(NamedTuple):
    """A chunk's entries: stored ones of base and models, and task vectors if needed."""

    arrays: list[np.ndarray]
    deltas: list[np.ndarray] | None


class Stream:
    """One merge on its way from readers to a writer."""

    def __init__(
        self,
        method: core.Method,
        plan: Plan,
        readers: Sequence[Reader],
        weights: Sequence[float] | Mapping[str, Sequence[float]],
        *,
        programs: Callable[[Any], Any] | None = None,
        statistics: Sequence[StatisticsFile] = (),
        census: Census | None = None,
        allow_nonfinite: bool = False,
        advance: Callable[[int], None] = lambda nbytes: None,
        threads: int = 2,
        group: Group = ALONE,
        share: Plan | None = None,
        past: Past | None = None,
    ):
        """`readers`: the base, then the models. `advance` hears of bytes read.

        `share`: of the plan, what this process of the group does; all by default.

        `weights`: T, or T by leaf path. `programs`: of a stream whose method differs in
        ranks alone, so that nothing is compiled again.
        """
        self.method, self.plan, self.readers = method, plan, tuple(readers)
        self.statistics = tuple(statistics)
        self.weights = weights
        self.census, self.advance, self.threads = census, advance, threads
        self._group, self._share = group, share or plan
        self._check = not allow_nonfinite
        self._rows = any(t.needs == "row" for t in method.transforms)
        self._whole = merges_whole(method)
        self._past = past or Past()
        self._unseen = self._past.unseen(self._share.merged)
        paths = [t.name for t in plan.outputs]
        self._settings = core.settings_of(method, paths)
        # Statistics known so far: of the whole model, and of the tensors at hand.
        self._model: dict[tuple[int, int], Any] = dict(self._past.model)
        self._tensor: dict[tuple[str, int, int], Any] = dict(self._past.tensor)
        # Of the chunks of a batch, where there are batches.
        self._ranks: dict[tuple[str, int, int], tuple[np.ndarray, ...]] = {}
        self._batched = False
        count = census is not None and census.exact
        self.programs = programs or functools.cache(
            lambda stage: jax.jit(
                functools.partial(compute_chunk, method, stage, count),
                static_argnames=("compute", "out", "check"),
            )
        )

    def run(self, writer: Writer) -> list[str]:
        """All passes; returns notes on tensors that were copied."""
        if self.census is not None and not self.census.exact and not self._group.index:
            # Of entries, also where the method must see whole tensors or rows.
            sample = self._sample(self.plan.merged, _SLICES, rows=False)
            self.census.sampled(
                [(c.entry.path, self._deltas(c, self._read(c))[1:]) for c in sample]
            )
        if self.census is not None:
            self._past.restore(self.census, self._share.merged)
        for p in self.plan.passes:
            left = self._past.left(p, self._share.merged, self.advance)
            if p.model is None:
                self._over_batches(p, left, functools.partial(self._write, writer))
                continue
            if p.model in self._model:
                continue
            total, unseen = self._total(*p.model, self.plan.merged), set(self._unseen)
            while p.model not in self._model:  # again where a bracket missed
                self._over_batches(p, left, lambda c, total=total: total.add(c))
                result = total.result(self._group)
                if result is not None:
                    self._model[p.model] = result
            self._past.found(p, self._model[p.model], self._tensor, unseen)
        said = [] if self._group.index else self._said()
        return [*said, *self._copy(writer)]

    def _said(self) -> list[str]:
        """What whole-model statistics tell the user."""
        models = len(self.readers) - 1
        measures = {k: self.method.transforms[k[0]].measures[k[1]] for k in self._model}
        return [m.says(self._model[k], models) for k, m in measures.items() if m.says]

    def _over_batches(
        self, p: Pass, entries: Sequence[Entry], work: Callable[[Chunk], None]
    ) -> None:
        """One reading: statistics of a few tensors, then `work` on their chunks."""
        models = len(self.readers) - 1
        measures = [self.method.transforms[i].measures[j] for i, j in p.tensor]
        kept = self._ranked() or any(m.kind == "kth" for m in measures)
        size = (_BATCH if kept else _BATCH_OF_SUMS) // models
        batches = batches_of(entries, size) if p.tensor else [entries]
        self._batched = bool(p.tensor)
        for batch in batches:
            for i, j in p.tensor:
                self._tensor_statistic(batch, i, j)
            self._sweep(work, batch)
            self._ranks.clear()

    def _sweep(self, work: Callable[[Chunk], None], entries: Sequence[Entry]) -> None:
        whole = functools.partial(large_alone, large=is_large)
        (whole if self._whole else parallel)(work, self._chunks(entries), self.threads)
        self._unseen.difference_update(e.path for e in entries)

    def _tensor_statistic(self, batch: Sequence[Entry], i: int, j: int) -> None:
        totals = {e.path: self._total(i, j, [e]) for e in batch if e.size}
        left = [e for e in batch if e.size]
        while left:
            self._sweep(lambda c: totals[c.entry.path].add(c), left)
            results = {e.path: totals[e.path].result() for e in left}
            self._tensor |= {
                (path, i, j): r for path, r in results.items() if r is not None
            }
            left = [e for e in left if results[e.path] is None]

    def _total(self, i: int, j: int, entries: Sequence[Entry]) -> "SumTotal | KthTotal":
        """What adds up measure j of transform i over chunks of these tensors."""
        measure = self.method.transforms[i].measures[j]
        if measure.kind != "kth":
            dtype = max(e.compute for e in entries)
            return SumTotal(lambda c: self._reduced(c, i, j), measure.kind, dtype)
        d = sum(e.size for e in entries)
        first = entries[0]
        unit = self._columns(first)
        some = min(first.size, -(-BUCKETS[0] // unit) * unit)
        terms = len(self._keys(Chunk(first, 0, some), i, j))
        earlier = self._known(first.path, i)[:j]
        ranks = [_integer(k) for k in core.ranks_of(measure, d, terms, earlier)]
        starts: list[Any] = [None] * len(ranks)
        if d > _SMALL:
            if self._group.index and measure.scope == "model":
                sample = None  # process 0 takes it for all
            else:
                count = _SLICES if len(entries) > 1 else _SLICES // 32
                sample = [self._keys(c, i, j) for c in self._sample(entries, count)]
            starts = [  # no sample of tiny tensors: a bracket that is missed
                bracket(np.stack([s[t % terms][:_SLICE] for s in sample]), k / d)
                if sample
                else Bracket()
                for t, k in enumerate(ranks)
            ]
            if measure.scope == "model":
                starts = self._group.combine(starts, lambda starts: starts[0])
                starts = [Bracket(*start) for start in starts]
        selections = [Selection(k, s) for k, s in zip(ranks, starts, strict=True)]
        return KthTotal(selections, lambda c: self._keys(c, i, j, look=True))

    # -- one chunk -------------------------------------------------------------------

    def _columns(self, e: Entry) -> int:
        """What is not cut: entries, rows (a vector counts as one) or tensors."""
        if e.whole:
            return e.size
        return e.shape[-1] if self._rows and e.shape else 1

    def _chunks(self, entries: Iterable[Entry]) -> Iterator[Chunk]:
        for e in entries:
            columns = self._columns(e)
            step = max(1, CHUNK // columns) * columns
            for start in range(0, e.size, step):
                yield Chunk(e, start, min(start + step, e.size))

    def _sample(
        self, entries: Sequence[Entry], count: int, *, rows: bool = True
    ) -> list[Chunk]:
        """`count` slices at evenly spaced places; all of a small model."""
        d = sum(e.size for e in entries)
        if d <= _SMALL:
            return list(self._chunks(entries))
        before, out = 0, []
        jitter = np.random.default_rng(0).random(count)
        places = ((np.arange(count) + jitter) * (d / count)).astype(np.int64)
        for e in entries:
            # Whole rows where rows are needed.
            columns = self._columns(e) if rows else 1
            length = -(-_SLICE // columns) * columns
            for place in places[(places >= before) & (places < before + e.size)]:
                start = min(int(place) - before, e.size - length)
                if start >= 0:
                    start -= start % columns
                    out.append(Chunk(e, start, start + length))
            before += e.size
        return out

    def _read(self, c: Chunk) -> list[np.ndarray]:
        return [r.read(c.entry.path, c.start, c.stop) for r in self.readers]

    def _deltas(self, c: Chunk, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The base and task vectors, in the dtype of the computation."""
        base, *models = [to_compute(x, c.entry.compute) for x in arrays]
        with np.errstate(over="ignore", invalid="ignore"):  # checked elsewhere
            # In place where the model was converted, so that nothing leaves the cache.
            return [base] + [
                np.subtract(m, base, out=None if m.dtype == x.dtype else m)
                for m, x in zip(models, arrays[1:], strict=True)
            ]

    def _visit(self, c: Chunk, *, deltas: bool = False) -> Seen:
        """Reads a chunk; the first sight of it goes into the census."""
        arrays = self._read(c)
        self.advance(sum(x.nbytes for x in arrays))
        look = self.census is not None and c.entry.path in self._unseen
        if not (look or deltas):
            return Seen(arrays, None)
        base, *taus = self._deltas(c, arrays)
        if look:
            assert self.census is not None
            squares = self.census.products(c.entry.path, base, taus)
            if self._check and not np.isfinite(squares).all():
                refuse_nonfinite(self.readers, c, arrays)
        return Seen(arrays, taus)

    def _keys(self, c: Chunk, i: int, j: int, look: bool = False) -> list[np.ndarray]:
        """Keys of the arrays that measure j of transform i ranks."""
        m = self.method.transforms[i].measures[j]
        on_host = (
            i == 0
            and m.values is core.unchanged
            and self.method.start == "task_vectors"
        )
        seen = self._visit(c, deltas=on_host) if look else Seen(self._read(c), None)
        if on_host:
            taus = seen.deltas or self._deltas(c, seen.arrays)[1:]
            keys = [keys_of(x, overwrite=True) for x in taus]
            unchecked = look and self._check and self.census is None
            if unchecked and max(int(k.max()) for k in keys) >= INFINITE:
                refuse_nonfinite(self.readers, c, seen.arrays)
            return keys
        outs = self._run(("values", i, j), c, seen.arrays, look)
        return [keys_of(np.asarray(x).reshape(-1)[: c.stop - c.start]) for x in outs]

    def _reduced(self, c: Chunk, i: int, j: int) -> tuple[Any, ...]:
        return self._run(("reduce", i, j), c, self._visit(c).arrays, True)

    def _write(self, writer: Writer, c: Chunk) -> None:
        size = c.stop - c.start
        theta, counted = self._run(("apply", 0, 0), c, self._visit(c).arrays, True)
        with np.errstate(over="ignore"):
            flat = np.asarray(theta).reshape(-1)[:size].astype(c.entry.out, copy=False)
        if self._check:
            check_fits(c.entry, flat)
        if self._check and self.statistics and not np.isfinite(flat).all():
            raise CheckpointError(
                f"{c.entry.path}: the merged values are not finite; statistics and"
                " weights must not be negative"
            )
        if counted is not None and self.census is not None:
            self.census.trimmed(c.entry.path, size, *counted)
        # Last: what is all written is all in the census too.
        writer.write(c.entry.path, c.start, flat)

    def _run(
        self, stage: Any, c: Chunk, arrays: Sequence[np.ndarray], look: bool
    ) -> Any:
        """A program on a padded chunk; refuses NaN and infinity at the first look."""
        path, size = c.entry.path, c.stop - c.start
        if c.entry.whole:
            shape: tuple[int, ...] = c.entry.shape
        elif self._rows:
            columns = self._columns(c.entry)
            rows = min(max(1, CHUNK // columns), c.entry.size // columns)
            shape = (rows, columns)
        else:
            shape = (next(b for b in BUCKETS if b >= size),)
        stats = [self._known(path, i) for i in range(len(self.method.transforms))]
        check = look and self._check and self.census is None and path in self._unseen
        scalar = functools.partial(as_scalar, c.entry.compute)
        by_path = isinstance(self.weights, Mapping)
        weights = self.weights[path] if by_path else self.weights
        with jax.enable_x64(c.entry.compute == np.float64):
            out, bad = self.programs(stage)(
                tuple(pad(for_jax(x), shape) for x in arrays),
                tuple(scalar(float(w)) for w in weights),
                [jax.tree.map(scalar, s.get(path, ())) for s in self._settings],
                stats,
                (np.uint32(c.start >> 32), np.uint32(c.start & 0xFFFFFFFF)),
                scalar(float(c.entry.size)),
                self._statistics(c, shape),
                self._row_ranks(c, arrays, shape),
                compute=c.entry.compute.name,
                out=from_jax(c.entry).name,
                check=check,
            )
        if check and bad:
            refuse_nonfinite(self.readers, c, arrays)
        return out

    def _statistics(self, c: Chunk, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """What the models' data say of a chunk, padded as the parameters are."""
        files = [s for s in self.statistics if c.entry.path in s.specs]
        self.advance(sum(s.nbytes(c.entry.path) for s in files) * (c.start == 0))
        return tuple(
            s.read(c.entry.path, c.start, c.stop, lambda x: pad(x, shape))
            for s in files
        )

    def _ranked(self) -> bool:
        first = self.method.transforms[:1]
        return self.method.start == "task_vectors" and any(t.ranks for t in first)

    def _row_ranks(
        self, c: Chunk, arrays: Sequence[np.ndarray], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, ...]:
        """Places of task vectors in their rows, if the method starts with them.

        Kept from what measures a tensor to what writes it: sorting is most of the time.
        """
        if not self._ranked():
            return ()
        ranks = self._ranks.get((c.entry.path, c.start, c.stop))
        if ranks is None:
            taus = self._deltas(c, arrays)[1:]
            ranks = tuple(row_ranks(x.reshape(-1, shape[-1])) for x in taus)
        if self._batched:
            self._ranks[c.entry.path, c.start, c.stop] = ranks
        return tuple(pad(x.reshape(-1), shape) for x in ranks)

    def _known(self, path: str, i: int) -> tuple[Any, ...]:
        """Statistics of transform i so far; None is unknown yet."""
        return tuple(
            self._model.get((i, j), self._tensor.get((path, i, j)))
            for j in range(len(self.method.transforms[i].measures))
        )

    def _copy(self, writer: Writer) -> list[str]:
        """Tensors that come from the base; tells where the models' integers differ."""
        notes = []
        base, *models = self.readers
        for info in self._share.copied:
            if info.name in self._past.written:
                self.advance(info.nbytes)
                continue
            differ = set()
            for start in range(0, info.size, CHUNK):
                stop = min(start + CHUNK, info.size)
                flat = base.read(info.name, start, stop)
                writer.write(info.name, start, flat)
                self.advance(flat.nbytes)
                if core.is_float(info.dtype):
                    continue
                for m in models:
                    other = m.tensors.get(m.aliases.get(info.name, info.name))
                    if other is None or other.shape != info.shape:
                        continue
                    if not np.array_equal(m.read(info.name, start, stop), flat):
                        differ.add(m.path.name)
            if differ:
                notes.append(
                    f"{info.name} ({info.dtype}) differs in {', '.join(sorted(differ))}"
                    ": integers are not merged, the base's are kept."
                )
        return notes


def _integer(k: Any) -> int:
    return k if isinstance(k, int) else (int(k[0]) << statistics.BITS) | int(k[1])
