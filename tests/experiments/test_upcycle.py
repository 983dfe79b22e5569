"""Dense checkpoints to mixtures, on disk, and back by the same names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import upcycle
from multitask_jax import checkpoints, merging, moe, tree
from multitask_jax.layers.moe import MoE
from tests.experiments.upcycle_common import D, H, convert, llama, read, run


def test_specialists_become_mixtrals_experts(tmp_path, three):
    models = ",".join(str(tmp_path / n) for n in "abc")
    result = run(tmp_path / "moe", models=models)
    assert result.experts == 3
    found = read(tmp_path / "moe")
    for i in range(2):
        block = f"model.layers.{i}"
        for e, model in enumerate(three.values()):
            for dense, there in (("gate", 1), ("down", 2), ("up", 3)):
                np.testing.assert_array_equal(
                    found.pop(f"{block}.block_sparse_moe.experts.{e}.w{there}.weight"),
                    model[f"{block}.mlp.{dense}_proj.weight"],
                )
        gate = found.pop(f"{block}.block_sparse_moe.gate.weight")
        assert gate.shape == (3, D)
        assert np.std(gate) == pytest.approx(0.02, rel=0.7)
    for name, x in found.items():  # the rest, all of it, is the mean
        mean = sum(m[name] for m in three.values()) / 3
        np.testing.assert_allclose(x, mean, rtol=1e-6, atol=1e-6)
    assert len(found) == 1 + 2 * 2
    about = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert about["model_type"] == "mixtral"
    assert (about["num_local_experts"], about["num_experts_per_tok"]) == (3, 2)


@pytest.mark.parametrize("layout", ["mixtral", "names"])
def test_copies_and_back_give_the_same_bytes(tmp_path, three, layout, capsys):
    # The mean of two equal values is exact.
    run(tmp_path / "moe", models=str(tmp_path / "a"), experts=2, layout=layout)
    run(tmp_path / "dense", to_dense=True, models=str(tmp_path / "moe"), layout=layout)
    assert "left out 2 tensors of gates" in capsys.readouterr().out
    found = read(tmp_path / "dense")
    assert found.keys() == three["a"].keys()
    for name, x in three["a"].items():
        assert found[name].tobytes() == x.tobytes(), name
    about = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert about["hidden_size"] == D
    assert "num_experts_per_tok" not in about


STYLES = {  # names of matrices, and of one norm
    "bert": """encoder.layer.0.attention.output.dense.weight
        encoder.layer.0.intermediate.dense.weight encoder.layer.0.output.dense.weight
        encoder.layer.0.output.LayerNorm.weight""",
    "t5": """encoder.block.0.layer.1.DenseReluDense.wi.weight
        encoder.block.0.layer.1.DenseReluDense.wo.weight""",
    "opt": "model.decoder.layers.0.fc1.weight model.decoder.layers.0.fc2.weight",
    "gpt2": "transformer.h.0.mlp.c_fc.weight transformer.h.0.mlp.c_proj.weight",
    "block": "layer_0/intermediate/kernel layer_0/output/kernel layer_0/query/kernel",
    "flax swiglu": """layer_0/mlp/gate/kernel layer_0/mlp/up/kernel
        layer_0/mlp/down/kernel""",
    "flax mlp": "layer_0/mlp/up/kernel layer_0/mlp/down/kernel",
}


@pytest.mark.parametrize("style", STYLES)
def test_names_come_back(tmp_path, style):
    """With --base always; of stacks without, as `layers.transformer.Block` has them."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=(D,) if "Norm" in name else (D, H)).astype(np.float32)
        for name in STYLES[style].split()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    there = upcycle.Config(
        models=str(tmp_path / "a.safetensors"),
        experts=2,
        output=str(tmp_path / "moe"),
        progress=False,
    )
    upcycle.run(there)
    for base in (None, str(tmp_path / "a.safetensors")):
        if base is None and style == "flax mlp":
            continue
        back = upcycle.Config(
            to_dense=True,
            models=str(tmp_path / "moe"),
            base=base,
            output=str(tmp_path / f"dense_{base is None}"),
            progress=False,
        )
        upcycle.run(back)
        found = read(tmp_path / f"dense_{base is None}")
        assert found.keys() == tensors.keys()
        for name, x in tensors.items():
            np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float8_e4m3fn"])
