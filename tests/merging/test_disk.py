"""Merging checkpoints: what goes in, what comes out, and what is refused."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from multitask_jax import checkpoints, merging, tree
from multitask_jax.checkpoints import CheckpointError
from tests.merging.common import assert_same_bits, load, make_models, save, stream

TA = merging.task_arithmetic(scale=0.5)


def small(**extra):
    rng = np.random.default_rng(0)
    base = {
        f"layers.{i}.mlp.weight": rng.standard_normal((4, 6)).astype(np.float32)
        for i in range(2)
    } | {"embed.weight": rng.standard_normal((5, 4)).astype(np.float32)}
    return base | extra


def moved(params, by=0.25):
    return {
        k: (v + by).astype(v.dtype) if v.dtype.kind == "f" else v
        for k, v in params.items()
    }


def merge(tmp_path: Path, base, models, method=TA, **kwargs) -> dict[str, np.ndarray]:
    return stream(tmp_path, method, base, models, **kwargs)


# -- dtypes ----------------------------------------------------------------------------


def test_each_tensor_keeps_the_bases_dtype(tmp_path):
    base = small(
        half=np.ones(3, np.float16),
        brain=np.ones(3, ml_dtypes.bfloat16),
        double=np.full(3, 1 / 3),
        eight=np.ones(4, ml_dtypes.float8_e4m3fn),
        scalar=np.array(2.0, np.float32),
        empty=np.zeros((0, 3), np.float32),
    )
    models = [
        {k: (v.astype(np.float64) + d).astype(v.dtype) for k, v in base.items()}
        for d in (0.25, 0.5)
    ]
    out = merge(tmp_path, base, models)
    for k, v in base.items():
        assert out[k].dtype == v.dtype
        want = v.astype(np.float64) + 0.375
        np.testing.assert_allclose(out[k].astype(np.float64), want, rtol=1e-6)
    # float64 is computed in float64.
    assert abs(out["double"][0] - (1 / 3 + 0.375)) < 1e-15


def test_models_may_have_other_float_dtypes(tmp_path):
    base = small()
    model = {k: (v + 0.5).astype(np.float64) for k, v in base.items()}
    other = {k: (v + 0.5).astype(np.float16) for k, v in base.items()}
    out = merge(tmp_path, base, [model, other], report_files=True)
    for k, v in base.items():
        np.testing.assert_allclose(out[k], v + 0.5, atol=2e-3)
        assert out[k].dtype == np.float32


def test_dtype_and_out_dtype(tmp_path):
    base = small()
    out = merge(tmp_path / "1", base, [moved(base)], out_dtype="bf16", dtype="float64")
    assert {v.dtype for v in out.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for bad in ("int8", "nonsense"):
        with pytest.raises(
            ValueError, match=f"out_dtype: got '{bad}', expected one of float"
        ):
            merge(tmp_path / bad, base, [moved(base)], out_dtype=bad)
    with pytest.raises(ValueError, match="expected one of float64, float32"):
        merge(tmp_path / "3", base, [moved(base)], dtype="bfloat16")


def test_integers_and_bools_come_from_the_base(tmp_path):
    integers = {
        "position_ids": np.array([2**40 + 1, -3], np.int64),
        "mask": np.array([True, False]),
    }
    base = small(**integers)
    model = moved(base) | {"position_ids": np.array([7, -3], np.int64)}
    save(tmp_path / "b", base)
    save(tmp_path / "m", model)
    result = merging.merge_checkpoints(
        TA, tmp_path / "b", [tmp_path / "m"], tmp_path / "out", progress=False
    )
    out = load(tmp_path / "out")
    for k, v in integers.items():
        np.testing.assert_array_equal(out[k], v)
        assert out[k].dtype == v.dtype
    (note,) = [n for n in result.notes if "position_ids" in n]
    assert "differs in m: integers are not merged" in note
    assert not any("mask" in n for n in result.notes)


def test_integer_weights_of_a_quantised_model_are_refused(tmp_path):
    base = small()
    model = base | {"embed.weight": np.zeros((5, 4), np.int8)}
    with pytest.raises(CheckpointError, match=r"embed\.weight: float32.*int8.*quantis"):
        merge(tmp_path, base, [model])


# -- names and shapes ------------------------------------------------------------------


def test_differences_are_listed(tmp_path):
    base = small()
    model = moved(base)
    del model["embed.weight"]
    model["head.weight"] = np.zeros(3, np.float32)
    model["layers.0.mlp.weight"] = np.zeros((4, 7), np.float32)
    with pytest.raises(CheckpointError) as e:
        merge(tmp_path, base, [model])
    text = str(e.value)
    assert "missing in m0: embed.weight" in text
    assert "only in m0: head.weight" in text
    assert "layers.0.mlp.weight (4, 7) for (4, 6)" in text
    assert not (tmp_path / "out").exists()


def test_missing_tensors_from_the_base_by_request(tmp_path):
    base = small()
    model = moved(base)
    del model["embed.weight"]
    model["head.weight"] = np.zeros(3, np.float32)
    save(tmp_path / "b", base)
    save(tmp_path / "m", model)
    result = merging.merge_checkpoints(
        TA,
        tmp_path / "b",
        [tmp_path / "m"],
        tmp_path / "out",
        allow_missing="base",
        progress=False,
    )
    out = load(tmp_path / "out")
    assert out.keys() == base.keys()
    np.testing.assert_array_equal(out["embed.weight"], base["embed.weight"])
    assert not np.array_equal(out["layers.0.mlp.weight"], base["layers.0.mlp.weight"])
    text = (tmp_path / "out" / "merge_report.md").read_text()
    for said in (
        "embed.weight missing in m: copied from the base",
        "head.weight only in m: left out of the merge",
    ):
        assert said in "\n".join(result.notes)
        assert said in text


def test_include_and_exclude(tmp_path):
    base = small()
    model = moved(base)
    model["embed.weight"] = np.zeros((9, 4), np.float32)  # another vocabulary
    out = merge(tmp_path, base, [model], exclude="embed")
    np.testing.assert_array_equal(out["embed.weight"], base["embed.weight"])
    np.testing.assert_allclose(
        out["layers.1.mlp.weight"], base["layers.1.mlp.weight"] + 0.125, rtol=1e-6
    )
    memory = merging.merge(TA, base, [moved(base)], include=r"layers\.1")
    assert memory["layers.0.mlp.weight"] is base["layers.0.mlp.weight"]
    with pytest.raises(ValueError, match="include='decoder' matches none"):
        merge(tmp_path / "2", base, [model], include="decoder")


def test_lines_counts_all_blocks_even_if_some_are_excluded(tmp_path):
    base = small()
    method = merging.with_lines(merging.task_arithmetic(), alpha=0.0, beta=1.0)
    kwargs = {"exclude": r"layers\.0"}
    out = merge(tmp_path, base, [moved(base)], method, **kwargs)
    last = base["layers.1.mlp.weight"]
    np.testing.assert_allclose(out["layers.1.mlp.weight"], last + 0.25, rtol=1e-6)
    assert_same_bits(out, merging.merge(method, base, [moved(base)], **kwargs))


def test_whole_model_threshold_counts_selected_tensors_only(tmp_path):
    base = small(big=np.zeros(1000, np.float32))
    model = moved(base) | {"big": np.ones(1000, np.float32) * 100}
    method = merging.ties(density=0.2)
    out = merge(tmp_path, base, [model], method, exclude="big")
    want = merging.merge(method, base, [model], exclude="big")
    assert_same_bits(out, want)
    assert not np.array_equal(out["embed.weight"], base["embed.weight"])


# -- Hugging Face directories ----------------------------------------------------------


def hugging_face(path: Path, params, **config) -> Path:
    save(path, params)
    settings = {"model_type": "llama", "torch_dtype": "float32", **config}
    (path / "config.json").write_text(json.dumps(settings))
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    return path


@pytest.mark.usefixtures("figures")
def test_directory_layout_and_model_card(tmp_path):
    base = small()
    hugging_face(tmp_path / "b", base)
    hugging_face(tmp_path / "m", moved(base))
    merging.merge_checkpoints(
        TA,
        tmp_path / "b",
        [tmp_path / "m"],
        tmp_path / "out",
        out_dtype="float16",
        max_shard_size=120,
        recipe={"method": "task_arithmetic", "scale": 0.5, "overwrite": True},
        progress=False,
    )
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {
        "config.json",
        "tokenizer.json",
        "README.md",
        "merge_report.md",
        "merge_report.json",
        "merge_report_depth.png",
        "merge_report_cosines.png",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "float16"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model:\n- ")
    assert "license: mit" in card
    assert "- merge\n" in card
    report = (tmp_path / "out" / "merge_report.md").read_text()
    assert "--method=task_arithmetic" in report
    assert "--scale=0.5" in report


def test_tied_weights_stay_tied_and_are_written_once(tmp_path):
    base = small()
    base["model.embed_tokens.weight"] = base.pop("embed.weight")
    tied = {"tie_word_embeddings": True}

    def with_head(params):
        return params | {"lm_head.weight": params["model.embed_tokens.weight"].copy()}

    hugging_face(tmp_path / "b", with_head(base), **tied)
    # One model stores the head, the other does not.
    hugging_face(tmp_path / "m1", with_head(moved(base)), **tied)
    hugging_face(tmp_path / "m2", moved(base, 0.75), **tied)
    merging.merge_checkpoints(
        merging.ties(density=1.0),
        tmp_path / "b",
        [tmp_path / "m1", tmp_path / "m2"],
        tmp_path / "out",
        progress=False,
    )
    out = load(tmp_path / "out")
    assert out.keys() == base.keys()
    want = merging.merge(
        merging.ties(density=1.0), base, [moved(base), moved(base, 0.75)]
    )
    assert_same_bits(out, want)
    # A head that was trained apart would be lost: refused.
    apart = with_head(moved(base))
    apart["lm_head.weight"] = apart["lm_head.weight"] + 1
    hugging_face(tmp_path / "m3", apart, **tied)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is tied .* not in m3"):
        merging.merge_checkpoints(
            TA, tmp_path / "b", [tmp_path / "m3"], tmp_path / "o", progress=False
        )


@pytest.mark.parametrize("source", ["safetensors", "orbax", "msgpack"])
@pytest.mark.parametrize("target", ["safetensors", "orbax", "msgpack"])
def test_all_formats_both_ways(tmp_path, source, target):
    base, models = make_models(2)
    method = merging.ties(density=0.3)
    paths = [
        save(tmp_path / f"in{i}", p, format=source)
        for i, p in enumerate((base, *models))
    ]
    merging.merge_checkpoints(
        method,
        paths[0],
        paths[1:],
        tmp_path / "out",
        output_format=target,
        report_files=False,
        progress=False,
    )
    assert checkpoints.open(tmp_path / "out").format == target
    want = jax.jit(lambda b, m: merging.merge(method, b, m))(base, models)
    assert_same_bits(load(tmp_path / "out"), tree.flatten(want))


# -- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize("report", [True, False])
def test_nonfinite_values_are_named_and_refused(tmp_path, value, where, report):
    for i, method in enumerate(
        (TA, merging.ties(), merging.dare(density=0.1), merging.linear())
    ):
        base = small()
        model = moved(base)
        bad = base if where == "base" else model
        bad["layers.1.mlp.weight"] = bad["layers.1.mlp.weight"].copy()
        bad["layers.1.mlp.weight"][2, 3] = value
        folder = tmp_path / str(i)
        name = "base" if where == "base" else "m1"
        message = rf"{name}: tensor 'layers\.1\.mlp\.weight' has -?(nan|inf) at .* 15"
        with pytest.raises(CheckpointError, match=message):
            merge(folder, base, [moved(small()), model], method, report_files=report)
        assert not (folder / "out").exists()


def test_nonfinite_values_by_request(tmp_path):
    base = small()
    model = moved(base)
    model["embed.weight"][0, 0] = np.nan
    out = merge(tmp_path, base, [model], allow_nonfinite=True, report_files=True)
    assert np.isnan(out["embed.weight"][0, 0])
    assert np.isfinite(out["layers.0.mlp.weight"]).all()


def test_large_values_are_not_taken_for_infinite(tmp_path):
    base = small()
    model = {k: v + np.float32(2e38) for k, v in base.items()}
    out = merge(tmp_path, base, [model, base], merging.linear(), report_files=True)
    assert np.isfinite(out["embed.weight"]).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": [1.0]}, "got 1 weights for 2 models"),
        ({"method": merging.ties(density=(0.1, 0.2, 0.3))}, "got 3 densities for 2"),
        ({"method": merging.dare(density=(0.1, 0.2, 0.3))}, "got 3 for 2 models"),
        ({"method": merging.model_stock(), "count": 1}, "at least 2 models, got 1"),
        ({"method": merging.slerp(), "count": 1}, "exactly 2 models, got 1"),
        ({"method": merging.chain(merging.trim())}, "left 2 values, expected 1"),
        ({"count": 0}, "no models to merge"),
        ({"max_memory": 1000}, r"more than max_memory = 1\.0 kB"),
    ],
)
def test_wrong_arguments(tmp_path, kwargs, message):
    base = small()
    count = kwargs.pop("count", 2)
    models = [moved(base, 0.1 * (t + 1)) for t in range(count)]
    method = kwargs.pop("method", TA)
    with pytest.raises(ValueError, match=message):
        merge(tmp_path, base, models, method, **kwargs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_density_out_of_range(density):
    for recipe in (merging.ties, merging.dare, merging.magnitude_prune):
        with pytest.raises(ValueError, match=r"density: got .* \(0, 1\]"):
            recipe(density=density)


def test_options_are_checked_by_name():
    for kwargs in (
        {"trim_scope": "layer"},
        {"election": "vote"},
        {"zero_sign": "+"},
        {"combine": "median"},
        {"rescale": "l2"},
        {"normalise": "yes"},
    ):
        with pytest.raises(ValueError, match="expected one of"):
            merging.ties(**kwargs)


def test_output_inside_an_input(tmp_path):
    base = small()
    save(tmp_path / "b", base)
    save(tmp_path / "m", moved(base))
    for output in (tmp_path / "m" / "out", tmp_path / "m", tmp_path):
        with pytest.raises(CheckpointError, match="overlap"):
            merging.merge_checkpoints(
                TA, tmp_path / "b", [tmp_path / "m"], output, overwrite=True
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "m"]


def test_no_base_only_for_methods_on_parameters(tmp_path):
    base = small()
    for t in range(2):
        save(tmp_path / f"m{t}", moved(base, t))
    paths = [tmp_path / "m0", tmp_path / "m1"]
    result = merging.merge_checkpoints(
        merging.linear(), None, paths, tmp_path / "out", progress=False
    )
    assert "No base" in result.notes[0]
    np.testing.assert_allclose(
        load(tmp_path / "out")["embed.weight"], base["embed.weight"] + 0.5, atol=1e-6
    )
    with pytest.raises(ValueError, match="needs a base"):
        merging.merge_checkpoints(TA, None, paths, tmp_path / "o2", progress=False)


def test_dry_run_reads_no_weights_and_writes_nothing(tmp_path):
    base = small()
    save(tmp_path / "b", base)
    save(tmp_path / "m", moved(base))
    result = merging.merge_checkpoints(
        merging.ties(),
        tmp_path / "b",
        [tmp_path / "m"],
        tmp_path / "out",
        dry_run=True,
    )
    assert result.output is None
    for said in ("3 merged (68 parameters)", "passes       3", "peak memory"):
        assert said in result.plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "m"]


def test_a_killed_merge_leaves_no_output(tmp_path):
    import signal
    import subprocess
    import sys
    import time

    base, models = make_models(2)
    paths = [save(tmp_path / f"in{i}", p) for i, p in enumerate((base, *models))]
    code = f"""
import os, time
from multitask_jax import merging
from multitask_jax.checkpoints import safetensors_writer
write = safetensors_writer.SafetensorsWriter.write
def slow(self, *args):
    write(self, *args)
    os.write(1, b"written\\n")
    time.sleep(30)
safetensors_writer.SafetensorsWriter.write = slow
merging.merge_checkpoints(merging.task_arithmetic(), {str(paths[0])!r},
    {[str(p) for p in paths[1:]]!r}, {str(tmp_path / "out")!r}, progress=False)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    time.sleep(0.05)
    merging.merge_checkpoints(
        TA, paths[0], paths[1:], tmp_path / "out", progress=False, report_files=False
    )
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"in0", "in1", "in2", "out"}
