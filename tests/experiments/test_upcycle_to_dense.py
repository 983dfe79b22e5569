"""Mixtures to dense checkpoints: their experts merged."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import upcycle, upcycle_files
from multitask_jax import checkpoints, merging
from tests.experiments.upcycle_common import D, H, convert, llama, read, run


def test_to_dense_refuses_a_shared_expert(tmp_path):
    tensors = {
        "layer_0/mlp/experts/up/kernel": np.zeros((2, D, H), np.float32),
        "layer_0/mlp/experts/down/kernel": np.zeros((2, H, D), np.float32),
        "layer_0/mlp/gate/kernel": np.zeros((D, 2), np.float32),
        "layer_0/mlp/shared_up/kernel": np.zeros((D, H), np.float32),
    }
    save_file(tensors, tmp_path / "moe.safetensors")
    config = upcycle.Config(
        to_dense=True,
        models=str(tmp_path / "moe.safetensors"),
        output=str(tmp_path / "dense"),
        progress=False,
    )
    with pytest.raises(checkpoints.CheckpointError, match="that all tokens share"):
        upcycle.run(config)
    assert not (tmp_path / "dense").exists()


def test_names_that_no_layout_knows_come_back_by_the_base(tmp_path):
    rng = np.random.default_rng(0)
    names = ["stem/kernel"]
    names += [f"level_{i}/ffn/fc1/{n}/kernel" for i in range(2) for n in ("a", "b")]
    tensors = {n: rng.normal(size=(D, H)).astype(np.float32) for n in names}
    save_file(tensors, tmp_path / "a.safetensors")
    a, pattern = (
        str(tmp_path / "a.safetensors"),
        r"(?P<block>level_\d)/ffn/(?P<leaf>.*)",
    )
    run(tmp_path / "moe", models=a, experts=2, mlp_pattern=pattern)
    back = {"to_dense": True, "models": str(tmp_path / "moe"), "mlp_pattern": pattern}
    with pytest.raises(ValueError, match=r"--mlp_pattern .* needs --base"):
        run(tmp_path / "dense", **back)
    run(tmp_path / "dense", base=a, **back)
    found = read(tmp_path / "dense")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(found[name], x)


def test_a_dense_model_appears_with_its_config_or_not_at_all(
    tmp_path, three, monkeypatch
):
    run(tmp_path / "moe", models=str(tmp_path / "a"), experts=2)
    there = []

    def full(directory, about):
        there.append((directory / "model.safetensors").exists())
        raise OSError("disk full")

    monkeypatch.setattr(upcycle_files, "write_config", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path / "dense", to_dense=True, models=str(tmp_path / "moe"))
    assert there == [True]  # the weights are written, the config is not
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [("ties", {"density": 0.6, "scale": 0.5}), ("task_arithmetic", {})],
)
def test_to_dense_merges_experts_by_any_method(tmp_path, three, name, options):
    """And them alone: all else is the mixture's, bit for bit."""
    base = llama(tmp_path / "base", 9)
    models = ",".join(str(tmp_path / n) for n in "abc")
    run(tmp_path / "moe", models=models)
    run(
        tmp_path / "dense",
        to_dense=True,
        models=str(tmp_path / "moe"),
        base=str(tmp_path / "base"),
        method=name,
        **{k: str(v) if k == "density" else v for k, v in options.items()},
    )
    method = merging.METHODS[name](**options)
    origin, *experts = (
        {n: x for n, x in m.items() if ".mlp." in n} for m in (base, *three.values())
    )
    expected = jax.jit(lambda b, m: merging.merge(method, b, m))(origin, experts)
    shared = read(tmp_path / "moe")
    found = read(tmp_path / "dense")
    assert found.keys() == base.keys()
    for n, x in found.items():
        if ".mlp." in n:
            np.testing.assert_allclose(x, expected[n], rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, shared[n])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lm_head.weight", (20, D), r"1 are missing \(lm_head.weight"),
        ("model.embed_tokens.weight", (22, D), r"1 have another shape \(model.embed"),
    ],
)
def test_to_dense_refuses_a_base_of_other_tensors(
    tmp_path, three, name, shape, message
):
    run(tmp_path / "moe", models=str(tmp_path / "a"), experts=2)
    base = llama(tmp_path / "base", 9)
    more = base | {name: np.zeros(shape, np.float32)}
    save_file(more, tmp_path / "base" / "model.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=message):
        run(
            tmp_path / "dense",
            to_dense=True,
            models=str(tmp_path / "moe"),
            base=str(tmp_path / "base"),
        )
    assert not (tmp_path / "dense").exists()


def test_a_dense_model_has_its_mixtures_dtype(tmp_path, three):
    """Also where the base has another."""
    llama(tmp_path / "base", 9)
    convert(tmp_path / "a", jnp.bfloat16)
    run(tmp_path / "moe", models=str(tmp_path / "a"), experts=2)
    options = {"to_dense": True, "method": "task_arithmetic", "scale": 0.5}
    models, base = str(tmp_path / "moe"), str(tmp_path / "base")
    run(tmp_path / "dense", models=models, base=base, **options)
    found = read(tmp_path / "dense")
    assert {x.dtype for x in found.values()} == {jnp.dtype("bfloat16")}
    name = "model.layers.1.mlp.up_proj.weight"  # of two copies half the sum of changes
    np.testing.assert_array_equal(found[name], three["a"][name].astype(jnp.bfloat16))


MIXTURE = {
    "layer_0/mlp/experts/up/kernel": (3, D, H),
    "layer_0/mlp/experts/down/kernel": (3, H, D),
    "layer_1/mlp/experts/up/kernel": (3, D, H),
    "layer_1/mlp/experts/down/kernel": (3, H, D),
}


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        # The third expert serves all tokens, whatever the gate says.
        ({"layer_0": (D, 2), "layer_1": (D, 2)}, r"gate/kernel: got a gate \[6, 2\]"),
        ({"layer_0": (D, 3), "layer_1": (D, 2)}, r"layer_1/.*\[6, 2\], exp.* of 3 exp"),
        ({"layer_1": (D, 3)}, r"got no layer_0/mlp/gate/\.\.\., but layer_1"),
    ],
)
def test_to_dense_refuses_gates_of_other_experts(tmp_path, gates, message):
    shapes = MIXTURE | {f"{b}/mlp/gate/kernel": s for b, s in gates.items()}
    tensors = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "moe.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=message):
        run(tmp_path / "dense", to_dense=True, models=f"{tmp_path}/moe.safetensors")
    assert not (tmp_path / "dense").exists()


