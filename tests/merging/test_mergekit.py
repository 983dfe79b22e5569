"""mergekit recipes: parameters over depth, any architecture, inputs and outputs."""

import json

import numpy as np
import pytest

from multitask_jax import checkpoints, merging, tree
from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging import execution
from tests.merging.common import assert_same_bits, load, save

LAYERS = 4


def params(seed, layers=LAYERS, scale=1.0):
    rng = np.random.default_rng(seed)
    names = {"embed.weight": (8, 6), "norm.weight": (6,)}
    for i in range(layers):
        names |= {f"layers.{i}.attn.q.weight": (8, 6), f"layers.{i}.mlp.weight": (8, 6)}
    return {
        k: (scale * rng.standard_normal(s)).astype(np.float32) for k, s in names.items()
    }


def models_in(folder, count=3, layers=LAYERS):
    base = params(0, layers)
    save(folder / "base", base)
    for t in range(1, count + 1):
        delta = params(t, layers, 0.1)
        save(folder / f"m{t}", {k: v + delta[k] for k, v in base.items()})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models_in(tmp_path_factory.mktemp("models"))


def run(folder, out, method, models, *, base=None, seed=0, **top):
    """models: name -> its parameters."""
    content = {
        "merge_method": method,
        "models": [{"model": str(folder / m), "parameters": p} for m, p in models],
        **top,
    }
    if base:
        content["base_model"] = str(folder / base)
    result = merging.merge_mergekit(
        content, out, progress=False, report_files=False, seed=seed
    )
    return load(out), result


def plain(*names, **common):
    return [(n, common) for n in names]


MEAN = {
    "election": "weighted_mass",
    "zero_sign": "positive",
    "combine": "mean",
}


# -- parameters over depth -------------------------------------------------------------


def test_densities_over_depth(folder, tmp_path, monkeypatch):
    """Each layer as if merged alone; programs are compiled for one of them."""
    streams = []
    original = execution.Stream

    def spy(*args, **kwargs):
        streams.append(original(*args, **kwargs))
        return streams[-1]

    monkeypatch.setattr(execution, "Stream", spy)
    got, _ = run(
        folder,
        tmp_path / "recipe",
        "ties",
        plain("m1", "m2"),
        base="base",
        parameters={"weight": 1, "density": [0.2, 0.8]},
    )
    assert len(streams) == 4  # densities .2 (also outside the layers), .4, .6, .8
    assert len({id(s.programs) for s in streams}) == 1
    depths = tree.block_depths(list(got))
    for density in (0.2, 0.4, 0.6000000000000001, 0.8):
        out = tmp_path / str(density)
        merging.merge_checkpoints(
            merging.ties(density=density, trim_scope="tensor", **MEAN),
            folder / "base",
            [folder / "m1", folder / "m2"],
            out,
            progress=False,
            report_files=False,
        )
        layer = round((density - 0.2) / 0.2)
        want = {
            k: v
            for k, v in load(out).items()
            if (0 if depths[k] is None else depths[k].index) == layer
        }
        assert len(want) == (4 if layer == 0 else 2)
        assert_same_bits({k: got[k] for k in want}, want)


def test_lambda_over_depth(folder, tmp_path):
    got, result = run(
        folder,
        tmp_path / "out",
        "task_arithmetic",
        plain("m1", "m2"),
        base="base",
        parameters={
            "weight": 0.5,
            "lambda": [{"filter": "mlp", "value": [0, 3]}, {"value": 2}],
        },
    )
    base, m1, m2 = (load(folder / n) for n in ("base", "m1", "m2"))
    for k, v in base.items():
        factor = int(k.split(".")[1]) if "mlp" in k else 2  # 3 i / 3
        want = v + factor * 0.5 * ((m1[k] - v) + (m2[k] - v))
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6, err_msg=k)
    assert any(n.startswith("Gradients: tensors outside") for n in result.notes)


def test_a_gradient_of_one_layer_takes_its_end(tmp_path):
    models_in(tmp_path, 1, layers=1)
    got, _ = run(
        tmp_path,
        tmp_path / "out",
        "task_arithmetic",
        plain("m1", weight=[0, 0.5, 1]),
        base="base",
    )
    base, m1 = load(tmp_path / "base"), load(tmp_path / "m1")
    for k, v in base.items():
        want = m1[k] if k.startswith("layers.0") else v
        np.testing.assert_allclose(got[k], want, rtol=1e-6, atol=1e-6, err_msg=k)


def test_t5_has_gradients_in_both_stacks(shared, tmp_path):
    models = shared / "golden" / "merging" / "models" / "t5"
    got, _ = run(
        models,
        tmp_path / "out",
        "task_arithmetic",
        plain("ft1", weight=[0, 1]),
        base="base",
        dtype="float32",
    )
    base, ft = load(models / "base"), load(models / "ft1")
    assert got.keys() == base.keys()
    for k in base:
        want = (
            ft[k] if k.startswith(("encoder.block.1", "decoder.block.1")) else base[k]
        )
        np.testing.assert_allclose(got[k], want, rtol=1e-6, atol=1e-6, err_msg=k)


