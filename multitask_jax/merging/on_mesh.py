"""A merge on a mesh of devices: parameters are born sharded, and written from shards.

Stacks of tensors go over the mesh one after another, so that the memory of a device is
that of two of them. Methods with a statistic over the whole model (TIES, LiNeS by norm)
keep base and models on the mesh instead: they are read once, and no statistic takes
another pass over the disk.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from multitask_jax.checkpoints import Reader, Writer
from multitask_jax.merging import core, interference, mesh_programs
from multitask_jax.merging.census import Census
from multitask_jax.merging.checks import check_fits, refuse_nonfinite
from multitask_jax.merging.mesh_programs import Inputs, Stack
from multitask_jax.merging.parallel import parallel
from multitask_jax.merging.plan import Chunk, Entry, Pass, Plan
from multitask_jax.merging.streaming import Stream
from multitask_jax.sharding import Rules

MOST = 64 << 20  # bytes of a stack's inputs a device, where stacks come and go


def as_mesh_plan(method: core.Method, plan: Plan, mesh: Mesh) -> Plan:
    """What is read once, whatever the method measures.

    Raises:
      ValueError: the method needs statistics of data, or a tensor float64; devices of
        other processes.
    """
    if any(d.process_index != jax.process_index() for d in mesh.devices.flat):
        raise ValueError(
            "the mesh has devices of other processes, which a merge can't write from;"
            " make it of jax.local_devices()"
        )
    kind = core.statistics_kind(method)
    if kind is not None:
        raise ValueError(
            f"a method with statistics of each model's data ({kind}) does not run on a"
            " mesh; merge without one"
        )
    for e in plan.merged:
        if e.compute == np.float64:
            raise ValueError(
                f"{e.path}: float64 is not computed on a mesh (most accelerators lack"
                " it); pass dtype='float32', or merge without a mesh"
            )
    return plan._replace(passes=(Pass((), None),))


def stacks_of(
    method: core.Method, plan: Plan, mesh: Mesh, rules: Rules | None
) -> list[Stack]:
    """The stacks of a merge: whole if all stay on the mesh, else of bounded size."""
    stay = bool(mesh_programs.model_measures(method))
    return mesh_programs.stack_up(plan, mesh, rules, None if stay else MOST)


class OnMesh:
    """One merge on its way from readers over a mesh to a writer; as `Stream`."""

    def __init__(
        self,
        method: core.Method,
        plan: Plan,
        readers: Sequence[Reader],
        weights: Sequence[float],
        *,
        mesh: Mesh,
        rules: Rules | None = None,
        programs: Callable[..., Any] | None = None,
        statistics: Sequence[Any] = (),
        census: Census | None = None,
        allow_nonfinite: bool = False,
        advance: Callable[[int], None] = lambda nbytes: None,
        threads: int = 2,
        past: Any = None,
    ):
        """`readers`: the base, then the models. `advance` hears of bytes read.

        `past` is that of a merge that begins: none is gone on with on a mesh.

        Raises:
          ValueError: a tensor that no sharding rule matches, or that can't be cut so.
        """
        assert not statistics  # `as_mesh_plan` refuses them
        self.method, self.plan, self.readers, self.mesh = method, plan, readers, mesh
        self.census, self.advance, self.threads = census, advance, threads
        self._check = not allow_nonfinite
        self._weights = tuple(map(np.float32, weights))
        self._settings = core.settings_of(method, [t.name for t in plan.outputs])
        self._stacks = stacks_of(method, plan, mesh, rules)
        self.programs = programs or functools.cache(lambda make, *of: make(*of))

    def run(self, writer: Writer) -> list[str]:
        """Reads, merges and writes; returns notes on tensors that were copied."""
        # A stream without passes: a sample for the census, tensors that are copied.
        rest = self.plan._replace(passes=())
        notes = Stream(
            self.method,
            rest,
            self.readers,
            self._weights,
            census=self.census,
            advance=self.advance,
            threads=self.threads,
        ).run(writer)
        # Devices merge a stack while the one before is written.
        merging: tuple[Stack, jax.Array] | None = None
        for stack, merged in self._merged():
            if merging is not None:
                self._write(writer, *merging)
            merging = stack, merged
        assert merging is not None  # a plan merges at least one tensor
        self._write(writer, *merging)
        return notes

    def _merged(self) -> Iterator[tuple[Stack, jax.Array]]:
        held: dict[int, Inputs] = {}
        known: dict[tuple[int, int], Any] = {}
        if measures := mesh_programs.model_measures(self.method):
            held = {k: self._load(s) for k, s in enumerate(self._stacks)}
            kinds = tuple(s.kind for s in self._stacks)
            for i, j in measures:
                measure = self.programs(
                    mesh_programs.statistic_program, self.method, self.mesh, kinds, i, j
                )
                known[i, j] = measure([*held.values()], self._weights, known)
        for k, stack in enumerate(self._stacks):
            inputs = held.pop(k) if held else self._load(stack)
            arguments = (*inputs, self._weights, known)
            if self.census is not None:
                self._take_census(stack, arguments)
            merge = self.programs(
                mesh_programs.merge_program, self.method, self.mesh, stack.kind
            )
            merged = merge(*arguments)
            del inputs, arguments  # models go as soon as they are merged
            yield stack, merged

    def _load(self, stack: Stack) -> Inputs:
        """Base and models of a stack on the mesh; refuses NaN and infinity."""
        names = [e.path for e in stack.entries]
        placed = stack.sharding(self.mesh)

        def load(reader: Reader, dtype: np.dtype) -> jax.Array:
            carried = mesh_programs.carried(dtype)
            return born_sharded(reader, names, placed, dtype, carried)

        with ThreadPoolExecutor(self.threads) as pool:
            base, *models = pool.map(load, self.readers, stack.kind.dtypes)
        inputs = Inputs(base, tuple(models), settings_of(stack, self._settings))
        if self._check:
            flags = self.programs(
                mesh_programs.nonfinite_program, self.mesh, stack.kind
            )
            self._refuse(stack, flags(base, inputs.models))
        self.advance(sum(e.nbytes for e in stack.entries))
        return inputs

    def _refuse(self, stack: Stack, flags: jax.Array) -> None:
        bad = np.zeros(len(stack.entries), bool)
        for shard in flags.addressable_shards:
            bad |= np.asarray(shard.data).reshape(-1)
        for k in np.flatnonzero(bad):
            e = stack.entries[k]
            arrays = [r.read(e.path) for r in self.readers]
            refuse_nonfinite(self.readers, Chunk(e, 0, e.size), arrays)

    def _take_census(self, stack: Stack, arguments: Sequence[Any]) -> None:
        assert self.census is not None
        program = self.programs(
            mesh_programs.census_program, self.method, stack.kind, self.census.exact
        )
        sums = jax.device_get(program(*arguments))
        for k, e in enumerate(stack.entries):
            found = leaf_statistics(e, jax.tree.map(lambda x, k=k: x[k], sums))
            sampled = self.census.leaves.get(e.path)
            parts = [found] if sampled is None else [found, sampled]
            self.census.leaves[e.path] = interference.add(parts)

    def _write(self, writer: Writer, stack: Stack, merged: jax.Array) -> None:
        """Puts each tensor together on the host; no device ever has all of it."""
        simulated = self.mesh.devices.flat[0].platform == "cpu"
        shards = [
            # A simulated device's memory is the host's; from others parts of one
            # tensor come at a time.
            (s.index[1:], np.asarray(s.data) if simulated else s.data)
            for s in merged.addressable_shards
            if s.replica_id == 0
        ]

        def write(k: int) -> None:
            e = stack.entries[k]
            whole = np.empty(e.shape, stack.kind.out)
            for box, data in shards:
                whole[box] = np.asarray(data[k]).view(stack.kind.out)
            with np.errstate(over="ignore"):
                flat = whole.reshape(-1).astype(e.out, copy=False)
            if self._check:
                check_fits(e, flat)
            writer.write(e.path, 0, flat)

        parallel(write, range(len(stack.entries)), self.threads)


def settings_of(stack: Stack, settings: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Each transform's scalars of a stack's tensors, as (L,) arrays."""

    def column(*xs: Any) -> np.ndarray:
        return np.asarray(xs, np.uint32 if isinstance(xs[0], int) else np.float32)

    paths = [e.path for e in stack.entries]
    return [jax.tree.map(column, *(s.get(p, ()) for p in paths)) for s in settings]


