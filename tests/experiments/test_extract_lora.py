"""LoRA extraction: ranks, energies, and adapters that PEFT and the library read."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import extract_lora as extract
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging import low_rank
from tests.merging.common import load, save

BLOCKS = 3


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def names(block):
    return [f"model.layers.{block}.{m}.weight" for m in ("q_proj", "down_proj")]


@pytest.fixture
def parameters():
    params = {
        "model.embed_tokens.weight": numbers(30, 12),
        "model.norm.weight": numbers(12),
    }
    for i in range(BLOCKS):
        q, down = names(i)
        params[q] = numbers(16, 12, seed=i)
        params[down] = numbers(12, 24, seed=10 + i)
    return params


def planted(params, rank, scale=0.1):
    """Changes of rank `rank`, with singular values that differ."""
    out = dict(params)
    for k, name in enumerate(n for i in range(BLOCKS) for n in names(i)):
        m, n = params[name].shape
        left = numbers(m, rank, seed=20 + k) * np.arange(1, rank + 1, dtype=np.float32)
        out[name] = params[name] + scale * left @ numbers(rank, n, seed=40 + k)
    return out


def run(tmp_path, base, model, **kwargs):
    paths = {"base": base, "model": model}
    for name, params in paths.items():
        if not (tmp_path / name).exists():
            save(tmp_path / name, params)
    config = extract.Config(
        base=str(tmp_path / "base"),
        model=str(tmp_path / "model"),
        output=str(tmp_path / "adapter"),
        progress=False,
        **kwargs,
    )
    return extract.run(config)


def opened(tmp_path):
    reader = checkpoints.open(tmp_path / "adapter", checkpoints.open(tmp_path / "base"))
    return {
        k: np.array(reader.read(k)).reshape(i.shape) for k, i in reader.tensors.items()
    }


@pytest.mark.parametrize(
    "kwargs", [{"rank": 3}, {"rank": 3, "alpha": 7.0}, {"energy": 1 - 1e-9}, {}]
)
def test_planted_rank_is_recovered(tmp_path, parameters, kwargs):
    model = planted(parameters, 3)
    result = run(tmp_path, parameters, model, **kwargs)
    got = opened(tmp_path)
    for name, want in model.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5)
    assert result.kept == pytest.approx(1, abs=1e-6)
    if "energy" in kwargs:
        assert {r.rank for r in result.rows} == {3}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    assert scaling == (7 / 3 if "alpha" in kwargs else 1)


@pytest.mark.parametrize("exact", [1024, 30])
def test_energies_are_those_of_the_singular_values(tmp_path, monkeypatch, exact):
    """Eckart-Young: the share kept is that of the largest squared singular values.

    Subspace iteration finds them almost (on noise, the hardest case: 97% or more).
    """
    monkeypatch.setattr(low_rank, "EXACT", exact)
    base = {"m.weight": numbers(200, 150), "n.weight": numbers(150, 200, seed=1)}
    model = {
        k: x + numbers(*x.shape, seed=9 + i) for i, (k, x) in enumerate(base.items())
    }
    result = run(tmp_path, base, model, rank=4)
    for row in result.rows:
        tau = model[row.name] - base[row.name]
        squares = np.linalg.svd(tau.astype(np.float64), compute_uv=False) ** 2
        best = squares[:4].sum() / squares.sum()
        assert row.energy == pytest.approx(squares.sum(), rel=1e-6)
        assert row.kept <= best + 1e-6
        assert row.kept >= (best - 1e-6 if exact > 150 else 0.97 * best)


def test_randomised_svd_recovers_a_planted_rank(monkeypatch):
    monkeypatch.setattr(low_rank, "EXACT", 30)
    tau = numbers(200, 3) * np.array([1, 10, 100], np.float32) @ numbers(3, 300, seed=1)
    for x in (tau, tau.T):
        left, right = low_rank.factorise(x, 4)
        np.testing.assert_allclose(left @ right, x, atol=1e-5 * np.abs(x).max())


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_nothing_is_a_product_of_nothing(monkeypatch, shape):
    monkeypatch.setattr(low_rank, "EXACT", 30)
    left, right = low_rank.factorise(np.zeros(shape, np.float32), 4)
    assert (left.shape, right.shape) == ((shape[0], 4), (4, shape[1]))
    assert left.dtype == right.dtype == np.float32
    assert not left.any()
    assert not right.any()


def test_factors_share_the_singular_values():
    tau = numbers(20, 50)
    for x in (tau, tau.T):
        left, right = low_rank.factorise(x, 5)
        s = np.linalg.svd(x, compute_uv=False)[:5]
        np.testing.assert_allclose((left**2).sum(0), s, rtol=1e-4)
        np.testing.assert_allclose((right**2).sum(1), s, rtol=1e-4)
    left, right = low_rank.factorise(np.outer(tau[:, 0], tau[0]), 4)
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


def test_energy_chooses_the_smallest_rank(tmp_path, parameters):
    model = {k: x + numbers(*x.shape, seed=60) for k, x in parameters.items()}
    result = run(tmp_path, parameters, model, energy=0.8, dtype="bfloat16")
    ranks = {}
    for row in result.rows:
        tau = model[row.name] - parameters[row.name]
        if not row.rank:
            assert row.kept == 0
            continue
        squares = np.linalg.svd(tau, compute_uv=False) ** 2
        shares = np.cumsum(squares) / squares.sum()
        assert row.rank == np.sum(shares < 0.8) + 1
        assert row.kept == pytest.approx(shares[row.rank - 1], abs=1e-3)
        ranks[row.name] = row.rank
    assert len(ranks) == 2 * BLOCKS
    assert len(set(ranks.values())) > 1
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, rank in ranks.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        assert tensors[key].shape == (rank, parameters[name].shape[1])
        assert tensors[key].dtype == ml_dtypes.bfloat16
    # The whole task vector's share counts what is left out as lost.
    total = sum(r.energy for r in result.rows)
    assert result.kept == pytest.approx(
        sum(r.kept * r.energy for r in result.rows) / total
    )
    want = sum(
        np.square(x - parameters[k], dtype=float).sum() for k, x in model.items()
    )
    assert total == pytest.approx(want)
    capped = run(tmp_path, parameters, model, energy=0.8, rank=2, overwrite=True)
    assert {r.rank for r in capped.rows} == {0, 2}


def test_report_tells_what_is_lost(tmp_path, parameters, capsys):
    model = planted(parameters, 2)
    model["model.norm.weight"] = parameters["model.norm.weight"] + 1
    model["model.embed_tokens.weight"] = parameters["model.embed_tokens.weight"] + 1
    run(tmp_path, parameters, model, exclude=r"layers\.1\.q")
    text = (tmp_path / "adapter" / "report.md").read_text()
    assert "| `model.norm.weight` | 12 | - |" in text
    for reason in ("no matrix of a layer", "an embedding", "left out by --include"):
        assert reason in text
    assert "warning: 3 changed tensors" in capsys.readouterr().err
    assert (tmp_path / "adapter" / "energy.png").stat().st_size > 1000
    rows = (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(r)["name"] for r in rows} == set(model)


def test_whole_modules_and_embeddings(tmp_path, parameters):
    """With every kind of tensor in it the adapter is the model."""
    model = {k: x + numbers(*x.shape, seed=60) for k, x in parameters.items()}
    result = run(
        tmp_path, parameters, model, rank=99, embeddings=True, modules_to_save="norm"
    )
    for name, x in opened(tmp_path).items():
        np.testing.assert_allclose(x, model[name], atol=1e-5)
    assert result.kept == pytest.approx(1, abs=1e-6)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "base_model.model.model.embed_tokens"
    assert keys[f"{module}.lora_embedding_A"].shape == (12, 30)
    assert keys[f"{module}.lora_embedding_B"].shape == (12, 12)
    assert keys["base_model.model.model.norm.weight"].shape == (12,)


def test_transposed_layers_are_told_by_their_biases(tmp_path):
    """GPT-2's Conv1D stores [in, out]; its bias has the size of `out`."""
    base = {"h.0.c_fc.weight": numbers(6, 24), "h.0.c_fc.bias": numbers(24)}
    base |= {"h.0.c_proj.weight": numbers(6, 6), "h.0.c_proj.bias": numbers(6)}
    model = {
        k: x + (numbers(*x.shape, seed=5) if x.ndim == 2 else 0)
        for k, x in base.items()
    }
    run(tmp_path, base, model, rank=6)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert keys["base_model.model.h.0.c_fc.lora_A.weight"].shape == (6, 6)
    assert keys["base_model.model.h.0.c_fc.lora_B.weight"].shape == (24, 6)
    for name, x in opened(tmp_path).items():
        np.testing.assert_allclose(x, model[name], atol=1e-5)
    base |= {"head.weight": numbers(5, 6), "head.bias": numbers(5)}
    config = extract.Config(fan_in_fan_out=False)
    reader = checkpoints.open(save(tmp_path / "mixed", base))
    assert not extract.fan_in_fan_out(config, reader)
    with pytest.raises(ValueError, match="PEFT has one flag for all"):
        extract.fan_in_fan_out(extract.Config(), reader)