def test_quantised_layers_are_refused(tmp_path, dtype):
    names = STYLES["opt"].split()
    tensors = {n: np.ones((D, H), jnp.dtype(dtype)) for n in names}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=f"fc1.weight: got {dtype}"):
        run(tmp_path / "moe", models=str(tmp_path / "a.safetensors"), experts=2)
    assert not (tmp_path / "moe").exists()


def test_defaults_of_one_config_are_written_into_the_other(tmp_path, three):
    """Of keys that config.json lacks, Llama, Mixtral and Mistral take other values."""
    options = {"experts": 2}
    run(tmp_path / "moe", models=str(tmp_path / "a"), **options)
    about = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (about["rope_theta"], about["rms_norm_eps"]) == (1e4, 1e-6)
    assert about["num_key_value_heads"] == 32  # as many as heads, of which are 32
    run(tmp_path / "dense", to_dense=True, models=str(tmp_path / "moe"))
    back = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert back["model_type"] == "mistral"
    assert back["sliding_window"] is None
    assert back["rope_theta"] == 1e4
    biased = json.dumps({"model_type": "llama", "mlp_bias": True})
    (tmp_path / "b" / "config.json").write_text(biased)
    with pytest.raises(checkpoints.CheckpointError, match="mlp_bias"):
        run(tmp_path / "no", models=str(tmp_path / "b"), **options)


def test_gates_are_as_wide_as_the_inputs(tmp_path):
    """Also where a layer narrows: names tell which axis that is."""
    tensors = {f"model.layers.0.mlp.{n}_proj.weight": (4, D) for n in ("gate", "up")}
    tensors["model.layers.0.mlp.down_proj.weight"] = (D, 4)
    tensors = {k: np.ones(s, np.float32) for k, s in tensors.items()}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = upcycle.Config(
        models=str(tmp_path / "a"),
        experts=3,
        output=str(tmp_path / "moe"),
        progress=False,
    )
    upcycle.run(config)
    gate = read(tmp_path / "moe")["model.layers.0.block_sparse_moe.gate.weight"]
    assert gate.shape == (3, D)


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("model.layers.0.fc1.weight", (4, D), D),  # narrows: [out, in]
        ("transformer.h.0.mlp.c_fc.weight", (D, H), D),  # Conv1D: [in, out]
        ("transformer.h.0.mlp.c_fc.weight", (H, D), D),  # Linear of that name
    ],
)
def test_gates_of_any_names_are_as_wide_as_the_inputs(tmp_path, name, shape, width):
    save_file({name: np.ones(shape, np.float32)}, tmp_path / "a.safetensors")
    run(tmp_path / "moe", models=str(tmp_path / "a.safetensors"), experts=3)
    gates = [x for n, x in read(tmp_path / "moe").items() if "gate" in n]
    assert [g.shape for g in gates] == [(3, width)]


def test_a_mixture_has_its_models_dtype(tmp_path, three):
    """Also where the base has another; models of two dtypes are refused at once."""
    llama(tmp_path / "base", 9)
    convert(tmp_path / "a", jnp.bfloat16)
    models = f"{tmp_path}/a,{tmp_path}/b"
    with pytest.raises(checkpoints.CheckpointError, match=r"of float32, exp.*of b"):
        run(tmp_path / "moe", models=models)
    convert(tmp_path / "b", jnp.bfloat16)
    options = {"method": "task_arithmetic", "scale": 0.5}
    run(tmp_path / "moe", models=models, base=str(tmp_path / "base"), **options)
    assert {x.dtype for x in read(tmp_path / "moe").values()} == {jnp.dtype("bfloat16")}


