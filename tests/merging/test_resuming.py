"""Merges that were killed or interrupted, and what happens to files meanwhile."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import CheckpointError, safetensors_writer, staging
from multitask_jax.merging import identity, journal, report
from tests.merging.common import make_models, save

REPOSITORY = Path(__file__).parents[2]
METHODS = {
    "ties": merging.ties(density=0.3),
    "task_arithmetic": merging.task_arithmetic(scale=0.5),
    # Statistics per tensor before one of the whole model, which its writes need again.
    "breadcrumbs_ties": merging.breadcrumbs_ties(density=0.5),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    base, models = make_models(2, rows=8, blocks=5)  # one program serves all
    base["step"] = np.array([7], np.int64)
    models = [m | {"step": np.array([t], np.int64)} for t, m in enumerate(models)]
    save(folder / "base", base)
    for t, m in enumerate(models):
        save(folder / f"m{t}", m)
    return folder


def merge(inputs, out, method="task_arithmetic", **kwargs):
    kwargs = {"max_shard_size": 4000, "threads": 1, **kwargs}
    return merging.merge_checkpoints(
        METHODS[method],
        inputs / "base",
        [inputs / "m0", inputs / "m1"],
        out,
        progress=False,
        **kwargs,
    )


def content(path, *, report=True):
    """Bytes of all files; of the report what does not tell of time or interruption."""
    out = {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted(path.rglob("*"))
        if f.is_file() and not f.name.startswith(("merge_report", "README"))
    }
    if report:
        data = json.loads((path / "merge_report.json").read_text())
        notes = [n for n in data["notes"] if "resume" not in n.lower()]
        drop = ("seconds", "recipe")
        out["report"] = {k: v for k, v in data.items() if k not in drop}
        out["report"]["notes"] = notes
    return out


def alike(a, b):
    """Equal, floats to rounding: sums of the report may be added in another order."""
    if isinstance(a, float) or isinstance(b, float):
        return a == pytest.approx(b, rel=1e-6, abs=1e-7)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


class Interruption(BaseException):
    """Stands for ctrl-c at a chosen place."""


def interrupt(monkeypatch, at, error=Interruption):
    """The at-th write of a chunk fails; returns the names that were written."""
    names = []
    inner = safetensors_writer.SafetensorsWriter.write

    def write(self, name, start, flat):
        if len(names) == at:
            raise error
        inner(self, name, start, flat)
        names.append(name)

    monkeypatch.setattr(safetensors_writer.SafetensorsWriter, "write", write)
    return names


# -- kills -----------------------------------------------------------------------------


def test_twenty_kills_at_random_points_leave_the_same_bytes(tmp_path):
    base, models = make_models(2, rows=20, blocks=5)
    for name, params in zip(("base", "m0", "m1"), (base, *models), strict=True):
        save(tmp_path / name, params)
    done = subprocess.run(
        [sys.executable, "-m", "tests.merging.killed_merges", tmp_path, "20", "0"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=REPOSITORY,
        timeout=300,
    )
    whole, *resumed, last = map(json.loads, done.stdout.splitlines())
    assert sum(last["killed"].values()) == 20
    # First and second pass, between files, torn lines, the end.
    assert {"read", "write", "line", "sync", "commit"} <= last["killed"].keys()
    want = content(Path(whole["out"]))
    assert len([name for name in want if name.endswith(".safetensors")]) >= 8
    assert len(resumed) >= 3
    for run in resumed:
        assert alike(content(Path(run["out"])), want)
        for file, data in want.items():
            if file != "report":
                assert (Path(run["out"]) / file).read_bytes() == data
    assert any("Resumed: an earlier run had" in n for r in resumed for n in r["notes"])
    left = {p.name for p in tmp_path.iterdir()}
    outs = {Path(r["out"]).name for r in resumed}
    assert left == {"base", "m0", "m1", "whole", "cache", *outs}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_finished_is_not_done_again(inputs, tmp_path, monkeypatch, method):
    merge(inputs, tmp_path / "whole", method)
    with monkeypatch.context() as m:
        before = interrupt(m, 9)
        with pytest.raises(Interruption):
            merge(inputs, tmp_path / "out", method, resume=True)
    assert not (tmp_path / "out").exists()
    (left,) = (p for p in tmp_path.iterdir() if p.name != "whole")
    # The census and the statistics of the first run are the second's.
    with monkeypatch.context() as m:
        after = interrupt(m, 1000)
        result = merge(inputs, tmp_path / "out", method, resume=True)
    assert set(before) & set(after) <= {before[-1]}
    assert "Resumed: an earlier run had finished" in result.notes[0]
    assert not left.exists()
    assert alike(content(tmp_path / "out"), content(tmp_path / "whole"))
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_every_recipe_resumes(inputs, tmp_path, monkeypatch):
    recipe = {
        "merge_method": "ties",
        "base_model": str(inputs / "base"),
        "models": [{"model": str(inputs / f"m{t}")} for t in range(2)],
        "parameters": {"density": 0.5, "weight": 1.0},
    }
    kwargs = {"max_shard_size": 4000, "progress": False, "threads": 1}
    merging.merge_mergekit(recipe, tmp_path / "whole", **kwargs)
    with monkeypatch.context() as m:
        before = interrupt(m, 9)
        with pytest.raises(Interruption):
            merging.merge_mergekit(recipe, tmp_path / "out", resume=True, **kwargs)
        del before[:]
    other = recipe | {"parameters": {"density": 0.4, "weight": 1.0}}
    with pytest.raises(CheckpointError, match=r"--mergekit_config.*changed"):
        merging.merge_mergekit(other, tmp_path / "out", resume=True, **kwargs)
    with monkeypatch.context() as m:
        after = interrupt(m, 1000)
        merging.merge_mergekit(recipe, tmp_path / "out", resume=True, **kwargs)
    assert len(after) < 17
    assert alike(content(tmp_path / "out"), content(tmp_path / "whole"))


def test_without_resume_an_interruption_leaves_nothing(inputs, tmp_path, monkeypatch):
    interrupt(monkeypatch, 9)
    with pytest.raises(Interruption):
        merge(inputs, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_leaves_nothing_even_to_resume(inputs, tmp_path, monkeypatch):
    interrupt(monkeypatch, 9, CheckpointError("NaN"))
    with pytest.raises(CheckpointError, match="NaN"):
        merge(inputs, tmp_path / "out", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_resume_begins_anew(inputs, tmp_path):
    result = merge(inputs, tmp_path / "out", resume=True)
    assert result.notes[0] == "Nothing to resume: began anew."
    with pytest.raises(CheckpointError, match="exists; pass overwrite"):
        merge(inputs, tmp_path / "out", resume=True)


def test_beginning_anew_tells_of_resume(inputs, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        interrupt(m, 9)
        with pytest.raises(Interruption):
            merge(inputs, tmp_path / "out", resume=True)
    result = merge(inputs, tmp_path / "out")
    assert "killed when it had finished" in result.notes[0]
    assert "--resume" in result.notes[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_merge_is_not_gone_on_with(inputs, tmp_path, monkeypatch):
    inputs = Path(shutil.copytree(inputs, tmp_path / "in"))
    recipe = {"method": "task_arithmetic", "scale": 0.5, "threads": 1}
    out = tmp_path / "out"
    with monkeypatch.context() as m:
        interrupt(m, 9)
        with pytest.raises(Interruption):
            merge(inputs, out, resume=True, recipe=recipe)

    def refused(*said, **kwargs):
        with pytest.raises(CheckpointError) as e:
            merge(inputs, out, resume=True, **{"recipe": recipe, **kwargs})
        for text in (*said, "leave resume (--resume) out to begin anew"):
            assert text in str(e.value)

    refused("--scale: 0.5 then, 0.4 now", recipe=recipe | {"scale": 0.4})
    # From Python there may be no flags: the functions themselves are compared.
    refused("the method, its options or the weights", method="ties")
    refused("the method, its options or the weights", weights=[1.0, 2.0])
    refused("the size of its files", max_shard_size=5000)
    refused("which tensors are merged", exclude="embed")
    refused("report: True then, False now", report_files=False)
    refused("allow_nonfinite: False then, True now", allow_nonfinite=True)
    with monkeypatch.context() as m:
        m.setattr("multitask_jax.__version__", "99.0")
        refused("multitask_jax: 0.", "then, 99.0 now")
    file = inputs / "m1" / "model.safetensors"
    stat, data = file.stat(), file.read_bytes()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    refused(f"{file}: modified")
    changed = bytearray(data)
    changed[-100:] = bytes(100)
    file.write_bytes(changed)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(f"{file}: content")
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "Resumed" in merge(inputs, out, resume=True, recipe=recipe).notes[0]


def test_what_runs_is_not_taken_over(inputs, tmp_path):
    mine = staging.ours(tmp_path / "out").name.rpartition("-")[0]
    (tmp_path / f"{mine}-{os.getppid()}").mkdir()
    with pytest.raises(CheckpointError, match=rf"process {os.getppid()} seems to"):
        merge(inputs, tmp_path / "out", resume=True)


def test_other_formats_do_not_resume(inputs, tmp_path):
    for name in ("orbax", "msgpack", "delta"):
        with pytest.raises(ValueError, match=f"resume: an output in {name} can't be"):
            merge(
                inputs,
                tmp_path / "out",
                resume=True,
                output_format=name,
                max_shard_size=None,
            )
    assert list(tmp_path.iterdir()) == []


def test_a_long_merge_is_kept_between_files_too(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_SECONDS", 0.0)
    interrupt(monkeypatch, 9)
    with pytest.raises(Interruption):
        merge(inputs, tmp_path / "out", max_shard_size=None, resume=True)
    monkeypatch.undo()
    result = merge(inputs, tmp_path / "out", max_shard_size=None, resume=True)
    assert "had finished 9 of 17 tensors" in result.notes[0]


# -- what happens to files meanwhile ---------------------------------------------------


def change(file, how):
    if how == "replaced":
        copy = file.with_suffix(".copy")
        copy.write_bytes(file.read_bytes())
        stat = file.stat()
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        copy.replace(file)
    elif how == "removed":
        file.unlink()
    elif how == "longer":
        with file.open("ab") as f:
            f.write(b"more")
    else:
        os.utime(file, ns=(0, 0))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("replaced", "was replaced by another file"),
        ("removed", "can't be found any more"),
        ("longer", "changed"),
        ("touched", "changed (time of change"),
    ],
)
@pytest.mark.parametrize("output_format", ["safetensors", "msgpack"])
def test_an_input_that_changes_meanwhile(
    inputs, tmp_path, monkeypatch, how, said, output_format
):
    inputs = Path(shutil.copytree(inputs, tmp_path / "in"))
    file = inputs / "m1" / "model.safetensors"
    inner, done = journal.Progress.write, []

    def write(self, *args):
        if not done:
            change(file, how)
            done.append(True)
        inner(self, *args)

    monkeypatch.setattr(journal.Progress, "write", write)
    with pytest.raises(CheckpointError) as e:
        merge(
            inputs,
            tmp_path / "out",
            output_format=output_format,
            max_shard_size=None,
        )
    assert str(e.value).startswith(f"{file} {said}")
    assert "while it was being merged" in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("where", ["weights", "report"])
def test_the_disk_gets_full_late(inputs, tmp_path, monkeypatch, where):
    """As where space can't be reserved, or when the report is written."""

    error = OSError(errno.ENOSPC, "No space left on device")

    def full(*args, **kwargs):
        raise error

    if where == "weights":
        interrupt(monkeypatch, 9, error)
    else:
        monkeypatch.setattr(report, "write", full)
    message = "no room for the output: nothing is left there; free some"
    with pytest.raises(CheckpointError, match=message):
        merge(inputs, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    if where == "report":
        with pytest.raises(CheckpointError, match="the rest is kept"):
            merge(inputs, tmp_path / "out", resume=True)
        monkeypatch.setattr(report, "write", lambda *args: [])
        result = merge(inputs, tmp_path / "out", resume=True)
        assert "finished 17 of 17 tensors" in result.notes[0]


@contextlib.contextmanager
def as_nobody(folder):
    """Root may do everything; permissions hold for others."""
    closed = [p for p in (folder, *folder.parents) if not p.stat().st_mode & 1]
    root = os.geteuid() == 0
    for p in closed if root else ():
        p.chmod(0o755)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for p in closed if root else ():
            p.chmod(0o700)


def test_permission_denied(inputs, tmp_path):
    inputs = Path(shutil.copytree(inputs, tmp_path / "in"))
    file, folder = inputs / "m1" / "model.safetensors", tmp_path / "closed"
    inputs.chmod(0o755)
    folder.mkdir(0o555)
    merge(inputs, tmp_path / "out")  # imports what nobody may read
    shutil.rmtree(tmp_path / "out")
    with as_nobody(tmp_path):
        message = rf"{folder}/out: can't write there \(Permission denied\)"
        with pytest.raises(CheckpointError, match=message):
            merge(inputs, folder / "out")
    file.chmod(0)
    with as_nobody(tmp_path):
        message = rf"{file}: can't be read \(Permission denied\)"
        with pytest.raises(CheckpointError, match=message):
            merge(inputs, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closed", "in"]
    assert list(folder.iterdir()) == []


# -- identity --------------------------------------------------------------------------


def test_digests_tell_methods_apart():
    same = [identity.digest(merging.ties(density=0.3)) for _ in range(2)]
    assert same[0] == same[1]
    others = [
        merging.ties(density=0.30000000000000004),
        merging.ties(density=0.3, scale=2.0),
        merging.dare(density=0.3, seed=1),
        merging.dare(density=0.3, seed=2),
        merging.chain(merging.trim(density=0.3)),
        merging.with_lines(merging.ties(density=0.3), alpha=0.1, beta=0.9),
        *(f() for k, f in merging.METHODS.items() if k not in ("ties", "dare")),
    ]
    digests = [identity.digest(m) for m in others]
    assert len({*digests, same[0]}) == len(digests) + 1


def test_digests_are_the_same_in_another_process():
    code = (
        "from multitask_jax import merging; from multitask_jax.merging import identity;"
        "print(identity.digest([f() for f in merging.METHODS.values()]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    ).stdout
    methods = [f() for f in merging.METHODS.values()]
    assert found.strip() == identity.digest(methods)


def test_a_writer_can_be_kept(tmp_path):
    info = [checkpoints.TensorInfo("a", (4,), np.dtype(np.float32))]
    writer = checkpoints.create(tmp_path / "out", info)
    writer.write("a", 0, np.ones(2, np.float32))
    writer.keep = True
    writer.abort()
    assert (writer.directory / "model.safetensors").exists()
    with checkpoints.create(tmp_path / "out", info) as writer:
        writer.write("a", 0, np.ones(4, np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_adapter_named_by_its_file_is_its_scaling_too(tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json", "other.json"):
        (tmp_path / name).write_text("{}")
    file = tmp_path / "adapter_model.safetensors"
    before = identity.Inputs([file]).identity()
    assert {Path(p).name for p in before} == {file.name, "adapter_config.json"}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    assert identity.Inputs([file]).identity() != before