# -- any architecture ------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["vit", "bert", "clip_vision", "t5"])
def test_no_tensor_is_left_out(shared, tmp_path, arch):
    """mergekit wrote 8 of 56 tensors of the ViT, and stops on BERT."""
    models = shared / "golden" / "merging" / "models" / arch
    got, _ = run(
        models,
        tmp_path / "out",
        "task_arithmetic",
        plain("ft1", "ft2", weight=0.5),
        base="base",
    )
    base, one, two = (load(models / n) for n in ("base", "ft1", "ft2"))
    assert got.keys() == base.keys()
    for k, v in base.items():
        want = v + 0.5 * (one[k] - v) + 0.5 * (two[k] - v)
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6, err_msg=k)
        assert (got[k] != v).any()
    config = [
        json.loads((p / "config.json").read_text())
        for p in (models / "base", tmp_path / "out")
    ]
    assert config[0] == config[1]


def test_a_model_listed_twice_counts_twice(folder, tmp_path):
    twice = [("m1", {"weight": 0.5}), ("m1", {"weight": 0.25})]
    got, _ = run(folder, tmp_path / "1", "task_arithmetic", twice, base="base")
    base, m1, m2 = (load(folder / n) for n in ("base", "m1", "m2"))
    for k, v in base.items():
        np.testing.assert_allclose(got[k], v + 0.75 * (m1[k] - v), rtol=1e-5, atol=1e-6)
    got, _ = run(folder, tmp_path / "2", "linear", plain("m1", "m1", "m2", weight=1))
    for k in base:
        want = (2 * m1[k] + m2[k]) / 3
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)


def test_the_base_among_the_models(folder, tmp_path):
    """It is where task vectors start, not one of them; of an average, one of them."""
    for method, common in (
        ("ties", {"weight": 0.7, "density": 0.4}),
        ("sce", {"select_topk": 0.5}),
    ):
        out = [
            run(
                folder,
                tmp_path / method / str(len(names)),
                method,
                plain(*names),
                base="base",
                parameters=common,
            )[0]
            for names in (("m1", "m2"), ("m1", "base", "m2"))
        ]
        assert_same_bits(*out)
    got, result = run(
        folder,
        tmp_path / "linear",
        "linear",
        plain("m1"),
        base="base",
        parameters={"weight": 1},
    )
    base, m1 = load(folder / "base"), load(folder / "m1")
    for k in base:
        np.testing.assert_allclose(got[k], (base[k] + m1[k]) / 2, rtol=1e-5, atol=1e-6)
    assert any("one of the models that linear averages" in n for n in result.notes)


def test_slerp_starts_at_the_base_whatever_the_order(folder, tmp_path):
    for t, names, want in (
        (0, ("m1", "m2"), "m2"),
        (1, ("m2", "m1"), "m1"),
        (1, ("m3",), "m3"),
    ):
        got, _ = run(
            folder,
            tmp_path / want,
            "slerp",
            plain(*names),
            base="m2",
            parameters={"t": t},
        )
        for k, v in load(folder / want).items():
            np.testing.assert_allclose(got[k], v, rtol=1e-5, atol=1e-6)


def test_bfloat16_inputs_and_output(folder, tmp_path):
    import ml_dtypes

    got, _ = run(
        folder,
        tmp_path / "out",
        "linear",
        plain("m1", "m2", weight=1),
        dtype="bfloat16",
    )
    m1, m2 = (load(folder / n) for n in ("m1", "m2"))
    for k, v in m1.items():
        a, b = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (v, m2[k]))
        assert got[k].dtype == ml_dtypes.bfloat16
        want = ((a + b) / 2).astype(ml_dtypes.bfloat16)
        assert_same_bits({"x": got[k]}, {"x": want})


def test_integers_and_tied_heads(tmp_path):
    base = params(0) | {"position_ids": np.arange(4), "lm_head.weight": None}
    base["lm_head.weight"] = base["embed.weight"]
    model = {k: v + np.asarray(1, v.dtype) for k, v in base.items()}
    for name, x in (("base", base), ("m1", model)):
        save(tmp_path / name, x)
        config = {"tie_word_embeddings": True, "vocab_size": 8}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    got, result = run(
        tmp_path, tmp_path / "out", "ties", plain("m1", weight=1), base="base"
    )
    np.testing.assert_array_equal(got["position_ids"], np.arange(4))
    assert any("position_ids (int64) differs in m1" in n for n in result.notes)
    assert "lm_head.weight" not in got  # loaders tie it
    np.testing.assert_allclose(got["embed.weight"], model["embed.weight"], rtol=1e-6)