def test_adapters_are_to_be_made_models_first(tmp_path, three):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    save_file({"x": np.zeros(1, "f4")}, tmp_path / "lora" / "adapter_model.safetensors")
    models = f"{tmp_path}/lora,{tmp_path}/a"
    with pytest.raises(checkpoints.CheckpointError, match="Make one first"):
        run(tmp_path / "moe", models=models, base=str(tmp_path / "b"))


def test_gates_from_data_send_tokens_to_their_specialist(tmp_path):
    """Flax trees, stacked: what is written runs as `layers.moe.MoE`."""
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(64, D)).astype(np.float32) + 3 * s for s in (1, -1)]

    def apply(params, x):
        layer = params["layer_0"]
        h = jax.nn.gelu(x @ layer["intermediate"]["kernel"])
        return h @ layer["output"]["kernel"]

    for name, x in zip("ab", data, strict=True):
        params = {
            "layer_0": {
                "intermediate": {"kernel": rng.normal(size=(D, H)).astype(np.float32)},
                "output": {"kernel": rng.normal(size=(H, D)).astype(np.float32)},
            },
            "scale": np.ones(D, np.float32),
        }
        moments = merging.input_moments(apply, params, [x[:32], x[32:]])
        mean = moments["layer_0/intermediate/kernel"].mean
        np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-4, atol=1e-4)
        (tmp_path / name).mkdir()
        merging.save_moments(tmp_path / name / "moments.safetensors", moments)
        flat = {
            "layer_0/intermediate/kernel": params["layer_0"]["intermediate"]["kernel"],
            "layer_0/output/kernel": params["layer_0"]["output"]["kernel"],
            "scale": params["scale"],
        }
        save_file(flat, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / n / "moments.safetensors") for n in "ab"]
    run(
        tmp_path / "moe",
        models=f"{tmp_path}/a.safetensors,{tmp_path}/b.safetensors",
        gate_data=",".join(files),
    )
    params = tree.nest({k: jnp.asarray(x) for k, x in read(tmp_path / "moe").items()})
    mlp = params["layer_0"]["mlp"]
    for e, x in enumerate(data):
        routing = moe.route(moe.gate_logits(mlp["gate"], x), k=1)
        assert (np.asarray(routing.experts) == e).all()
    layer = MoE(experts=2, hidden=H, bias=False, gate_bias=True, dispatch="dropless")
    served = jax.jit(layer.apply)({"params": mlp}, data[0])
    one = {k: x["kernel"][0] for k, x in mlp["experts"].items()}
    expected = jax.nn.gelu(data[0] @ one["up"]) @ one["down"]
    weight = moe.route(moe.gate_logits(mlp["gate"], data[0]), k=1).weights
    np.testing.assert_allclose(served, weight * expected, rtol=1e-3, atol=1e-4)


