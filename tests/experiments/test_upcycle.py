"""Dense checkpoints to mixtures, on disk, and back by the same names."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import flags, signals, upcycle
from multitask_jax import checkpoints, merging, tree
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ""}, "--models and --output"),
        ({"models": "a"}, "give their number by --experts"),
        ({"models": "a,b", "experts": 3}, "each of 2 models"),
        ({"models": "a,b", "gate_data": "x"}, "got 1 files for 2 models"),
        ({"models": "a,b", "method": "tie"}, "expected one of"),
        ({"models": "a,b", "method": "ties"}, "needs a base"),
        ({"models": "a,b", "base": "c", "method": "emr"}, "emr, which writes a file"),
        ({"models": "a,b", "base": "c", "method": "fisher"}, "fisher statistics"),
        ({"models": "a", "to_dense": True, "method": "regmean"}, "gram statistics"),
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
        ({"models": "a", "experts": 2, "gate_stddev": math.nan}, "expected at least 0"),
        ({"models": "a", "experts": 2, "gate_stddev": math.inf}, "and finite"),
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


def test_experts_take_no_part_in_what_is_measured_over_the_rest(tmp_path, three):
    """TIES trims over the whole model: here, over all but feed-forward layers."""
    base = llama(tmp_path / "base", 9)
    for name in "ab":  # changes that would leave nothing else above the threshold
        changed = {n: x * (1000 if ".mlp." in n else 1) for n, x in three[name].items()}
        save_file(changed, tmp_path / name / "model.safetensors")
    models = f"{tmp_path}/a,{tmp_path}/b"
    options = {"method": "ties", "density": "0.5"}
    run(tmp_path / "moe", models=models, base=str(tmp_path / "base"), **options)
    rest = [
        {n: x for n, x in m.items() if ".mlp." not in n}
        for m in (base, three["a"], three["b"])
    ]
    method = merging.ties(density=0.5)
    expected = jax.jit(lambda b, m: merging.merge(method, b, m))(rest[0], rest[1:])
    found = read(tmp_path / "moe")
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)


def test_models_of_nothing_but_experts(tmp_path):
    for name in "ab":
        tensors = {n: np.ones((D, H), np.float32) for n in STYLES["opt"].split()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    run(tmp_path / "moe", models=f"{tmp_path}/a.safetensors,{tmp_path}/b.safetensors")
    assert len(read(tmp_path / "moe")) == 2 * 2 + 1


@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "input_layernorm.weight"])
@pytest.mark.parametrize("copies", [True, False])
def test_models_with_nan_are_refused(tmp_path, three, name, copies):
    """Experts, which no merge sees, and all of one model, which nothing merges."""
    name = f"model.layers.1.{name}"
    three["b"][name].reshape(-1)[3] = np.nan
    save_file(three["b"], tmp_path / "b" / "model.safetensors")
    options = {"experts": 2} if copies else {}
    models = str(tmp_path / "b") if copies else f"{tmp_path}/a,{tmp_path}/b"
    with pytest.raises(checkpoints.CheckpointError, match=rf"/b.*{name}' has nan.* 3 "):
        run(tmp_path / "moe", models=models, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "params/layer_0/mlp/experts/up/kernel",
    ],
)
def test_models_that_have_experts_are_refused(tmp_path, name):
    tensors = {n: np.ones((D, H), np.float32) for n in (*STYLES["opt"].split(), name)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match="expected a dense model"):
        run(tmp_path / "moe", models=str(tmp_path / "a.safetensors"), experts=2)


def test_names_of_no_class_are_not_taken_for_the_dense_one(tmp_path, three, capsys):
    """transformers would load the dense class with new feed-forward layers."""
    about = {"model_type": "gpt2", "architectures": ["GPT2Model"], "n_embd": D}
    (tmp_path / "a" / "config.json").write_text(json.dumps(about))
    run(tmp_path / "moe", models=str(tmp_path / "a"), experts=2)
    assert "run it by code of your own" in capsys.readouterr().out
    there = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert there["model_type"] == "upcycled_gpt2"
    assert "architectures" not in there
    assert (there["num_experts"], there["n_embd"]) == (2, D)
    run(tmp_path / "dense", models=str(tmp_path / "moe"), to_dense=True)
    back = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert back == about


def test_a_file_has_what_lies_beside_it(tmp_path, three):
    """There and back: config.json, which tells the layout, and the tokenizer."""
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    file = "model.safetensors"
    run(tmp_path / "moe", models=f"{tmp_path}/a/{file}", experts=2, k=1)
    about = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (about["model_type"], about["num_experts_per_tok"]) == ("mixtral", 1)
    run(tmp_path / "dense", models=f"{tmp_path}/moe/{file}", to_dense=True)
    about = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert about["model_type"] == "mistral"
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    assert read(tmp_path / "dense").keys() == three["a"].keys()
    (tmp_path / "moe" / "config.json").unlink()  # names tell it as well
    run(tmp_path / "lone", models=f"{tmp_path}/moe/{file}", to_dense=True)
    assert read(tmp_path / "lone").keys() == three["a"].keys()


@pytest.mark.parametrize("style", ["flax swiglu", "block"])
def test_stacked_experts_run_as_it_is_printed(tmp_path, style, capsys):
    rng = np.random.default_rng(0)
    tensors = {}
    for name in STYLES[style].split():
        wide = re.search("/(up|gate|intermediate)/", name)
        shape = (D, H) if wide else (H, D)
        tensors[name] = rng.normal(size=shape).astype(np.float32)
        if style == "block":
            bias = name.replace("kernel", "bias")
            tensors[bias] = rng.normal(size=shape[1]).astype(np.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    run(tmp_path / "moe", models=str(tmp_path / "a.safetensors"), experts=3)
    printed = re.search(r"layers\.moe\.(MoE\(.*?\))", capsys.readouterr().out)
    layer = eval(printed[1], {"MoE": MoE})
    params = tree.nest({k: jnp.asarray(x) for k, x in read(tmp_path / "moe").items()})
    x = rng.normal(size=(7, D)).astype(np.float32)
    found = jax.jit(layer.apply)({"params": params["layer_0"]["mlp"]}, x)
    if style == "block":
        name = "layer_0/{}/{}"
        h = x @ tensors[name.format("intermediate", "kernel")]
        h = h + tensors[name.format("intermediate", "bias")][None]
        h = jax.nn.gelu(h, approximate=False) @ tensors[name.format("output", "kernel")]
        expected = h + tensors[name.format("output", "bias")][None]
    else:
        gate, up, down = tensors.values()
        expected = (jax.nn.silu(x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_interrupted_or_killed_leaves_nothing(tmp_path, three, monkeypatch):
    models = f"{tmp_path}/a,{tmp_path}/b"
    before = sorted(tmp_path.iterdir())
    merge, made = merging.merge_checkpoints, []

    def interrupted(*args, **kwargs):
        merge(*args, **kwargs)
        made.extend(set(tmp_path.iterdir()) - set(before))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merging, "merge_checkpoints", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "moe", models=models)
    assert sorted(tmp_path.iterdir()) == before
    # A kill cleans nothing up: the next run does.
    script = "import os; print(os.getpid())"
    gone = subprocess.run([sys.executable, "-c", script], capture_output=True)
    (left,) = (
        Path(str(d).replace(f"-{os.getpid()}", f"-{int(gone.stdout)}")) for d in made
    )
    left.mkdir()
    run(tmp_path / "moe", models=models)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "moe"])


def test_a_scheduler_ends_the_script_as_ctrl_c_does(monkeypatch):
    called = []
    monkeypatch.setattr(signals, "as_interruption", lambda: called.append("signals"))
    monkeypatch.setattr(flags, "main", lambda *_: called.append("main"))
    runpy.run_path(upcycle.__file__, run_name="__main__")
    assert called == ["signals", "main"]


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
