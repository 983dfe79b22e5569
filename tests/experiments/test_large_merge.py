import gc
import json
import time

import numpy as np
import pytest

from experiments import large_merge, large_sources
from experiments.large_merge import Config
from experiments.large_sources import ChecksumSink
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import CheckpointError, TensorInfo
from multitask_jax.merging import interference
from multitask_jax.merging.lines import relative_depths
from multitask_jax.merging.plan import CHUNK, plan_merge

SMALL = {"gigabytes": 0.004, "width": 64, "sample": 0.02}


def checksum_of(path):
    """Of a checkpoint on disk, cut as a merge cuts it."""
    reader = checkpoints.open(path)
    sink = ChecksumSink(list(reader.tensors.values()))
    for t in reader.tensors.values():
        for start in range(0, t.size, CHUNK):
            stop = min(start + CHUNK, t.size)
            sink.write(t.name, start, reader.read(t.name, start, stop))
    sink.finish()
    reader.close()
    return sink.checksum


def test_any_slice_of_a_lazy_model_is_the_same():
    layout = [
        TensorInfo("a", (7, 5), large_sources.BFLOAT16),
        TensorInfo("b", (1000,), large_sources.BFLOAT16),
    ]
    base, one, two = large_sources.lazy_models(layout, 2)
    again = large_sources.lazy_models(layout, 2)[1]
    for name, info in one.tensors.items():
        whole = one.read(name)
        assert whole.shape == (info.size,)
        for start, stop in ((0, 1), (3, 19), (16, 32), (33, 35)):
            part = again.read(name, start, stop)
            assert part.tobytes() == whole[start:stop].tobytes()
    theta = base.read("b").astype(np.float64)
    tau_1, tau_2 = (m.read("b").astype(np.float64) - theta for m in (one, two))
    assert abs(theta).max() <= 0.035
    assert theta.std() == pytest.approx(0.035 / 3**0.5, rel=0.1)
    for tau in (tau_1, tau_2):
        assert 0 < np.abs(tau).max() < 5e-3
    assert abs(np.corrcoef(tau_1, tau_2)[0, 1]) < 0.2
    assert len(set(base.read("a").tolist())) > 20  # not b's values, nor a constant
    assert not np.array_equal(base.read("a"), base.read("b", 0, 35))


def test_the_checksum_knows_places_and_values_but_no_order():
    info = TensorInfo("a", (6,), np.dtype(np.float32))
    x = np.arange(6, dtype=np.float32)

    def total(*pieces):
        sink = ChecksumSink([info])
        for start, flat in pieces:
            sink.write("a", start, flat)
        sink.finish()
        return sink.checksum

    right = total((0, x[:3]), (3, x[3:]))
    assert total((3, x[3:]), (0, x[:3])) == right
    assert total((0, x[3:]), (3, x[:3])) != right
    assert total((0, x[:3]), (3, -x[3:])) != right
    with pytest.raises(CheckpointError, match="not fully written"):
        total((0, x[:3]))