def test_merging_the_adapter(tmp_path, parameters):
    """Extract, open, merge: the merge of the truncated models, as made by hand."""
    model = planted(parameters, 6)
    other = save(tmp_path / "other", planted(parameters, 2, scale=-0.2))
    run(tmp_path, parameters, model, rank=4)
    want = {}
    for name, theta in parameters.items():
        tau = model[name] - theta
        if tau.ndim == 2 and tau.any():
            u, s, vt = np.linalg.svd(tau, full_matrices=False)
            tau = (u[:, :4] * s[:4]) @ vt[:4]
        want[name] = theta + 0.5 * (tau + load(other)[name] - theta)
    merging.merge_checkpoints(
        merging.task_arithmetic(scale=0.5),
        tmp_path / "base",
        [tmp_path / "adapter", other],
        tmp_path / "merged",
        progress=False,
        report_files=False,
    )
    for name, x in load(tmp_path / "merged").items():
        np.testing.assert_allclose(x, want[name], atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, "--rank: got 0, expected at least 1"),
        ({"energy": 1.5}, "--energy: got 1.5, expected a share"),
        ({"alpha": -1.0}, "--alpha: got -1.0"),
        ({"dtype": "int8"}, "--dtype: got 'int8', expected one of float32"),
        ({"include": "nowhere"}, "include='nowhere' matches none"),
        ({"modules_to_save": "nowhere"}, "--modules_to_save: .* matches none"),
        ({"include": "norm"}, "no changed matrix named"),
    ],
)
def test_wrong_flags(tmp_path, parameters, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, parameters, planted(parameters, 2), **kwargs)
    assert not (tmp_path / "adapter").exists()


def test_wrong_models(tmp_path, parameters):
    model = planted(parameters, 2)
    with pytest.raises(ValueError, match="--base: got none"):
        extract.run(extract.Config())
    del model["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing in model: model\.norm"):
        run(tmp_path, parameters, model)
    nan = planted(parameters, 2)
    nan[names(0)[0]][0, 0] = np.nan
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"q_proj\.weight: the task vector is not"
    ):
        run(tmp_path, parameters, nan)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_loads_it(tmp_path, shared, architecture):
    """PEFT's merged model against what a merge reads: the same weights."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    home = shared / "golden" / "merging" / "models" / architecture
    extract.run(
        extract.Config(
            base=str(home / "base"),
            model=str(home / "ft1"),
            output=str(tmp_path / "adapter"),
            energy=0.9,
            progress=False,
        )
    )
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(home / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    weights = model.merge_and_unload().state_dict()
    reader = checkpoints.open(tmp_path / "adapter", checkpoints.open(home / "base"))
    for name, info in reader.tensors.items():
        want = weights[name].numpy()
        np.testing.assert_allclose(
            reader.read(name).reshape(info.shape), want, atol=1e-6
        )
