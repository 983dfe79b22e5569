"""What a merge under way has found and written, kept so that it can go on after a kill.

A journal in the staging directory says what the merge is (its identity) and then, a
JSON object a line, what is finished. A line is written when the files it speaks of have
reached the disk, so that all it says holds after a kill or a power cut; a torn last
line is dropped.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from multitask_jax.checkpoints import TensorInfo, Writer
from multitask_jax.merging.census import Census
from multitask_jax.merging.core import is_float
from multitask_jax.merging.identity import Inputs
from multitask_jax.merging.plan import Entry, Pass

JOURNAL = "merge_journal.jsonl"  # not in the output: it goes before the merge ends
_SECONDS = 10.0  # between lines, if no file is finished meanwhile
_PAUSE = 2.0  # at most, if files are finished faster than it takes to say so
_LEAVES = 1024  # of the census, made ready at a time


class Past:
    """What an earlier run has found and written of one job."""

    def __init__(
        self,
        written: Collection[str] = (),
        leaves: Mapping[str, Any] | None = None,
        record: Callable[..., None] | None = None,
    ):
        """`leaves`: the census, by path. `record`: where `found` tells the journal."""
        self.model: dict[tuple[int, int], Any] = {}  # statistics of the whole model
        self.tensor: dict[tuple[str, int, int], Any] = {}
        self.written = frozenset(written)
        self._leaves = leaves or {}
        self._record = record

    def unseen(self, entries: Sequence[Entry]) -> set[str]:
        """Paths that the census has yet to see: none after a whole-model statistic."""
        paths = [] if self.model else [e.path for e in entries]
        return set(paths) - self.written

    def restore(self, census: Census, entries: Sequence[Entry]) -> None:
        """Gives the census what it knew of a job's tensors."""
        paths = [e.path for e in entries]
        census.restore({p: self._leaves[p] for p in paths if p in self._leaves})

    def left(
        self, p: Pass, entries: Sequence[Entry], advance: Callable[[int], None]
    ) -> Sequence[Entry]:
        """What a pass has to read; `advance` hears of the rest."""
        if p.model is None:
            left = [e for e in entries if e.path not in self.written]
        else:
            left = [] if p.model in self.model else list(entries)
        advance(sum(e.nbytes for e in entries) - sum(e.nbytes for e in left))
        return left

    def found(
        self, p: Pass, value: Any, tensor: Mapping[Any, Any], seen: Collection[str]
    ) -> None:
        """Tells the journal of a statistic of the whole model.

        Args:
          p: the pass that found it.
          value: the statistic.
          tensor: statistics of tensors; those of this pass count.
          seen: paths that the census saw for the first time.
        """
        if self._record is not None:
            at = {k: v for k, v in tensor.items() if k[1:] in p.tensor}
            self._record(p.model, value, at, seen)


