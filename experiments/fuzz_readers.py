"""Damages valid files and reads them: nothing may crash, hang or look elsewhere.

    python -m experiments.fuzz_readers --inputs=100000 --seed=0

Every input is a valid checkpoint, adapter, recipe, ... one or two of whose files are
changed: their JSON, msgpack or YAML as trees, their tensors, or plain bytes. A reader
may read it whole, or refuse it by a ValueError that names the file. Anything else is a
crash: another exception, more than `--seconds`, more than `--memory` beyond what the
process held before, a file opened outside the input, or a process that dies. Inputs
depend on seed, reader and number alone; those that crash are kept in
WORKDIR/crashes/READER-NUMBER with error.txt beside them.
The slowest input is told in CPU time. Five minutes of one core.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import flags, fuzz_mutations
from experiments.flags import flag
from experiments.fuzz_targets import TARGETS
from experiments.parsing import at_least, paths, size_in_bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """What to try."""

    inputs: int = flag("Inputs of all readers together.", 100_000)
    seed: int = flag("Same seed, same inputs.", 0)
    readers: str | None = flag(f"Some of: {', '.join(TARGETS)}. All by default.")
    workdir: str | None = flag("Where crashes are kept; a temporary folder by default.")
    seconds: float = flag("An input that takes longer hangs.", 10.0)
    memory: str = flag("What a reader may use on top of the interpreter.", "512MiB")
    processes: bool = flag(
        "A process of its own a reader, so that memory is limited and dying noticed.",
        True,
    )


@dataclasses.dataclass
class Tally:
    """What became of one reader's inputs."""

    reader: str
    tried: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    slowest: float = 0.0  # seconds of CPU time
    memory: int = 0  # bytes that the peak grew by


class Hang(BaseException):
    """An input took too long."""


def count_of(config: Config) -> dict[str, int]:
    """Inputs a reader: fewer for those that are slow to read."""
    names = [n.strip() for n in paths(config.readers) or TARGETS]
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"--readers: got {name!r}, expected {', '.join(TARGETS)}")
    at_least(config, inputs=1)
    shares = {name: 1 / TARGETS[name].cost for name in names}
    unit = config.inputs / sum(shares.values())
    return {name: -int(-unit * share // 1) for name, share in shares.items()}


# -- one input -------------------------------------------------------------------------


def damaged(folder: Path, seed: int, reader: str, number: int) -> dict[str, bytes]:
    """The changed files of an input that is made from the valid one in `folder`."""
    rng = random.Random(f"{seed}/{reader}/{number}")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    chosen = rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2))))
    return {
        str(p.relative_to(folder)): fuzz_mutations.file(p.name, p.read_bytes(), rng)
        for p in chosen
    }


_opened: list[str] | None = None  # paths opened, while an input is read


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(args[0], (str, bytes)):
        _opened.append(os.fsdecode(args[0]))


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[list[str]]:
    """Paths that are opened inside; raises Hang when it takes too long."""
    global _opened

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _opened = seen = []
    try:
        yield seen
    finally:
        _opened = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _try(reader: str, folder: Path, seconds: float) -> tuple[bool, str]:
    """(whether it was accepted, what is wrong or "")."""
    wrong, accepted = "", False
    try:
        with _watched(seconds) as seen:
            TARGETS[reader].read(folder)
        accepted = True
    except ValueError as e:
        text = str(e)
        place = traceback.extract_tb(e.__traceback__)[-1]
        if folder.name not in text:
            wrong = f"names no file: {e!r} at {place.filename}:{place.lineno}"
        elif len(text) > 20_000 or not _is_text(text):
            wrong = f"message of {len(text)} characters: {text[:500]!r}"
    except Hang:
        wrong = f"took more than {seconds} s\n{traceback.format_exc()}"
    except Exception:
        wrong = traceback.format_exc()
    home = os.path.realpath(folder.parent)
    for path in seen:
        real = os.path.realpath(path)
        inside = real.startswith(home + os.sep) and "outside" not in real
        code = any(real.startswith(p) for p in _CODE)
        if not (inside or code):
            wrong = wrong or f"opened {path}, which is outside of {folder}"
    return accepted, wrong


def _is_text(text: str) -> bool:
    """Whether a terminal can show it, and takes nothing in it for a command."""
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return all(c >= " " or c == "\n" for c in text)
    return False


# Modules are imported on use; time zones and such are the interpreter's.
_CODE = tuple(
    {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)}
    | {str(Path(__file__).resolve().parent.parent / n) for n in ("multitask_jax",)}
)


