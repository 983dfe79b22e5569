"""Mixtures to dense checkpoints: their experts merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import upcycle
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

    monkeypatch.setattr(upcycle, "_write_config", full)
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
