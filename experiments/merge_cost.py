"""What a merge costs on other machines: formulae, *not measurements*.

    python -m experiments.merge_cost
    python -m experiments.merge_cost --models=5 --out_bytes=4

Every process reads its share of base and models once a pass and writes its share of the
output; shares are taken as equal, which they are up to the size of a tensor. A pass
takes as long as the slower of two, which run at the same time:

    storage   bytes / bandwidth; from the second pass on nothing, if a host's share of
              the inputs fits its page cache
    compute   stored values x seconds a value and core / cores that its threads use

The last pass also writes. Start-up and, in a group, the exchange of statistics (a few
messages a process, one after another through process 0) come on top. Seconds a value
are measured: README's table of 502 M parameters on 2 CPU cores, less the start-up.
Accelerators are left out of it: all compute is charged at the rate of CPU cores, which
read, convert, select and check values also where a GPU or TPU merges them.
"""

import dataclasses
from typing import NamedTuple

from experiments import flags, parsing
from experiments.flags import flag
from multitask_jax import merging
from multitask_jax.merging.plan import plan_passes
from multitask_jax.merging.report import table

GB = 1e9
START_UP = 1.3  # seconds: Python, JAX, compilation
JOINING = 3.0  # seconds that a group of processes needs to find each other
MESSAGE = 1e-3  # seconds at process 0 a message; half of that on one machine
CACHED = 0.7  # of a host's memory may hold inputs


class Work(NamedTuple):
    """A method, as far as it costs."""

    method: merging.Method
    seconds_per_value: float  # of one core and pass; measured, see above
    exchanges: int  # that a group makes about each model: brackets, counts, bins

    @property
    def passes(self) -> int:
        """Readings of all inputs, as the streamed merge plans them."""
        return len(plan_passes(self.method))


WORK = {
    "ties": Work(merging.ties(), 2.0e-9, 6),
    "task_arithmetic": Work(merging.task_arithmetic(), 2.7e-9, 0),
}


class Machine(NamedTuple):
    """Where a merge runs. Bandwidths are assumed, in bytes a second."""

    hosts: int
    processes: int  # a host
    cores: int  # that a process uses: at most 8 threads
    read: float  # a host
    write: float  # a host
    read_all: float  # of all hosts together
    write_all: float
    memory: float  # bytes a host


MACHINES = {
    "laptop, NVMe": Machine(1, 1, 8, 3 * GB, 3 * GB, 3 * GB, 3 * GB, 32 * GB),
    "host with 8 GPUs": Machine(1, 8, 8, 20 * GB, 10 * GB, 20 * GB, 10 * GB, 1000 * GB),
    "v5e-256, 64 hosts": Machine(64, 1, 8, 2 * GB, 2 * GB, 100 * GB, 50 * GB, 192 * GB),
}
SIZES = {"7 B": 7e9, "70 B": 70e9, "405 B": 405e9}


class Cost(NamedTuple):
    """Of one merge."""

    read: float  # bytes from storage, of all passes
    written: float  # bytes
    storage: float  # seconds
    compute: float  # seconds
    seconds: float  # all in all


def cost(
    work: Work,
    machine: Machine,
    parameters: float,
    *,
    models: int = 3,
    in_bytes: int = 2,
    out_bytes: int = 2,
) -> Cost:
    """Seconds and bytes of merging `models` of so many parameters and their base."""
    count = machine.hosts * machine.processes
    values = parameters * (models + 1)
    inputs, outputs = values * in_bytes, parameters * out_bytes
    reading = inputs / min(machine.read * machine.hosts, machine.read_all)
    writing = outputs / min(machine.write * machine.hosts, machine.write_all)
    computing = values * work.seconds_per_value / (machine.cores * count)
    cached = inputs / machine.hosts <= CACHED * machine.memory
    storage = [reading] + [0.0 if cached else reading] * (work.passes - 1)
    storage[-1] += writing
    seconds = START_UP + sum(max(s, computing) for s in storage)
    if count > 1:
        messages = 2 * count * (4 + work.exchanges * models)
        seconds += JOINING + messages * MESSAGE
    read = inputs * (1 if cached else work.passes)
    return Cost(read, outputs, sum(storage), computing * work.passes, seconds)


@dataclasses.dataclass(frozen=True)
class Config:
    """What the merges are like."""

    models: int = flag("Fine-tuned models, besides the base.", 3)
    in_bytes: int = flag("Bytes of a stored parameter.", 2)
    out_bytes: int = flag("Bytes of a written parameter.", 2)


def run(config: Config) -> str:
    """Prints and returns the table as Markdown.

    Raises:
      ValueError: a flag is not positive.
    """
    options = dataclasses.asdict(config)
    parsing.at_least(config, **dict.fromkeys(options, 1))
    rows = []
    for size, parameters in SIZES.items():
        for name, work in WORK.items():
            for where, machine in MACHINES.items():
                c = cost(work, machine, parameters, **options)
                bound = "storage" if c.storage > c.compute else "compute"
                rows.append(
                    [
                        size,
                        f"{name} ({work.passes} pass{'es' * (work.passes > 1)})",
                        where,
                        f"{c.read / GB:,.0f} GB",
                        f"{c.written / GB:,.0f} GB",
                        f"{c.storage:,.0f}",
                        f"{c.compute:,.0f}",
                        f"**{duration(c.seconds)}** ({bound})",
                    ]
                )
    header = ["parameters", "method", "machine", "read", "written"]
    header += ["storage, s", "compute, s", "expected (bound by)"]
    text = (
        f"*Formulae, not measurements*: base + {config.models} models,"
        f" {config.in_bytes} bytes a parameter. Assumed:\n\n{assumptions()}\n\n"
        + table(header, rows)
    )
    print(text)
    return text


def assumptions() -> str:
    """The machines in words."""
    return "\n".join(
        f"- {name}: processes {m.hosts * m.processes}, cores of each {m.cores};"
        f" {m.read / GB:.0f} GB/s read and {m.write / GB:.0f} GB/s written a host,"
        f" {m.read_all / GB:.0f} and {m.write_all / GB:.0f} GB/s in all,"
        f" {m.memory / GB:.0f} GB memory a host"
        for name, m in MACHINES.items()
    )


def duration(seconds: float) -> str:
    """Before/after: 7.4 -> "7 s", 600 -> "10 min", 7200 -> "2.0 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))
