"""Cases that break merges elsewhere, or once broke them here."""

import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import merge as script
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging import streaming
from multitask_jax.merging.census import Census
from multitask_jax.merging.plan import plan_merge
from tests.merging.common import (
    assert_same_bits,
    load,
    make_models,
    merged,
    save,
    stream,
)


def test_model_stock_stays_between_base_and_average():
    """One entry has cosine -1 or 1: the formula alone would shoot off to infinity."""
    for deltas in ([0.01, -0.015], [0.01, 0.015], [0.0, 0.01]):
        base = {"gate": np.array([0.1], np.float32)}
        models = [{"gate": base["gate"] + np.float32(d)} for d in deltas]
        for rows in (False, True):
            method = merging.model_stock(filter_wise=rows)
            out = float(merged(method, base, models)["gate"][0])
            average = 0.1 + np.mean(deltas)
            assert min(0.1, average) - 1e-6 <= out <= max(0.1, average) + 1e-6


def test_slerp_of_opposite_tensors_is_not_zero():
    a = {"w": np.array([3.0, 4.0], np.float32)}
    b = {"w": np.array([-6.0, -8.0], np.float32)}
    for t, direction in ((0.25, 1), (0.75, -1)):
        out = np.asarray(merged(merging.slerp(t=t), a, [a, b])["w"])
        np.testing.assert_allclose(
            out, direction * (5 + 5 * t) * np.array([0.6, 0.8]), rtol=1e-6
        )
    np.testing.assert_allclose(
        merged(merging.slerp(t=1 / 3, antiparallel="lerp"), a, [a, b])["w"],
        [0, 0],
        atol=1e-6,
    )


def test_weights_are_refused_where_they_do_not_count():
    base, models = make_models(2)
    for method in (merging.slerp(), merging.model_stock()):
        with pytest.raises(ValueError, match="this method takes none"):
            merged(method, base, models, weights=[5, 1])


@pytest.mark.parametrize("weights", [[np.nan, 1.0], [np.inf, 1.0], [1.0, -1.0]])
def test_weights_without_meaning(tmp_path, weights):
    base, models = make_models(2)
    with pytest.raises(ValueError, match=r"expected finite|add up to 0"):
        stream(tmp_path, merging.linear(), base, models, weights=weights)


def test_transforms_after_parameters_work_on_the_task_vector():
    base, models = make_models(2)
    lines = merging.scale_by_depth(alpha=0.2, beta=0.5)
    a = merged(merging.chain(merging.linear(), lines), base, models)
    b = merged(merging.with_lines(merging.linear(), alpha=0.2, beta=0.5), base, models)
    assert_same_bits(a, b)
    with pytest.raises(ValueError, match="a whole method can only come first"):
        merging.chain(lines, merging.linear())


def test_float64_is_computed_in_float64(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"layers.{i}.mlp.w": rng.standard_normal((8, 4)) for i in range(4)}
    models = [
        {k: v + 0.01 * rng.standard_normal(v.shape) for k, v in base.items()}
        for _ in range(2)
    ]
    weights = [0.3, 0.7]
    method = merging.with_lines(merging.task_arithmetic(), alpha=0.1, beta=0.7)
    out = stream(tmp_path / "a", method, base, models, weights=weights)
    for i, (k, v) in enumerate(base.items()):
        tau = sum(w * (m[k] - v) for w, m in zip(weights, models, strict=True))
        np.testing.assert_allclose(out[k], v + (0.1 + 0.7 * i / 3) * tau, rtol=1e-14)
    # SLERP's statistics too.
    out = stream(tmp_path / "b", merging.slerp(t=0.3), base, models)
    for k in base:
        a, b = models[0][k], models[1][k]
        cos = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        if cos < 0.9995:
            angle = np.arccos(cos)
            want = (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)
            np.testing.assert_allclose(out[k], want, rtol=1e-12)
    # Thresholds are float32: refused, with the way out.
    with pytest.raises(CheckpointError, match=r"mlp\.w: float64.*dtype='float32'"):
        stream(tmp_path / "c", merging.ties(), base, models)
    stream(tmp_path / "d", merging.ties(), base, models, dtype="float32")