class Progress:
    """Passes writes on to a writer, and keeps the journal of what is finished."""

    def __init__(
        self,
        writer: Writer,
        tensors: Sequence[TensorInfo],
        jobs: Sequence[Any],
        inputs: Inputs,
        census: Census | None,
    ):
        self.directory = writer.directory
        self.inputs = inputs
        self.notes: list[str] = []
        self.past = [Past(record=self._recorder(k)) for k in range(len(jobs))]
        self._writer, self._census = writer, census
        self._journal: BinaryIO | None = None
        # Integers are copied, and compared as they are: always again.
        self._left = {t.name: t.size for t in tensors if t.size and is_float(t.dtype)}
        self.total = len(self._left)
        merged = {e.path for j in jobs for e in j.plan.merged}
        # Copies come last; a file counts as finished without them.
        self._due = [set(names) & merged for names in writer.shards]
        self._shard = {n: k for k, names in enumerate(writer.shards) for n in names}
        self._fresh: list[str] = []
        self._next = time.monotonic() + _SECONDS
        self._soonest = 0.0
        self._lock, self._saving = threading.Lock(), threading.Lock()

    # -- while it goes -----------------------------------------------------------------

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries of a tensor; thread-safe."""
        self._writer.write(name, start, flat)
        if name not in self._left:
            return
        with self._lock:
            self._left[name] -= flat.size
            if self._left[name]:
                return
            del self._left[name]
            self._fresh.append(name)
            ripe = time.monotonic() > self._next
            due = self._due[self._shard[name]] if self._shard else set()
            if name in due:
                due.discard(name)
                # The last file needs no line: what remains is soon done. Nor does each
                # of thousands of small ones.
                finished = not due and bool(self._left)
                ripe = ripe or (finished and time.monotonic() > self._soonest)
        if ripe:
            self.save()

    def save(self) -> None:
        """Brings what is finished to the disk, and says so in the journal.

        Raises:
          CheckpointError: an input was changed.
        """
        with self._saving:
            with self._lock:
                fresh, self._fresh = self._fresh, []
            started = time.monotonic()
            self.inputs.check()
            if self._journal is not None and fresh:
                files = sorted(self.directory.glob("*.safetensors"))
                for k in sorted({self._shard[name] for name in fresh}):
                    _to_disk(files[k])
                self._line(fresh, written=fresh)
            now = time.monotonic()
            # A slow disk is not to spend its time on this, nor is a fast one.
            self._next = now + max(_SECONDS, 20 * (now - started))
            self._soonest = now + min(4 * (now - started), _PAUSE)

    def _recorder(self, job: int) -> Callable[..., None]:
        def record(key: Any, value: Any, tensor: Mapping[Any, Any], seen: Any) -> None:
            self.inputs.check()
            at = [[*k, _plain(v)] for k, v in tensor.items()]
            self._line(seen, job=job, measure=list(key), value=_plain(value), tensor=at)

        return record

    def _line(self, seen: Collection[str] = (), **content: Any) -> None:
        """Writes a line, with what the census knows of the paths `seen`."""
        if self._journal is None:
            return
        paths, pieces = list(seen) if self._census is not None else [], 0
        self._put(json.dumps(content)[:-1] + ', "census": {')
        for i in range(0, len(paths), _LEAVES):  # 100,000 at once would fill memory
            state = self._census.state(paths[i : i + _LEAVES])
            if state:
                self._put(", " * bool(pieces) + json.dumps(state)[1:-1])
                pieces += 1
        self._put("}}\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _put(self, text: str) -> None:
        self._journal.write(text.encode())

    def complete(self) -> None:
        """Finishes the files of the weights, once all is written."""
        self._writer.complete()

    # -- beginning and end -------------------------------------------------------------

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Starts the journal of a new merge."""
        for file in self.directory.iterdir():  # headers and index
            _to_disk(file)
        self._journal = (self.directory / JOURNAL).open("xb")
        self._line(identity=identity)
        _to_disk(self.directory)

    def go_on(self, lines: Sequence[Mapping[str, Any]], nbytes: int) -> None:
        """Takes over a journal: its lines after the identity, and how far it is sound.

        What an earlier run put beside the weights is removed: it is written at the end.
        """
        path = self.directory / JOURNAL
        os.truncate(path, nbytes)
        self._journal = path.open("ab")
        for file in self.directory.iterdir():
            weights = (".safetensors", ".safetensors.index.json", JOURNAL)
            if file.is_dir():
                shutil.rmtree(file)
            elif not file.name.endswith(weights):
                file.unlink()
        written = [name for line in lines for name in line.get("written", ())]
        leaves = {p: x for line in lines for p, x in line.get("census", {}).items()}
        for k, past in enumerate(self.past):
            self.past[k] = Past(written, leaves, past._record)
        for line in lines:
            if "measure" in line:
                past = self.past[line["job"]]
                past.model[tuple(line["measure"])] = _scalars(line["value"])
                for path, i, j, value in line["tensor"]:
                    past.tensor[path, i, j] = _scalars(value)
        for name in written:
            del self._left[name]
            self._due[self._shard[name]].discard(name)
        self._writer.skip(written)

    def end(self) -> None:
        """Closes the journal and removes it."""
        self.close()
        (self.directory / JOURNAL).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the journal."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _plain(x: Any) -> Any:
    """Scalars of NumPy, in tuples, fit for JSON: (float32(.5),) -> [["float32", .5]].

    JSON keeps every bit: a float64 is written with as many digits as it takes.
    """
    if isinstance(x, tuple):
        return list(map(_plain, x))
    x = np.asarray(x)
    return [x.dtype.name, x.item()]


def _scalars(x: Any) -> Any:
    """What `_plain` made plain."""
    if len(x) == 2 and isinstance(x[0], str):
        return np.dtype(x[0]).type(x[1])
    return tuple(map(_scalars, x))


class Begun(NamedTuple):
    """A staging directory with a journal."""

    directory: Path
    identity: Mapping[str, Any]
    lines: list[Any]
    nbytes: int  # of the journal's sound part

    @property
    def written(self) -> int:
        """Number of tensors that it has."""
        return sum(len(line.get("written", ())) for line in self.lines)


def read(directory: Path) -> Begun | None:
    """The journal in a staging directory, None if it has none."""
    try:
        text = (directory / JOURNAL).read_bytes()
    except OSError:
        return None
    lines, nbytes = [], 0
    for line in text.splitlines(keepends=True):
        try:
            content = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(content, dict):
            break
        lines.append(content)
        nbytes += len(line)
    if not lines or "identity" not in lines[0]:
        return None
    return Begun(directory, lines[0]["identity"], lines[1:], nbytes)
