"""Run by test_resuming: merges that kill themselves (SIGKILL) and are gone on with.

    python -m tests.merging.killed_merges FOLDER KILLS SEED

FOLDER holds base, m0 and m1. One warm process forks a child a merge. Prints a JSON
object a finished merge: where it is and what it said.
"""

import collections
import functools
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import jax

from multitask_jax import merging
from multitask_jax.checkpoints import directory
from multitask_jax.checkpoints.safetensors_file import SafetensorsReader
from multitask_jax.checkpoints.safetensors_writer import SafetensorsWriter
from multitask_jax.merging import journal, report, streaming

# Tensors of several chunks, though small.
streaming.CHUNK, streaming.BUCKETS = 1024, (1024,)
METHOD = merging.ties(density=0.3)
counts = collections.Counter()
lock = threading.Lock()
deadline = None  # (kind of event, which one)


def event(kind):
    """Counts; ends the process where it is to be killed."""
    with lock:
        counts[kind] += 1
        if (kind, counts[kind]) == deadline:
            os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, kind):
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def call(*args, **kwargs):
        event(kind)
        return inner(*args, **kwargs)

    setattr(owner, name, call)


def torn(self, text):
    """Half of a line's piece, and then the rest: a kill may come between."""
    for part in (text[: len(text) // 2], text[len(text) // 2 :]):
        self._journal.write(part.encode())
        self._journal.flush()
        event("line")


def merge(folder, out):
    return merging.merge_checkpoints(
        METHOD,
        folder / "base",
        [folder / "m0", folder / "m1"],
        out,
        max_shard_size=4000,
        resume=True,
        verify=True,
        progress=False,
        threads=2,
    )


def child(folder, out, at):
    """Merges in a fork; returns what it printed, or None if it was killed."""
    global deadline
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        deadline = at
        result = merge(folder, out)
        said = {"out": str(out), "notes": result.notes, "counts": counts}
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, status
    return json.loads(text)


def main(folder, kills, seed):
    before(SafetensorsReader, "read", "read")
    before(SafetensorsWriter, "write", "write")
    before(journal, "_to_disk", "sync")
    before(journal.Progress, "end", "end")
    before(directory.Writer, "commit", "commit")
    before(report, "write", "report")
    report._figures = lambda *args, **kwargs: None
    journal.Progress._put = torn
    whole = child(folder, folder / "whole", None)
    print(json.dumps(whole), flush=True)
    kinds = ["read", "write", "line", "sync", "report", "end", "commit"]
    chance, done, killed = random.Random(seed), 0, collections.Counter()
    while sum(killed.values()) < kills:
        out = folder / f"out{done}"
        kind = min(kinds, key=lambda k: (killed[k], chance.random()))
        if kind in ("read", "write") or chance.random() < 0.5:
            kind = chance.choice(kinds[:4])
        at = (kind, chance.randint(1, whole["counts"][kind]))
        finished = child(folder, out, at)
        if finished is None:
            killed[kind] += 1
            assert not out.exists()
        else:
            done += 1
            print(json.dumps(finished), flush=True)
    if not (folder / f"out{done}").exists():
        print(json.dumps(child(folder, folder / f"out{done}", None)), flush=True)
    print(json.dumps({"killed": killed}), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(Path(sys.argv[1]) / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