def test_many_tiny_tensors(tmp_path, monkeypatch):
    from multitask_jax.merging import streaming

    monkeypatch.setattr(streaming, "_SMALL", 500)
    rng = np.random.default_rng(0)
    base = {f"t{i}": rng.standard_normal(20).astype(np.float32) for i in range(40)}
    model = {k: v + rng.standard_normal(20).astype("f4") for k, v in base.items()}
    method = merging.ties(density=0.3)
    out = stream(tmp_path, method, base, [model], report_files=True)
    want = jax.jit(lambda b, m: merging.merge(method, b, [m]))(base, model)
    assert_same_bits(out, want)


def test_tensors_without_entries(tmp_path):
    base = {"a": np.zeros((0, 3), np.float32), "b": np.ones(2, np.float32)}
    model = {"a": base["a"], "b": base["b"] * 2}
    for i, method in enumerate((merging.ties(), merging.linear())):
        out = stream(tmp_path / f"{i}", method, base, [model], report_files=True)
        assert out["a"].shape == (0, 3)
        with pytest.raises(CheckpointError, match="nothing to merge"):
            stream(tmp_path / f"only{i}", method, base, [model], include="a")


@pytest.mark.parametrize("last", [merging.trim(density=0.3), merging.drop()])
def test_trimming_after_combining(tmp_path, last):
    base, models = make_models(2)
    method = merging.chain(merging.weighted_sum(), last)
    out = stream(tmp_path, method, base, models, report_files=True)
    want = jax.jit(lambda b, m: merging.merge(method, b, m))(base, models)
    assert_same_bits(out, {k: out[k] for k in out} | flat(want))


def flat(params):
    from multitask_jax import tree

    return {k: np.asarray(v) for k, v in tree.flatten(params).items()}


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_values_that_do_not_fit_the_output(tmp_path, dtype):
    base = {"w": np.full(4, 1e6, np.float32)}
    with pytest.raises(
        CheckpointError, match=f"w: the merged values do not fit {dtype}"
    ):
        stream(tmp_path, merging.linear(), base, [base, base], out_dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_complex_leaves_are_refused():
    base = {"w": np.ones(3, np.complex64)}
    with pytest.raises(ValueError, match="w: got complex64"):
        merging.merge(merging.linear(), base, [base])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weights": "nan,1"}, "--weights"),
        ({"scale": float("inf")}, "--scale: got inf"),
        ({"threads": -1}, "threads: got -1"),
        ({"out_dtype": "longdouble"}, "out_dtype: got 'longdouble', expected one of"),
        (
            {"dtype": "bfloat16"},
            "dtype: got 'bfloat16', expected one of float64, float",
        ),
        ({"output_format": "msgpack", "max_shard_size": "1MB"}, "max_shard_size"),
    ],
)
def test_flags_without_meaning(tmp_path, flags, message):
    base, models = make_models(2)
    save(tmp_path / "b", base)
    paths = [str(save(tmp_path / f"m{t}", m)) for t, m in enumerate(models)]
    config = script.Config(
        base=str(tmp_path / "b"),
        models=",".join(paths),
        output=str(tmp_path / "out"),
        progress=False,
        **flags,
    )
    with pytest.raises(ValueError, match=message):
        script.run(config)
    assert not (tmp_path / "out").exists()


def test_dry_run_refuses_what_the_run_would(tmp_path):
    base, models = make_models(2)
    save(tmp_path / "b", base)
    paths = [save(tmp_path / f"m{t}", m) for t, m in enumerate(models)]

    def plan(method=None, output=tmp_path / "out", **kwargs):
        merging.merge_checkpoints(
            method or merging.ties(),
            tmp_path / "b",
            paths,
            output,
            dry_run=True,
            **kwargs,
        )

    plan()
    with pytest.raises(CheckpointError, match="overlap"):
        plan(output=tmp_path / "b", overwrite=True)
    with pytest.raises(ValueError, match="format 'gguf'"):
        plan(output_format="gguf")
    with pytest.raises(ValueError, match="can't tell the blocks"):
        plan(
            merging.with_lines(
                merging.ties(), alpha=0.1, beta=1.0, block_pattern=r"x(\d)"
            )
        )


