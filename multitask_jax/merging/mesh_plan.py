"""What a merge on a mesh will take, from compiled programs: no weights are needed.

Memory is what XLA reports for the simulated devices of a CPU; temporaries differ
somewhat on accelerators, arguments and outputs do not.
"""

import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging import core, mesh_programs, on_mesh
from multitask_jax.merging.execution import Job
from multitask_jax.merging.mesh_programs import Inputs, Stack
from multitask_jax.merging.plan import human
from multitask_jax.sharding import Rules, names_in

_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|collective-permute"
    r"|reduce-scatter|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+)(\d+)?(?:e\d\w*)?\[([\d,]*)\]")


class Collective(NamedTuple):
    """An exchange between devices in a compiled program."""

    kind: str  # "all-reduce", ...
    dtypes: tuple[str, ...]  # "s32", ...
    nbytes: int  # of its result, on a device


class Program(NamedTuple):
    """A compiled program; bytes are of a device."""

    name: str
    runs: int
    arguments: int
    outputs: int
    temporaries: int
    shared: int  # outputs that take the place of arguments
    collectives: tuple[Collective, ...]


def collectives(hlo: str) -> tuple[Collective, ...]:
    """The collectives in the text of a compiled program (`compiled.as_text()`)."""
    found = []
    for result, kind in _COLLECTIVE.findall(hlo):
        arrays = _ARRAY.findall(result)
        nbytes = sum(
            math.prod(map(int, filter(None, shape.split(","))))
            * max(1, int(bits or 8) // 8)
            for _, bits, shape in arrays
        )
        dtypes = sorted({letters + bits for letters, bits, _ in arrays})
        found.append(Collective(kind, tuple(dtypes), nbytes))
    return tuple(found)


def programs(job: Job, mesh: Mesh, rules: Rules | None) -> list[Program]:
    """Lowers and compiles what a merge runs, for abstract inputs.

    Tensors of one shape share a program: their number hardly matters.
    """
    stacks = on_mesh.stacks_of(job.method, job.plan, mesh, rules)
    settings = core.settings_of(job.method, [t.name for t in job.plan.outputs])
    weights = tuple(map(np.float32, job.weights))
    inputs = [abstract(s, mesh, settings) for s in stacks]
    known: dict[tuple[int, int], Any] = {}
    out: list[Program] = []
    for i, j in mesh_programs.model_measures(job.method):
        kinds = tuple(s.kind for s in stacks)
        program = mesh_programs.statistic_program(job.method, mesh, kinds, i, j)
        traced = program.trace(inputs, weights, known)
        kind = job.method.transforms[i].measures[j].kind
        out.append(_compiled(f"statistic ({kind})", traced))
        known[i, j] = traced.out_info
    found: dict[Any, Program] = {}
    for stack, x in zip(stacks, inputs, strict=True):
        key = (stack.shape, stack.kind)
        if key not in found:
            program = mesh_programs.merge_program(job.method, mesh, stack.kind)
            traced = program.trace(*x, weights, known)
            found[key] = _compiled(f"merge {_shape(stack)}", traced)
        found[key] = found[key]._replace(runs=found[key].runs + 1)
    return [*out, *found.values()]


def abstract(stack: Stack, mesh: Mesh, settings: Sequence[Any]) -> Inputs:
    """Shapes, dtypes and shardings of a stack's inputs."""
    placed = stack.sharding(mesh)
    base, *models = [
        jax.ShapeDtypeStruct(stack.shape, mesh_programs.carried(d), sharding=placed)
        for d in stack.kind.dtypes
    ]
    return Inputs(base, tuple(models), on_mesh.settings_of(stack, settings))


def _compiled(name: str, traced: Any) -> Program:
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    return Program(
        name,
        0,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        collectives(compiled.as_text()),
    )


def _shape(stack: Stack) -> str:
    length, *shape = stack.shape
    cut = ", ".join(map(str, stack.kind.spec)) or "replicated"
    return f"{length} x {tuple(shape)} as ({cut})"


def device_bytes(stacks: Sequence[Stack], mesh: Mesh, stay: bool) -> int:
    """Inputs and outputs that a device holds at once, without temporaries."""
    held = [math.prod(s.shape) // _parts(s, mesh) for s in stacks]
    inputs = [n * _input(s) for n, s in zip(held, stacks, strict=True)]
    outputs = [n * s.kind.out.itemsize for n, s in zip(held, stacks, strict=True)]
    if stay:
        return sum(inputs) + 2 * max(outputs)
    return 2 * max(i + o for i, o in zip(inputs, outputs, strict=True))


def memory_of(
    job: Job, mesh: Mesh, rules: Rules | None, max_memory: int | None, abstract: bool
) -> int:
    """Estimate of this process's memory in bytes.

    Simulated devices are part of it, unless they stand for others (`abstract`).

    Raises:
      CheckpointError: it is more than max_memory.
      ValueError: a tensor that no rule matches, or that can't be cut so.
    """
    stacks = on_mesh.stacks_of(job.method, job.plan, mesh, rules)
    # Parts on their way to a device, and tensors that threads put together from parts.
    read = max(math.prod(s.shape) * _input(s) // _parts(s, mesh) for s in stacks)
    threads = [min(8, len(s.entries)) for s in stacks]
    written = max(
        n * math.prod(s.shape[1:]) * s.kind.out.itemsize
        for n, s in zip(threads, stacks, strict=True)
    )
    memory = (120 << 20) + read + written
    if mesh.devices.flat[0].platform == "cpu" and not abstract:
        memory += device_bytes(stacks, mesh, _stay(job)) * mesh.size
    if max_memory is not None and memory > max_memory:
        raise CheckpointError(
            f"the merge is expected to need {human(memory)} on this host, more than"
            f" max_memory = {human(max_memory)}; merge without a mesh, which needs"
            " little memory, or pass a larger limit"
        )
    return memory


def _stay(job: Job) -> bool:
    return bool(mesh_programs.model_measures(job.method))


def _parts(stack: Stack, mesh: Mesh) -> int:
    return math.prod(mesh.shape[n] for n in names_in(stack.kind.spec))


def _input(stack: Stack) -> int:
    """Bytes of an entry of base and models."""
    return sum(d.itemsize for d in stack.kind.dtypes)


def describe(job: Job, mesh: Mesh, rules: Rules | None) -> str:
    """The programs of a merge, their memory and collectives, for `--dry_run`."""
    started = time.perf_counter()
    found = programs(job, mesh, rules)
    seconds = time.perf_counter() - started
    stacks = on_mesh.stacks_of(job.method, job.plan, mesh, rules)
    stay = _stay(job)
    axes = ", ".join(f"{k}={v}" for k, v in mesh.shape.items())
    held = device_bytes(stacks, mesh, stay)
    temporaries = max(p.temporaries for p in found)
    how = (
        "all tensors stay on the mesh for statistics of the whole model"
        if stay
        else "stacks of tensors come and go"
    )
    lines = [
        f"mesh         {axes}: {mesh.size} devices; {how}",
        f"a device     {human(held + temporaries)}: {human(held)} of inputs and outputs"
        f" at once, {human(temporaries)} of temporaries; on a CPU times {mesh.size}",
        f"programs     {len(found)}, compiled in {seconds:.1f} s; bytes of a device:",
    ]
    for p in found:
        said = sorted({f"{c.kind} of {'/'.join(c.dtypes)}" for c in p.collectives})
        most = max((c.nbytes for c in p.collectives), default=0)
        exchange = f"{', '.join(said)}, {human(most)} at most" if said else "none"
        lines += [
            f"  {p.name}" + (f", {p.runs} times" if p.runs > 1 else ""),
            f"    arguments {human(p.arguments)}, outputs {human(p.outputs)}"
            f" ({human(p.shared)} in place of arguments), temporaries"
            f" {human(p.temporaries)}; collectives: {exchange}",
        ]
    return "\n".join(lines)
