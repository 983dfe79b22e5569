import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark_moe
from multitask_jax import moe


def test_it_times_every_way(tmp_path):
    found = benchmark_moe.run(
        benchmark_moe.Config(
            tokens=32,
            width=8,
            hidden=8,
            repeats=1,
            ragged=False,
            keep_memory=False,  # the tests' process stays as it is
            output_dir=str(tmp_path),
        )
    )
    assert set(found) == {
        "dense",
        "capacity 1.25",
        "dropless",
        "capacity 1.0625",
    }
    assert all(ms > 0 for ms in found.values())
    assert "time / dense FFN" in (tmp_path / "report.md").read_text()


def test_what_the_other_side_needs_is_named(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    settings = {"tokens": 8, "width": 4, "hidden": 4, "experts": 2, "ragged": False}
    config = benchmark_moe.Config(
        **settings, repeats=1, keep_memory=False, torch_python=str(program)
    )
    with pytest.raises(ValueError, match=r"ended early.* it needs torch \(pip"):
        benchmark_moe.run(config)


def by_name(params, e):
    """One expert's arrays, as `torch.nn.Sequential` names them."""
    return {
        f"{i}.{name}": np.array(params[layer][ours][e].T)
        for i, layer in ((0, "up"), (2, "down"))
        for name, ours in (("weight", "kernel"), ("bias", "bias"))
    }


def mixture(params, x):
    routing = moe.route(moe.gate_logits(params["gate"], x), k=2)
    return moe.dropless(moe.EXPERTS["mlp"], params["experts"], x, routing).y


def dense(params, x):
    """One expert, that of every token."""
    routing = moe.route(jnp.zeros(len(x), int), kind="hard", experts=1)
    return moe.everyone(moe.EXPERTS["mlp"], params["experts"], x, routing).y


@pytest.mark.filterwarnings("ignore:::torch")
@pytest.mark.parametrize("ours", [mixture, dense])
def test_pytorchs_layers_compute_what_ours_do(ours):
    """Outputs and gradients, for the same parameters."""
    torch = pytest.importorskip("torch", reason="pip install multitask-jax[torch]")
    from experiments import moe_in_torch

    config = benchmark_moe.Config(tokens=24, width=6, hidden=10, experts=4, threads=1)
    given, kind = benchmark_moe.inputs(config), ours.__name__
    params = given.params if kind == "mixture" else {"experts": given.ffn}
    params = jax.tree.map(  # with biases, and a gate that is sure of itself
        lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params
    )

    def loss(params, x):
        y = ours(params, x)
        return jnp.mean(y**2), y

    graded = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (slopes, dx), y = graded(params, given.x)
    theirs = moe_in_torch.Layers(dataclasses.asdict(config))
    theirs.x = torch.tensor(np.array(given.x), requires_grad=True)
    modules, pairs = [theirs.ffn], [(theirs.x, dx)]
    if kind == "mixture":
        modules, weight = list(theirs.experts), theirs.gate.weight
        weight.data = torch.tensor(np.array(params["gate"]["kernel"].T))
        pairs.append((weight, slopes["gate"]["kernel"].T))
    for e, module in enumerate(modules):
        state = by_name(params["experts"], e)
        module.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
        expected = by_name(slopes["experts"], e)
        pairs += [(p, expected[name]) for name, p in module.named_parameters()]
    found = getattr(theirs, kind)().detach().numpy()
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
    theirs.step(kind)
    for tensor, slope in pairs:
        assert np.abs(slope).max() > 1e-5
        np.testing.assert_allclose(tensor.grad.numpy(), slope, rtol=1e-3, atol=1e-6)
