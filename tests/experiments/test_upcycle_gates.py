"""Gates of upcycled checkpoints that are made of data."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import upcycle
from multitask_jax import checkpoints, merging, moe, tree
from multitask_jax.layers.moe import MoE
from multitask_jax.merging import Moments
from tests.experiments.upcycle_common import D, H, convert, read, run


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


def saved(folder, moments):
    """Files of each model's moments, comma-separated."""
    files = []
    for e, m in enumerate(moments):
        files.append(str(folder / f"{e}.moments.safetensors"))
        merging.save_moments(files[-1], m)
    return ",".join(files)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gates_of_16_bit_models_keep_their_digits(tmp_path, dtype):
    """Means far from 0 and near each other: a bias rounded to 16 bits decides alone."""
    rng = np.random.default_rng(0)
    means = np.float32(30 + 0.1 * rng.normal(size=(3, D)))
    variance = 0.02 * D  # 0.02 in each dimension
    names = {"layer_0/intermediate/kernel": (D, H), "layer_0/output/kernel": (H, D)}
    for name in "abc":
        tensors = {n: np.ones(s, jnp.dtype(dtype)) for n, s in names.items()}
        tensors["norm/scale"] = np.ones(D, jnp.dtype(dtype))
        save_file(tensors, tmp_path / f"{name}.safetensors")
    moments = [{next(iter(names)): Moments(m, np.float32(variance))} for m in means]
    run(
        tmp_path / "moe",
        models=",".join(f"{tmp_path}/{n}.safetensors" for n in "abc"),
        gate_data=saved(tmp_path, moments),
    )
    flat = read(tmp_path / "moe")
    gate = tree.nest({k: jnp.asarray(x) for k, x in flat.items()})
    gate = gate["layer_0"]["mlp"]["gate"]
    assert {x.dtype for x in gate.values()} == {jnp.dtype("float32")}
    assert flat["norm/scale"].dtype == dtype
    x = np.repeat(means, 20, axis=0) + 0.14 * rng.normal(size=(60, D))
    found = moe.route(moe.gate_logits(gate, jnp.float32(x)), k=1).probabilities
    distance = np.sum((x[:, None] - np.float64(means)[None]) ** 2, axis=-1)
    expected = jax.nn.softmax(-distance / 2 / 0.02, axis=1)
    np.testing.assert_allclose(found, expected, atol=0.01)
    base = tensors | {n: np.ones(s, np.float32) for n, s in names.items()}
    save_file(base, tmp_path / "base.safetensors")
    run(
        tmp_path / "dense",
        models=str(tmp_path / "moe"),
        to_dense=True,
        method="task_arithmetic",
        base=str(tmp_path / "base.safetensors"),
    )
    assert {x.dtype for x in read(tmp_path / "dense").values()} == {jnp.dtype(dtype)}


def moments_of_three(means, variance):
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)]
    return [
        {n: Moments(np.float32(m), np.float32(variance)) for n in names} for m in means
    ]


APART = np.eye(3, D)


@pytest.mark.parametrize(
    ("means", "variance", "message"),
    [
        (np.eye(3, D + 1), 1.0, rf"got a mean \[{D + 1}\].*expected \[{D}\]"),
        (APART, np.ones(2), r"a variance \[2\]"),
        (np.where(APART > 0, np.nan, 0), 1.0, "moments that are not finite"),
        (APART, np.inf, "moments that are not finite"),
        (APART, -1.0, "moments that are not finite"),
        (APART, 1e-6, "is not finite in float16; choose a lower --sharpness"),
    ],
)
def test_moments_that_make_no_gate_are_refused_before_a_merge(
    tmp_path, three, monkeypatch, means, variance, message
):
    for name in "abc":
        convert(tmp_path / name, np.float16)
    data = saved(tmp_path, moments_of_three(means, variance))
    monkeypatch.setattr(merging, "merge_checkpoints", lambda *a, **k: 1 / 0)
    models = ",".join(str(tmp_path / n) for n in three)
    with pytest.raises(ValueError, match=message) as e:
        run(tmp_path / "moe", models=models, gate_data=data)
    assert isinstance(e.value, checkpoints.CheckpointError) is ("float16" in message)
    assert not (tmp_path / "moe").exists()


@pytest.mark.filterwarnings("ignore:::torch", "ignore:::transformers")
def test_the_docstrings_moments_of_a_llama(tmp_path):
    """As it is written there; what reaches a layer is the norm's output before it."""
    torch = pytest.importorskip("torch", reason="pip install multitask-jax[torch]")
    transformers = pytest.importorskip("transformers")
    text = inspect.getdoc(upcycle)
    example = text[text.index("    seen = {}") : text.index("--layout=mixtral")]
    sizes = {
        "vocab_size": 50, "hidden_size": 8, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    there = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    ids = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0]])
    batches = [
        {"input_ids": ids, "attention_mask": there},
        {"input_ids": ids + 7, "attention_mask": there},
    ]
    models, files = [], []
    for e in range(2):
        torch.manual_seed(e)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        models.append(str(tmp_path / f"{e}"))
        model.save_pretrained(models[-1])
        scope = {"model": model, "batches": batches, "torch": torch, "merging": merging}
        exec(textwrap.dedent(example), scope)
        files.append(f"{tmp_path}/{e}.safetensors")
        merging.save_moments(files[-1], scope["moments"])
        norm, seen = model.model.layers[1].post_attention_layernorm, []
        norm.register_forward_hook(lambda m, i, x, seen=seen: seen.append(x))
        with torch.inference_mode():
            for batch in batches:
                model(**batch)
        x = torch.cat([x[there.bool()] for x in seen]).numpy()
        assert x.shape == (2 * 4, 8)
        moments = scope["moments"]["model.layers.1.mlp.gate_proj.weight"]
        np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-4, atol=1e-5)
    run(tmp_path / "moe", models=",".join(models), gate_data=",".join(files), k=1)
    assert "model.layers.1.block_sparse_moe.gate.weight" in read(tmp_path / "moe")