def test_the_sink_gets_what_a_merge_writes(tmp_path):
    """Streamed from lazy models into the sink, and from disk to disk: equal."""
    (row,) = large_merge.run(Config(workdir=str(tmp_path), **SMALL))
    layout = large_sources.llama(0.004e9 / 2, 64)
    assert row["parameters"] == sum(t.size for t in layout)
    paths = [
        large_sources.save(m, tmp_path / m.path)
        for m in large_sources.lazy_models(layout, 2)
    ]
    out = tmp_path / "out"
    merging.merge_checkpoints(
        merging.ties(density=0.2), paths[0], paths[1:], out, progress=False
    )
    assert row["checksum"] == checksum_of(out)
    assert row["kept"] == pytest.approx([0.2, 0.2], abs=0.02)  # equal ones stay
    assert row["sign_conflicts"] == pytest.approx(0.5, abs=0.02)
    assert row["read_gb"] == pytest.approx(3 * row["input_gb"])

    log = (tmp_path / "lazy" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    assert lines[-1]["read_gb"] == pytest.approx(row["read_gb"], abs=1e-3)
    highest = max(line["rss_anon_mb"] for line in lines)
    assert row["peak_mb"] == pytest.approx(highest, abs=0.1)
    assert highest > 50
    assert (tmp_path / "memory.png").stat().st_size < 60_000
    assert row["checksum"] in (tmp_path / "report.md").read_text()


def test_holes_read_as_zeros_and_take_no_room(tmp_path):
    layout = large_sources.llama(2e6, 64)
    path = large_sources.make_sparse(tmp_path / "x" / "model.safetensors", layout)
    assert path.stat().st_size > 4e6
    assert path.stat().st_blocks * 512 < 1e5
    reader = checkpoints.open(path)
    assert list(reader.tensors.values()) == layout
    assert not any(reader.read(t.name).any() for t in layout)
    reader.close()
    (row,) = large_merge.run(Config(case="sparse", workdir=str(tmp_path), **SMALL))
    assert row["checksum"] == checksum_of(path)  # zeros again
    assert row["on_disk_mb"] < 0.3
    assert not list((tmp_path / "sparse").rglob("*.safetensors"))


def test_models_and_tensors_run_the_command_line(tmp_path):
    settings = {
        "workdir": str(tmp_path),
        "methods": "task_arithmetic",
        "parameters": 0.2,
    }
    settings |= {"width": 64}
    rows = large_merge.run(Config(case="models", counts="3", **settings))
    rows += large_merge.run(Config(case="tensors", counts="40", **settings))
    assert [r.get("models") for r in rows] == [3, None, None]
    assert [r.get("tensors") for r in rows] == [None, 40, 40]
    assert [r["method"] for r in rows] == [
        *["task_arithmetic"] * 2,
        "task_arithmetic --noreport",
    ]
    for row in rows:
        assert row["seconds"] > 0.5
        assert row["cpu_seconds"] > 0.5
        assert row["peak_mb"] > 50
    text = (tmp_path / "report.md").read_text()
    assert "## models" in text
    assert "## tensors" in text
    assert not (tmp_path / "tensors" / "out").exists()


def test_the_table_tells_what_one_more_costs():
    rows = [
        {"tensors": n, "method": m, "seconds": s, "cpu_seconds": 2 * s}
        for m, n, s in (("a", 100, 1.0), ("b", 100, 9.0), ("a", 1100, 1.5))
    ]
    *_, last = large_merge.as_table(rows).splitlines()
    assert last == "| 1,100 | a | 1.5 | 3 | 0.5 | 1 |"


@pytest.mark.parametrize("counts", ["0,2", "few", "2,,3"])
def test_counts_are_numbers(tmp_path, counts):
    with pytest.raises(ValueError, match=r"--counts: got .*, expected numbers"):
        large_merge.run(Config(case="models", counts=counts, workdir=str(tmp_path)))


def test_planning_and_reporting_take_time_by_the_tensor(tmp_path):
    """8 times the tensors: about 8 times the time, not 64."""

    def seconds(count, out):
        layout = large_sources.experts(count)
        readers = large_sources.lazy_models(layout, 2)
        gc.collect()
        started = time.thread_time()  # of no other thread's work
        plan = plan_merge(merging.ties(), readers[0], readers[1:])
        names = [t.name for t in plan.outputs]
        assert relative_depths(names)[names[0]] == 0
        sums = dict.fromkeys(names, interference.LeafStatistics.zeros(2))
        interference.summarise(interference.add(list(sums.values())))
        assert "block 1" in interference.by_depth(sums, names)
        with checkpoints.create(tmp_path / out, plan.outputs) as writer:
            for name in names:
                writer.write(name, 0, np.zeros(1024, large_sources.BFLOAT16))
        checkpoints.open(tmp_path / out).close()
        return time.thread_time() - started

    seconds(1000, "imports")
    gc.disable()  # what other tests left would be looked through again and again
    try:
        assert seconds(8000, "many") < 24 * seconds(1000, "few")
    finally:
        gc.enable()