def attempt(
    reader: str, config: Config, home: Path, crashes: Path, numbers: Iterator[int]
) -> Iterator[Tally]:
    """Tries inputs one after another; yields the growing tally at first and after each.

    Args:
      reader: a key of `TARGETS`.
      config: seed and limits.
      home: an empty folder to work in.
      crashes: where those that crash are kept.
      numbers: of the inputs.
    """
    if not getattr(attempt, "audited", False):
        sys.addaudithook(_audit)  # for good: hooks cannot be removed
        attempt.audited = True
    tally = Tally(reader)
    valid = TARGETS[reader].make(home)
    for folder in valid:
        TARGETS[reader].read(folder)
    if config.processes:
        _limit_memory(config)
    before = _peak()
    yield tally
    for number in numbers:
        folder = valid[number % len(valid)]
        files = damaged(folder, config.seed, reader, number)
        kept = {name: (folder / name).read_bytes() for name in files}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        started = time.process_time()  # other processes' work is not the reader's
        accepted, wrong = _try(reader, folder, config.seconds)
        tally.slowest = max(tally.slowest, time.process_time() - started)
        if wrong:
            keep = crashes / f"{reader.replace(' ', '_')}-{number}"
            shutil.copytree(folder, keep, dirs_exist_ok=True)
            (keep / "error.txt").write_text(wrong, errors="backslashreplace")
            tally.crashes.append((number, wrong.strip().splitlines()[-1]))
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        tally.tried += 1
        tally.accepted += accepted and not wrong
        tally.refused += not accepted and not wrong
        tally.memory = max(tally.memory, _peak() - before)
        yield tally


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory(config: Config) -> None:
    """Limits what is allocated from now on, whether it is touched or not."""
    limit = size_in_bytes("memory", config.memory) or 0
    with open("/proc/self/status") as f:
        held = next(int(x.split()[1]) for x in f if x.startswith("VmData:")) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (held + limit, held + limit))


def _scratch() -> Path:
    """An empty folder, in memory where there is such a place: files are tiny."""
    memory = "/dev/shm"
    inside = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="fuzz_readers-", dir=inside))


# -- all inputs ------------------------------------------------------------------------


def _child(reader: str, config: Config, work: str, start: int, stop: int, to: Any):
    home = _scratch()
    try:
        crashes = Path(work) / "crashes"
        for tally in attempt(reader, config, home, crashes, iter(range(start, stop))):
            to.send(tally)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _in_process(reader: str, config: Config, work: Path, count: int) -> Tally:
    """All inputs of a reader in a child, and in another from where it died."""
    whole, number = Tally(reader), 0
    spawn = multiprocessing.get_context("spawn")
    while number < count:
        receive, send = spawn.Pipe(duplex=False)
        args = (reader, config, str(work), number, count, send)
        child = spawn.Process(target=_child, args=args, daemon=True)
        child.start()
        send.close()
        part = None
        with contextlib.suppress(EOFError):
            while receive.poll(60 + config.seconds):
                part = receive.recv()
            child.kill()  # hangs where no signal reaches it
        child.join()
        if part is None:
            raise RuntimeError(f"{reader}: could not read the valid inputs, see above")
        whole.tried += part.tried
        whole.accepted += part.accepted
        whole.refused += part.refused
        whole.crashes += part.crashes
        whole.slowest = max(whole.slowest, part.slowest)
        whole.memory = max(whole.memory, part.memory)
        number += part.tried
        if number < count:  # the next input ended it
            whole.crashes.append((number, f"the process ended with {child.exitcode}"))
            whole.tried += 1
            number += 1
    return whole


def run(config: Config) -> list[Tally]:
    """Tries all inputs; prints a table.

    Raises:
      ValueError: unknown readers, a size without meaning.
    """
    counts = count_of(config)
    size_in_bytes("memory", config.memory)
    work = Path(config.workdir or tempfile.mkdtemp(prefix="fuzz_readers-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    tallies = []
    head = f"{'reader':12} {'inputs':>7} {'accepted':>8} {'refused':>8} {'crashes':>7}"
    print(f"{head} {'slowest':>9} {'memory':>8}", flush=True)
    for reader, count in counts.items():
        if config.processes:
            tally = _in_process(reader, config, work, count)
        else:
            home = _scratch()
            crashes = work / "crashes"
            *_, tally = attempt(reader, config, home, crashes, iter(range(count)))
            shutil.rmtree(home)
        tallies.append(tally)
        print(
            f"{reader:12} {tally.tried:7} {tally.accepted:8} {tally.refused:8}"
            f" {len(tally.crashes):7} {tally.slowest * 1e3:6.0f} ms"
            f" {tally.memory / 2**20:4.0f} MiB",
            flush=True,
        )
    found = [(t.reader, *c) for t in tallies for c in t.crashes]
    print(f"{sum(t.tried for t in tallies)} inputs, {len(found)} crashes")
    for reader, number, wrong in found[:20]:
        print(f"  {reader} {number}: {wrong[:200]}")
    if found:
        print(f"kept in {work / 'crashes'}")
    return tallies


def _script(config: Config) -> None:
    if any(t.crashes for t in run(config)):
        sys.exit(1)


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(_script))