def test_the_reports_command_can_be_pasted(tmp_path):
    base, models = make_models(2)
    save(tmp_path / "b", base)
    paths = [str(save(tmp_path / f"m{t}", m)) for t, m in enumerate(models)]
    config = script.Config(
        base=str(tmp_path / "b"),
        models=",".join(paths),
        output=str(tmp_path / "out"),
        progress=False,
        lines_alpha=0.5,
        block_pattern=r"block_(\d+)/",
        exclude="(scale|embed)$",
    )
    script.run(config)
    report = (tmp_path / "out" / "merge_report.md").read_text()
    command = report.split("```")[1].strip()
    words = shlex.split(command)
    assert r"--block_pattern=block_(\d+)/" in words
    first = load(tmp_path / "out")
    again = command.replace("python", sys.executable, 1) + " --overwrite"
    subprocess.run(
        again,
        shell=True,
        check=True,
        capture_output=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert_same_bits(first, load(tmp_path / "out"))


def test_rows_of_a_last_chunk_that_is_not_full(tmp_path, monkeypatch):
    """40 rows in chunks of 21: ranks are padded as the parameters are."""
    monkeypatch.setattr(streaming, "CHUNK", 1 << 10)
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((40, 48), np.float32)}
    models = [
        {"w": base["w"] + 0.1 * rng.standard_normal((40, 48), np.float32)}
        for _ in range(2)
    ]
    for rescale in ("l1", "probability"):
        method = merging.della(density=0.5, epsilon=0.2, rescale=rescale)
        out = stream(tmp_path / rescale, method, base, models)
        want = merged(method, base, models)
        # The L1 norms are sums of floats in another order.
        np.testing.assert_allclose(out["w"], want["w"], rtol=1e-6, atol=1e-6)


def test_model_ranks_after_tensor_statistics_are_not_streamed(tmp_path):
    base, models = make_models(2)
    trims = [merging.trim(density=0.5, scope=x) for x in ("tensor", "model")]
    method = merging.chain(*trims, merging.weighted_sum())
    with pytest.raises(ValueError, match=r"transform 1 .* after transform 0"):
        stream(tmp_path, method, base, models)


def test_the_reports_sample_is_small_where_tensors_are_seen_whole(tmp_path):
    """Once every slice of the sample was a whole tensor."""
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((1100, 1000), np.float32)}
    models = [{"w": base["w"] + np.float32(t)} for t in (1, 2)]
    paths = [save(tmp_path / f"{t}", m) for t, m in enumerate((base, *models))]
    readers = [checkpoints.open(p) for p in paths]
    method = merging.nuslerp(flatten=False, row_wise=True)
    plan = plan_merge(method, readers[0], readers[1:])
    read = []
    for r in readers:
        r.read = lambda *a, f=r.read: read.append(f(*a)) or read[-1]
    census = Census(2, exact=False)
    stream = streaming.Stream(method, plan, readers, (1.0, 1.0), census=census)
    with checkpoints.create(tmp_path / "out", plan.outputs) as writer:
        stream.run(writer)
    sizes = [x.size for x in read]
    assert sizes.count(base["w"].size) == 3  # the merge itself
    assert max(n for n in sizes if n != base["w"].size) <= 256


def test_rows_that_are_no_part_of_a_sample_are_read_whole(tmp_path):
    """Whole rows of 768, and a threshold of what is left of them afterwards."""
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((16, 768)).astype(np.float32)}
    models = [
        {"w": base["w"] + rng.standard_normal((16, 768)).astype(np.float32)}
        for _ in range(2)
    ]
    method = merging.chain(
        merging.drop_by_rank(density=0.6, seed=1),
        merging.trim(density=0.5),
        merging.weighted_sum(),
    )
    got = stream(tmp_path, method, base, models)
    assert_same_bits(got, merged(method, base, models))