def test_paths_start_at_the_recipe_then_at_the_working_directory(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(folder)
    save(tmp_path / "recipes" / "m2", params(9))
    path = tmp_path / "recipes" / "r.yml"
    path.write_text(
        "merge_method: linear\nmodels: [{model: m1}, {model: m2}]\n"
        "parameters: {weight: 1}\n"
    )
    merging.merge_mergekit(path, tmp_path / "out", progress=False, report_files=False)
    m1, m2 = load(folder / "m1"), params(9)
    for k, v in load(tmp_path / "out").items():
        np.testing.assert_allclose(v, (m1[k] + m2[k]) / 2, rtol=1e-5, atol=1e-6)


def test_files_behind_links(folder, tmp_path):
    """As in the cache of the Hugging Face hub."""
    (tmp_path / "blob").write_bytes((folder / "m1" / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    models = plain(str(tmp_path / "model.safetensors"))
    got, _ = run(tmp_path, tmp_path / "out", "passthrough", models)
    assert_same_bits(got, load(folder / "m1"))


def test_other_formats(folder, tmp_path):
    content = {
        "merge_method": "linear",
        "models": [{"model": str(folder / "m1")}, {"model": str(folder / "m2")}],
        "parameters": {"weight": 1},
    }
    outs = []
    for kind in ("safetensors", "msgpack"):
        merging.merge_mergekit(
            content,
            tmp_path / kind,
            output_format=kind,
            progress=False,
            report_files=False,
        )
        outs.append(load(tmp_path / kind))
        assert checkpoints.open(tmp_path / kind).format == kind
    assert_same_bits(*outs)


def adapter(folder, base, name, seed):
    """A PEFT LoRA of rank 2 on one matrix, and the model that it makes of the base."""
    rng = np.random.default_rng(seed)
    rows, columns = base[name].shape
    a, b = rng.standard_normal((2, columns)), rng.standard_normal((rows, 2))
    module = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (x.astype(np.float32) for x in (a, b))
    save(folder / "files", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    (folder / "files" / "model.safetensors").rename(
        folder / "adapter_model.safetensors"
    )
    (folder / "files").rmdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [name.split(".")[-2]],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return base | {name: base[name] + 2 * b @ a}


def test_adapters_are_models(folder, tmp_path):
    base = load(folder / "base")
    name = "layers.1.attn.q.weight"
    (tmp_path / "lora").mkdir()
    changed = adapter(tmp_path / "lora", base, name, 4)
    m1 = load(folder / "m1")
    # model+adapter needs no base_model; the model may be no other's base.
    got, _ = run(
        tmp_path,
        tmp_path / "1",
        "linear",
        plain(f"{folder}/base+{tmp_path}/lora", str(folder / "m1"), weight=1),
    )
    for k, v in changed.items():
        np.testing.assert_allclose(got[k], (v + m1[k]) / 2, rtol=1e-5, atol=1e-6)
    # An adapter alone is one of base_model.
    got, _ = run(
        tmp_path,
        tmp_path / "2",
        "task_arithmetic",
        plain("lora", str(folder / "m1"), weight=0.5),
        base=str(folder / "base"),
    )
    for k, v in base.items():
        want = v + 0.5 * (changed[k] - v) + 0.5 * (m1[k] - v)
        np.testing.assert_allclose(got[k], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"a LoRA adapter changes a base"):
        run(tmp_path, tmp_path / "3", "linear", plain("lora", weight=1))


@pytest.mark.parametrize("order", [("tied", "own"), ("own", "tied")])
@pytest.mark.parametrize("base", [None, "first"])
def test_a_tied_head_meets_one_of_its_own(tmp_path, order, base):
    """The tied model's head is its embedding, whether it comes first or not."""
    shapes = {"model.embed_tokens.weight": (6, 4), "model.layers.0.mlp.weight": (4, 4)}
    rng = np.random.default_rng(0)
    models = {}
    for name in ("own", "tied"):
        heads = {} if name == "tied" else {"lm_head.weight": (6, 4)}
        models[name] = {
            k: rng.standard_normal(s).astype(np.float32)
            for k, s in (shapes | heads).items()
        }
        save(tmp_path / name, models[name])
        config = {"tie_word_embeddings": name == "tied", "vocab_size": 6}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    if base:
        got, result = run(
            tmp_path,
            out,
            "task_arithmetic",
            plain(order[1], weight=0.25),
            base=order[0],
        )
        weights = dict(zip(order, (0.75, 0.25), strict=True))
    else:
        each = [(n, {"weight": w}) for n, w in zip(order, (0.3, 0.5), strict=True)]
        got, result = run(tmp_path, out, "linear", each)
        weights = dict(zip(order, (0.375, 0.625), strict=True))
    models["tied"]["lm_head.weight"] = models["tied"]["model.embed_tokens.weight"]
    assert got.keys() == models["own"].keys()
    for k, v in got.items():
        want = sum(w * models[n][k] for n, w in weights.items())
        np.testing.assert_allclose(v, want, rtol=1e-5, atol=1e-6, err_msg=k)
    assert any("lm_head.weight of tied is its model.embed" in n for n in result.notes)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
