"""Merges that are told to end, and inputs cut short while they are mapped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import flags, merge, signals
from multitask_jax.checkpoints import safetensors_writer
from multitask_jax.merging import streaming
from tests.merging.common import save

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("resume", [True, False])
def test_sigterm_keeps_what_is_finished_if_asked_to(
    tmp_path, monkeypatch, resume, capsys
):
    base = {f"a{i}": np.full(1000, i, np.float32) for i in range(6)}
    save(tmp_path / "base", base)
    save(tmp_path / "m", {k: v + 1 for k, v in base.items()})
    config = merge.Config(
        models=str(tmp_path / "m"),
        base=str(tmp_path / "base"),
        method="task_arithmetic",
        output=str(tmp_path / "out"),
        max_shard_size="8KB",
        report=False,
        progress=False,
        threads=1,
        resume=resume,
    )
    inner, names = safetensors_writer.SafetensorsWriter.write, []

    def write(self, name, start, flat):
        inner(self, name, start, flat)
        names.append(name)
        if len(names) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(safetensors_writer.SafetensorsWriter, "write", write)
    # The signal is seen while the main thread waits for the others.
    monkeypatch.setattr(streaming, "CHUNK", 500)
    before = signal.getsignal(signal.SIGTERM)
    signals.as_interruption()
    script = flags.plain_errors(merge.run, merge._interrupted)
    try:
        with pytest.raises(SystemExit) as e:
            script(config)
    finally:
        signal.signal(signal.SIGTERM, before)
    left = sorted(p.name for p in tmp_path.iterdir() if p.name not in ("base", "m"))
    if not resume:
        assert "nothing was written (with --resume" in str(e.value)
        assert left == []
        return
    assert "the same command goes on from there" in str(e.value)
    assert len(left) == 1
    merge.run(config)
    assert "Resumed: an earlier run had finished" in capsys.readouterr().err
    assert (tmp_path / "out").is_dir()


def test_an_input_cut_short_is_told_in_words(tmp_path):
    """A read beyond the end of a mapped file is a bus error, not an exception."""
    save(tmp_path / "a", {"x": np.zeros(1 << 20, np.float32)})
    code = f"""
import os, numpy as np
from experiments import signals
from multitask_jax import checkpoints
signals.say_on_bus_error("error: cut short")
x = checkpoints.open({str(tmp_path / "a")!r}).read("x")
os.truncate({str(tmp_path / "a" / "model.safetensors")!r}, 4096)
print(x.astype(np.float64).sum())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: cut short\n"
