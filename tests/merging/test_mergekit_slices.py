"""Frankenmerges: slices of layers, renumbered."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.checkpoints import CheckpointError
from tests.merging.common import load, save

LAYERS = 4


def model(seed, *, layers=LAYERS, width=4, extra=(), drop=()):
    rng = np.random.default_rng(seed)
    names = {"model.embed_tokens.weight": (6, width), "model.norm.weight": (width,)}
    for i in range(layers):
        names |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (width, width),
            f"model.layers.{i}.mlp.up_proj.weight": (8, width),
        }
    names |= {"lm_head.weight": (6, width), **dict.fromkeys(extra, (2, 2))}
    return {
        k: rng.standard_normal(s).astype(np.float32)
        for k, s in names.items()
        if k not in drop
    }


@pytest.fixture
def folder(tmp_path):
    config = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": LAYERS,
        "layer_types": [f"kind{i}" for i in range(LAYERS)],
        "vocab_size": 6,
        "torch_dtype": "float32",
    }
    for i, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, model(i))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def source(name, start, stop, **parameters):
    out = {"model": str(name), "layer_range": [start, stop]}
    return out | ({"parameters": parameters} if parameters else {})


def run(folder, content, **kwargs):
    text = json.dumps(content).replace('"@', f'"{folder}/')
    options = {"progress": False, "report_files": False} | kwargs
    result = merging.merge_mergekit(json.loads(text), folder / "out", **options)
    config = folder / "out" / "config.json"
    return (
        load(folder / "out"),
        json.loads(config.read_text()) if config.exists() else None,
        result,
    )


FRANKEN = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [source("@a", 0, 2)]},
        {"sources": [source("@b", 1, 4)]},
        {"sources": [source("@a", 3, 4)]},
    ],
}


def test_layers_are_copied_and_renumbered(folder):
    out, config, _ = run(folder, FRANKEN, report_files=True)
    a, b = load(folder / "a"), load(folder / "b")
    origins = [(a, 0), (a, 1), (b, 1), (b, 2), (b, 3), (a, 3)]
    want = {}
    for new, (m, old) in enumerate(origins):
        for rest in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
            name = f"model.layers.{new}.{rest}"
            want[name] = m[f"model.layers.{old}.{rest}"]
    # Embeddings from the first slice, norm and head from the last: both are a's.
    want |= {k: v for k, v in a.items() if "layers" not in k}
    assert out.keys() == want.keys()
    for k, v in want.items():
        np.testing.assert_array_equal(out[k], v, err_msg=k)
    assert config["num_hidden_layers"] == 6
    assert config["num_attention_heads"] == LAYERS  # the same value, another thing
    assert config["layer_types"] == [f"kind{i}" for i in (0, 1, 1, 2, 3, 3)]
    report = (folder / "out" / "merge_report.md").read_text()
    assert "| 2 to 4 |" in report
    assert "passthrough" in report


def test_outside_tensors_follow_their_slice(folder):
    content = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("@a", 0, 1)]},
            {"sources": [source("@b", 1, 4)]},
        ],
    }
    out, config, _ = run(folder, content)
    a, b = load(folder / "a"), load(folder / "b")
    for name, m in (
        ("model.embed_tokens.weight", a),
        ("model.norm.weight", b),
        ("lm_head.weight", b),
    ):
        np.testing.assert_array_equal(out[name], m[name])
    assert config["num_hidden_layers"] == 4


def test_llama_slices(shared, tmp_path):
    models = shared / "golden" / "merging" / "models" / "llama"
    content = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source(models / "ft1", 0, 1)]},
            {"sources": [source(models / "ft2", 1, 2)]},
            {"sources": [source(models / "ft1", 1, 4)]},
        ],
    }
    out, config, _ = run(tmp_path, content)
    one, two = load(models / "ft1"), load(models / "ft2")
    origins = [(one, 0), (two, 1), (one, 1), (one, 2), (one, 3)]
    for name, value in out.items():
        parts = name.split(".")
        m, old = one, None
        if parts[1] == "layers":
            m, old = origins[int(parts[2])]
            parts[2] = str(old)
        np.testing.assert_array_equal(value, m[".".join(parts)], err_msg=name)
    assert len(out) == 3 + 5 * 9
    assert config["num_hidden_layers"] == 5


def test_scale_and_dtype(folder):
    content = {
        "merge_method": "passthrough",
        "dtype": "bfloat16",
        "slices": [
            {
                "sources": [
                    source(
                        "@a",
                        0,
                        4,
                        scale=[{"filter": "q_proj", "value": [0, 3]}, {"value": 1}],
                    )
                ]
            }
        ],
    }
    out, config, _ = run(folder, content)
    a = {k: v.astype(ml_dtypes.bfloat16) for k, v in load(folder / "a").items()}
    for k, v in a.items():
        factor = int(k.split(".")[2]) if "q_proj" in k else 1  # 3 i / 3
        assert out[k].dtype == v.dtype
        want = (v.astype(np.float32) * factor).astype(v.dtype)
        np.testing.assert_array_equal(out[k], want, err_msg=k)
    assert config["torch_dtype"] == "bfloat16"


def test_merged_slices_with_parameters_by_slice(folder):
    """Levels: source, slice, top; other layers of the sources are merged."""
    content = {
        "merge_method": "linear",
        "parameters": {"weight": 1.0},
        "slices": [
            {"sources": [source("@a", 0, 2, weight=3), source("@b", 2, 4)]},
            {
                "sources": [source("@a", 1, 2), source("@b", 1, 2)],
                "parameters": {"normalize": False, "weight": 0.25},
            },
        ],
    }
    out, config, _ = run(folder, content, report_files=True)
    a, b = load(folder / "a"), load(folder / "b")
    rest = "mlp.up_proj.weight"
    for new, (i, j, u, v) in enumerate(
        [(0, 2, 0.75, 0.25), (1, 3, 0.75, 0.25), (1, 1, 0.25, 0.25)]
    ):
        want = u * a[f"model.layers.{i}.{rest}"] + v * b[f"model.layers.{j}.{rest}"]
        got = out[f"model.layers.{new}.{rest}"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    name = "model.embed_tokens.weight"
    want = 0.75 * a[name] + 0.25 * b[name]
    np.testing.assert_allclose(out[name], want, rtol=1e-5, atol=1e-6)
    name = "lm_head.weight"
    np.testing.assert_allclose(
        out[name], 0.25 * (a[name] + b[name]), rtol=1e-5, atol=1e-6
    )
    assert config["num_hidden_layers"] == 3
    report = (folder / "out" / "merge_report.md").read_text()
    assert "varies" in report


def test_slices_of_task_vectors_take_the_base_along(folder):
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "@base",
        "parameters": {"weight": [0, 1]},
        "slices": [
            {"sources": [source("@a", 1, 4), source("@b", 1, 4)]},
            {"sources": [source("@base", 0, 1)]},  # alone: as it is
        ],
    }
    out, _, _ = run(folder, content)
    base, a, b = (load(folder / n) for n in ("base", "a", "b"))
    rest = "self_attn.q_proj.weight"
    for i, w in enumerate((0, 0.5, 1)):
        name = f"model.layers.{i + 1}.{rest}"
        want = base[name] + w * (a[name] - base[name]) + w * (b[name] - base[name])
        got = out[f"model.layers.{i}.{rest}"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        out[f"model.layers.3.{rest}"], base[f"model.layers.0.{rest}"]
    )
    np.testing.assert_array_equal(out["lm_head.weight"], base["lm_head.weight"])


def test_what_is_wrong_with_slices(folder):
    def refused(match, slices, error=ValueError, **top):
        with pytest.raises(error, match=match):
            run(folder, {"merge_method": "passthrough", "slices": slices, **top})
        assert not (folder / "out").exists()

    refused(
        r"slices\[0\].sources\[0\].layer_range: got \[2, 5\], but .*a has 4 layers",
        [{"sources": [source("@a", 2, 5)]}],
    )
    refused(
        r"slices\[0\].sources: passthrough merges exactly 1 models, got 2",
        [{"sources": [source("@a", 0, 1), source("@b", 0, 1)]}],
    )
    refused(
        r"base_model .*base is not among them, and they have different layer_ranges",
        [{"sources": [source("@a", 0, 2), source("@b", 1, 3)]}],
        merge_method="ties",
        base_model="@base",
        parameters={"weight": 1},
    )
    refused(
        r"base_model .*base is listed with different layer_ranges",
        [{"sources": [source("@base", 0, 2), source("@base", 1, 3)]}],
        merge_method="ties",
        base_model="@base",
    )
    save(folder / "hole", {k: v for k, v in model(5).items() if ".1." not in k})
    refused(
        r"hole: slices need layers .* has the numbers \[0, 2, 3\], expected 0 to 2",
        [{"sources": [source("@hole", 0, 2)]}],
        CheckpointError,
    )
    name = "model.layers.1.mlp.up_proj.weight"
    save(folder / "lacks", model(6, drop=(name,)))
    refused(
        r"slices\[0\].sources\[1\]: .*lacks has other tensors than .*a in this slice:"
        rf" missing \['{name}'\]",
        [{"sources": [source("@a", 0, 2), source("@lacks", 0, 2)]}],
        CheckpointError,
        merge_method="linear",
        parameters={"weight": 1},
    )
    save(folder / "wide", model(7, width=5))
    refused(
        r"the checkpoints differ .*\n  shapes in wide: ",
        [{"sources": [source("@a", 0, 2), source("@wide", 0, 2)]}],
        CheckpointError,
        merge_method="linear",
        parameters={"weight": 1},
    )


def test_several_stacks_are_refused(shared, tmp_path):
    t5 = shared / "golden" / "merging" / "models" / "t5" / "ft1"
    content = {
        "merge_method": "passthrough",
        "slices": [{"sources": [source(t5, 0, 1)]}],
    }
    with pytest.raises(CheckpointError, match=r"one stack, got 2: decoder/block, enc"):
        run(tmp_path, content)


def test_a_config_without_a_layer_count(folder):
    (folder / "a" / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(CheckpointError, match=r"no key like num_hidden_layers has the"):
        run(folder, FRANKEN)
    assert not (folder / "out").exists()
    (folder / "a" / "config.json").unlink()
    _, config, result = run(folder, FRANKEN)
    assert config is None
    assert "No config.json: the output has 6 layers." in result.notes


def test_names_of_other_libraries(folder):
    """block_3/kernel, h.3.weight, encoderblock_3: whatever tree.block_depths finds."""
    rng = np.random.default_rng(0)
    for joined in ("block_{}/mlp/kernel", "h.{}.mlp.kernel"):
        names = [joined.format(i) for i in range(12)]
        params = {n: rng.standard_normal((2, 2)).astype(np.float32) for n in names}
        where = folder / f"x{joined[0]}"
        save(where, params)
        content = {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [source(where, 10, 12)]},
                {"sources": [source(where, 0, 1)]},
            ],
        }
        out, _, _ = run(folder, content, overwrite=True)
        for new, old in enumerate((10, 11, 0)):
            np.testing.assert_array_equal(out[names[new]], params[names[old]])


def test_dry_run_tells_where_tensors_come_from(folder):
    content = json.loads(json.dumps(FRANKEN).replace('"@', f'"{folder}/'))
    result = merging.merge_mergekit(content, "", dry_run=True)
    assert "layers       6, from 3 slices" in result.plan
    assert "model.embed_tokens.weight <- a" in result.plan
    assert result.output is None


def test_filters_of_a_source_look_at_its_own_names(folder):
    """Layer 3 of b is the output's layer 1; a typo is still refused."""
    scale = [{"filter": "layers.3.mlp", "value": 0.5}, {"value": 1}]
    content = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("@a", 0, 1)]},
            {"sources": [source("@b", 3, 4, scale=scale)]},
        ],
    }
    out, _, _ = run(folder, content)
    b = load(folder / "b")
    for rest, factor in (("mlp.up_proj.weight", 0.5), ("self_attn.q_proj.weight", 1)):
        want = factor * b[f"model.layers.3.{rest}"]
        np.testing.assert_array_equal(out[f"model.layers.1.{rest}"], want)
    scale[0]["filter"] = "layers.3.mpl"
    with pytest.raises(ValueError, match=r"filter 'layers.3.mpl' is in none of"):
        run(folder, content, overwrite=True)


@pytest.mark.parametrize(("name", "end"), [("score.weight", 0), ("pos_embed", -1)])
def test_tensors_at_the_wrong_end_are_named(folder, name, end):
    """What only the first model has after its layers, or the last one before them."""
    changed = folder / ("a", "b")[end]
    shutil.rmtree(changed)
    save(changed, model(1, extra=(name,)))
    content = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("@a", 0, 2)]},
            {"sources": [source("@b", 2, 4)]},
        ],
    }
    with pytest.raises(CheckpointError, match=f"{name}.*it would be lost"):
        run(folder, content)
    assert not (folder / "out").exists()