def test_gates_from_data_of_hugging_face_names(tmp_path, three, capsys):
    """Mixtral's gates have no bias: what means have in common must not choose."""
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)]
    rng = np.random.default_rng(1)
    means = np.float32([(10, 10, 10, 11.5, 8.5, 10), (10, 10, 10, 8.5, 11.5, 11)])
    data = [m + 0.3 * rng.normal(size=(64, D)).astype(np.float32) for m in means]

    def apply(params, x):
        return sum(x @ params[name].T for name in names)

    for name, x in zip("ab", data, strict=True):
        moments = merging.input_moments(apply, {n: three[name][n] for n in names}, [x])
        merging.save_moments(tmp_path / f"{name}.moments.safetensors", moments)
    run(
        tmp_path / "moe",
        models=f"{tmp_path}/a,{tmp_path}/b",
        gate_data=",".join(f"{tmp_path}/{n}.moments.safetensors" for n in "ab"),
        k=1,
    )
    assert "in common is left out" in capsys.readouterr().out
    found = read(tmp_path / "moe")
    for i in range(2):
        gate = found[f"model.layers.{i}.block_sparse_moe.gate.weight"]
        for e, x in enumerate(data):
            assert (np.argmax(x @ gate.T, axis=1) == e).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ""}, "--models and --output"),
        ({"models": "a"}, "give their number by --experts"),
        ({"models": "a,b", "experts": 3}, "each of 2 models"),
        ({"models": "a,b", "gate_data": "x"}, "got 1 files for 2 models"),
        ({"models": "a,b", "method": "tie"}, "expected one of"),
        ({"models": "a,b", "method": "ties"}, "needs a base"),
        ({"models": "a,b", "density": "0.5"}, "--density: linear does not take it"),
        ({"models": "a", "experts": 2, "method": "ties", "scale": 0.5}, "of one model"),
        ({"models": "a", "experts": 2, "mlp_pattern": "mlp"}, "expected groups"),
        ({"models": "a", "to_dense": True}, "got experts"),
        ({"models": "a,b", "k": 3}, "--k: got 3, expected 1 to 2"),
        ({"models": "a", "experts": 4, "k": 0}, "--k: got 0, expected 1 to 4"),
        ({"models": "a", "experts": 2, "base": "b"}, "of one model"),
        ({"models": "a", "experts": 2, "sharpness": 2.0}, "--sharpness: it is of"),
        ({"models": "a,b", "gate_data": "x,y", "seed": 1}, "--seed: it is of random"),
        ({"models": "a,b", "gate_data": "x,y", "gate_stddev": 0.1}, "--gate_stddev"),
        ({"models": "a,b", "gate_data": "x,y", "sharpness": 0.0}, "more than 0"),
        ({"models": "a", "experts": 2, "gate_stddev": -1.0}, "expected at least 0"),
        ({"models": "a", "to_dense": True, "seed": 3}, "got 1 --models --seed"),
        ({"models": "n.safetensors", "experts": 2, "k": 2}, "has no config.json"),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_written(
    tmp_path, three, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    save_file(three["a"], tmp_path / "n.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        run("moe", **options)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "there"}, "exists"),
        ({"output": "base", "base": "base", "overwrite": True}, "overlap"),
        ({"output": "~/a", "overwrite": True}, "overlap"),
        ({"max_shard_size": "5XB"}, "--max_shard_size"),
        ({"gate_data": "~/a.moments"}, "got 1 files for 2 models"),
        ({"models": "bias,b"}, "attention_bias"),
    ],
)
def test_what_is_refused_is_refused_before_a_merge(
    tmp_path, three, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    llama(tmp_path / "base", 4)
    llama(tmp_path / "bias", 5)
    about = {"model_type": "llama", "hidden_size": D, "attention_bias": True}
    (tmp_path / "bias" / "config.json").write_text(json.dumps(about))

    def refuse(*args, **kwargs):
        raise AssertionError("merged first")

    monkeypatch.setattr(merging, "merge_checkpoints", refuse)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        run(**{"output": "moe", "models": "~/a,b"} | options)
    assert sorted(tmp_path.iterdir()) == before
    assert read(tmp_path / "a").keys() == three["a"].keys()


def test_home_is_written_short(tmp_path, three, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("~/moe", models="~/a", experts=2)
    about = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert about["model_type"] == "mixtral"
    run("~/dense", models="~/moe", to_dense=True)
    for name, x in read(tmp_path / "dense").items():
        np.testing.assert_array_equal(x, three["a"][name])


def test_models_of_other_shapes_are_named(tmp_path, three):
    tensors = three["b"] | {"model.layers.0.mlp.up_proj.weight": np.zeros((3, D), "f4")}
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=r"up_proj"):
        run(tmp_path / "moe", models=f"{tmp_path}/a,{tmp_path}/b")
    assert not (tmp_path / "moe").exists()


@pytest.mark.filterwarnings("ignore:::torch", "ignore:::transformers")
def test_transformers_loads_the_mixtral_and_copies_change_nothing(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install multitask-jax[torch]")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": 0.3, "tie_word_embeddings": False,
    }  # fmt: skip
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    dense.save_pretrained(tmp_path / "llama")
    run(tmp_path / "moe", models=str(tmp_path / "llama"), experts=4)
    sparse = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "moe").eval()
    ids = torch.arange(24).reshape(2, 12) * 7 % 50
    with torch.inference_mode():
        expected, got = (m(input_ids=ids).logits.numpy() for m in (dense, sparse))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-5)