def born_sharded(
    reader: Reader,
    names: Sequence[str],
    placed: NamedSharding,
    dtype: np.dtype,
    carried: np.dtype | None = None,
) -> jax.Array:
    """Tensors of one shape from a checkpoint, stacked, each device reading its part.

    Args:
      reader: an open checkpoint.
      names: L tensors of one shape.
      placed: of the stack; its first axis is not cut.
      dtype: to convert to, on the host.
      carried: to view it as then.

    Returns:
      (L, *shape), of which neither a device nor the host ever holds more than a part.
    """
    info = reader.tensors[reader.aliases.get(names[0], names[0])]
    shape = (len(names), *info.shape)
    boxes: dict[Any, list[Any]] = {}  # what several devices hold is read once
    for device, box in placed.addressable_devices_indices_map(shape).items():
        ranges = tuple(s.indices(n)[:2] for s, n in zip(box, shape, strict=True))
        boxes.setdefault(ranges, []).append(device)
    # Where chunks are large, all parts of a tensor while its chunk is decoded.
    together = bool(getattr(reader, "cache_bytes", 0))
    arrays = {}
    for group in [list(boxes)] if together else [[b] for b in boxes]:
        parts = [np.empty([stop - start for start, stop in b], dtype) for b in group]
        for k, name in enumerate(names):
            for b, part in zip(group, parts, strict=True):
                part[k] = _read_box(reader, name, info.shape, b[1:])
        for b, part in zip(group, parts, strict=True):
            for device in boxes[b]:
                arrays[device] = jax.device_put(part.view(carried or dtype), device)
    ordered = [arrays[d] for d in placed.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, placed, ordered)


def _read_box(
    reader: Reader, name: str, shape: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> np.ndarray:
    """A box of a tensor; of formats that read ranges alone, from the rows around it."""
    box = tuple(slice(*r) for r in ranges)
    if hasattr(reader, "read_box"):
        return reader.read_box(name, box)
    if not shape:
        return reader.read(name).reshape(())
    row = math.prod(shape[1:])
    start, stop = ranges[0]
    rows = reader.read(name, start * row, stop * row).reshape(-1, *shape[1:])
    return rows[(slice(None), *box[1:])]


def leaf_statistics(entry: Entry, sums: Any) -> interference.LeafStatistics:
    """What `mesh_programs.census_program` found of one tensor."""
    out = interference.LeafStatistics.zeros(len(entry.models))
    out.size = entry.size
    out.gram += sums["gram"]
    if "kept" in sums:
        out.counted = float(entry.size)
        out.kept += sums["kept"]
        out.mass += np.diag(out.gram)[:-1]
        out.kept_mass += sums["kept_mass"]
        out.contested, out.conflicts = map(float, sums["clashes"])
    return out