def test_to_dense_refuses_gates_of_other_experts_by_torchs_names(tmp_path, three):
    """Where experts are the first axis."""
    run(tmp_path / "moe", models=str(tmp_path / "a"), experts=3)
    tensors = read(tmp_path / "moe")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][:2])
    save_file(tensors, tmp_path / "moe" / "model.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=r"got a gate \[2, 6\]"):
        run(tmp_path / "dense", to_dense=True, models=str(tmp_path / "moe"))


def test_experts_that_ids_choose_have_no_gate(tmp_path, capsys):
    """And what is called shared elsewhere is no expert beside them."""
    shapes = MIXTURE | {"params/shared_bottom/kernel": (D, D)}
    tensors = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "moe.safetensors")
    run(tmp_path / "dense", to_dense=True, models=f"{tmp_path}/moe.safetensors")
    assert "whose experts ids choose" in capsys.readouterr().out
    assert "params/shared_bottom/kernel" in read(tmp_path / "dense")


def foreign(folder, about):
    """A mixture by the names of Qwen's and OLMo's."""
    shapes = {"model.layers.0.mlp.gate.weight": (2, D), "model.norm.weight": (D,)}
    for e in range(2):
        expert = f"model.layers.0.mlp.experts.{e}"
        shapes |= {f"{expert}.{n}_proj.weight": (H, D) for n in ("gate", "up")}
        shapes[f"{expert}.down_proj.weight"] = (D, H)
    folder.mkdir()
    tensors = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about))


QWEN = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": D,
    "num_attention_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "intermediate_size": 100,
    "moe_intermediate_size": H,
}


def test_to_dense_of_a_qwen3_moe_is_a_qwen3(tmp_path):
    foreign(tmp_path / "moe", QWEN)
    run(tmp_path / "dense", to_dense=True, models=str(tmp_path / "moe"))
    about = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert about["model_type"] == "qwen3"
    assert about["architectures"] == ["Qwen3ForCausalLM"]
    assert (about["intermediate_size"], about["num_key_value_heads"]) == (H, 4)
    assert about["head_dim"] == D // 2
    assert not any("moe" in key or "expert" in key for key in about)


@pytest.mark.parametrize(
    "change", [{"model_type": "olmoe"}, {"mlp_only_layers": [3]}, {"model_type": None}]
)
def test_to_dense_of_what_has_no_dense_class_gets_no_config(tmp_path, change, capsys):
    """transformers would build a mixture of experts that nobody trained."""
    foreign(tmp_path / "moe", QWEN | change)
    run(tmp_path / "dense", to_dense=True, models=str(tmp_path / "moe"))
    assert "left out config.json: no dense class" in capsys.readouterr().out
    assert not (tmp_path / "dense" / "config.json").exists()
    assert len(read(tmp_path / "dense")) == 4


@pytest.mark.filterwarnings("ignore:::torch", "ignore:::transformers")
def test_transformers_loads_the_dense_qwen3(tmp_path):
    """Of a mixture whose experts are alike, it gives the mixture's logits."""
    torch = pytest.importorskip("torch", reason="pip install multitask-jax[torch]")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    about = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=80, moe_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        initializer_range=0.3, num_experts=3, num_experts_per_tok=2,
        norm_topk_prob=True, use_sliding_window=True, sliding_window=4,
    )  # fmt: skip
    moe = transformers.Qwen3MoeForCausalLM(about).eval()
    moe.save_pretrained(tmp_path / "moe")
    tensors = read(tmp_path / "moe")
    for name, x in tensors.items():
        first = re.sub(r"experts\.\d+", "experts.0", name)
        x[...] = tensors[first]
    save_file(tensors, tmp_path / "moe" / "model.safetensors", {"format": "pt"})
    moe = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    run(tmp_path / "dense", to_dense=True, models=str(tmp_path / "moe"))
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(dense).__name__ == "Qwen3ForCausalLM"
    ids = torch.arange(24).reshape(2, 12) * 7 % 50
    with torch.inference_mode():
        expected, got = (m(input_ids=ids).logits.numpy() for m in (moe, dense))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-5)
