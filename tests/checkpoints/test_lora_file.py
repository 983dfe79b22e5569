"""LoRA directories as models: values, names, and what is refused."""

import json
import math
import re
import threading

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import (
    CheckpointError,
    TensorInfo,
    lora_config,
    lora_file,
)
from multitask_jax.checkpoints.lora_file import LowRank
from tests.merging.common import load, save

PREFIX = "base_model.model."
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.q_proj.weight": (4, 6),
    "model.layers.0.q_proj.bias": (4,),
    "model.layers.1.q_proj.weight": (4, 6),
    "model.layers.1.o_proj.weight": (6, 6),
    "model.conv.weight": (5, 3, 2, 2),
    "model.norm.weight": (6,),
    "model.steps": (3,),
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def base(tmp_path):
    params = {k: numbers(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}
    params["model.steps"] = np.arange(3)
    return save(tmp_path / "base", params)


def adapter(path, tensors, **config):
    path.mkdir()
    save_file(
        {k: np.array(v) for k, v in tensors.items()}, path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none"} | config
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def pair(module, a_shape, b_shape, *, embedding=False, prefix=PREFIX, seed=7):
    kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
    return {
        f"{prefix}{module}.{kind.format('A')}": numbers(*a_shape, seed=seed),
        f"{prefix}{module}.{kind.format('B')}": numbers(*b_shape, seed=seed + 1),
    }


def opened(base, path):
    reader = checkpoints.open(path, checkpoints.open(base))
    return {
        k: np.array(reader.read(k)).reshape(i.shape) for k, i in reader.tensors.items()
    }


def test_equation(tmp_path, base):
    """theta_0 + (alpha / r) B A; the rest is the base's, dtype included."""
    q = "model.layers.0.q_proj"
    tensors = pair(q, (2, 6), (4, 2))
    a, b = tensors.values()
    got = opened(base, adapter(tmp_path / "lora", tensors, target_modules=["q_proj"]))
    theta = load(base)
    assert list(got) == list(theta)
    for name, x in theta.items():
        want = x + 3 / 2 * b @ a if name == f"{q}.weight" else x
        assert got[name].dtype == x.dtype
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-7)
        assert (got[name] == x).all() == (name != f"{q}.weight")


def test_scalings_by_pattern(tmp_path, base):
    modules = ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    tensors = pair(modules[0], (2, 6), (4, 2)) | pair(modules[1], (4, 6), (4, 4))
    path = adapter(
        tmp_path / "lora",
        tensors,
        use_rslora=True,
        rank_pattern={"layers.1.q_proj": 4},
        alpha_pattern={r"model\.layers\.1\.q_proj": 5.0},
    )
    got, theta = opened(base, path), load(base)
    for module, scaling in zip(
        modules, (3 / math.sqrt(2), 5 / math.sqrt(4)), strict=True
    ):
        a, b = (tensors[f"{PREFIX}{module}.lora_{x}.weight"] for x in "AB")
        want = theta[f"{module}.weight"] + scaling * b @ a
        np.testing.assert_allclose(got[f"{module}.weight"], want, rtol=1e-5, atol=1e-6)


def test_embeddings_convolutions_and_transposed_layers(tmp_path, base):
    tensors = pair("model.embed_tokens", (2, 11), (6, 2), embedding=True)
    tensors |= pair("model.conv", (2, 3, 2, 2), (5, 2, 1, 1))
    tensors |= pair("model.layers.0.q_proj", (2, 4), (6, 2))  # stored [in, out]
    tensors |= pair("model.layers.1.o_proj", (2, 6), (6, 2))  # square: the flag tells
    got = opened(base, adapter(tmp_path / "lora", tensors, fan_in_fan_out=True))
    theta, s = load(base), 1.5
    x = list(tensors.values())
    want = {
        "model.embed_tokens.weight": s * (x[1] @ x[0]).T,
        # Of a convolution: every position of the kernel is a product of its own.
        "model.conv.weight": s * np.einsum("or,rikl->oikl", x[3][..., 0, 0], x[2]),
        "model.layers.0.q_proj.weight": s * (x[5] @ x[4]).T,
        "model.layers.1.o_proj.weight": s * (x[7] @ x[6]).T,
    }
    for name, delta in want.items():
        np.testing.assert_allclose(got[name], theta[name] + delta, rtol=1e-5, atol=1e-6)


def test_whole_tensors_and_biases(tmp_path, base):
    """modules_to_save and bias="all" replace, lora_bias adds; both may meet LoRA."""
    q, norm = "model.layers.0.q_proj", "model.norm.weight"
    tensors = pair(q, (2, 6), (4, 2)) | {
        f"{PREFIX}{norm}": numbers(6, seed=20).astype(np.float16),
        f"{PREFIX}{q}.base_layer.bias": numbers(4, seed=21),
        f"{PREFIX}{q}.base_layer.weight": numbers(4, 6, seed=22),
        f"{PREFIX}{q}.lora_B.bias": numbers(4, seed=23),
    }
    path = adapter(tmp_path / "lora", tensors, lora_bias=True, modules_to_save=["norm"])
    got = opened(base, path)
    assert got[norm].dtype == np.float16
    np.testing.assert_array_equal(got[norm], tensors[f"{PREFIX}{norm}"])
    a, b = list(tensors.values())[:2]
    w, bias = numbers(4, 6, seed=22), numbers(4, seed=21)
    np.testing.assert_allclose(
        got[f"{q}.weight"], w + 1.5 * b @ a, rtol=1e-5, atol=1e-6
    )
    want = bias + 1.5 * numbers(4, seed=23)
    np.testing.assert_allclose(got[f"{q}.bias"], want, rtol=1e-6)


@pytest.mark.parametrize("module", ["layers.0.q_proj", "causal.model.layers.0.q_proj"])
def test_a_prefix_more_or_less(tmp_path, base, module):
    tensors = pair(module, (2, 6), (4, 2))
    got = opened(base, adapter(tmp_path / "lora", tensors))
    a, b = tensors.values()
    name = "model.layers.0.q_proj.weight"
    np.testing.assert_allclose(
        got[name], load(base)[name] + 1.5 * b @ a, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("small", [1, 50, 1 << 18])
def test_any_range_is_the_matrix(monkeypatch, small):
    """Whatever the range, and however the product is cut for BLAS."""
    monkeypatch.setattr(lora_file, "_SMALL", small)
    left, right = numbers(7, 3), numbers(3, 5, seed=1)
    product = LowRank(left.astype(ml_dtypes.bfloat16), right, 0.5)
    whole = 0.5 * (left.astype(ml_dtypes.bfloat16).astype(np.float32) @ right)
    for dtype in (np.float32, np.float64):
        for start in range(36):
            for stop in range(start, 36):
                got = product.read(start, stop, np.dtype(dtype))
                assert got.dtype == dtype
                np.testing.assert_allclose(
                    got, whole.reshape(-1)[start:stop], rtol=1e-5, atol=1e-6
                )


def test_error_is_within_an_ulp(tmp_path):
    """base + delta is rounded: tau read back is off by at most one ulp of theta."""
    theta = numbers(64, 64) * 3
    path = save(tmp_path / "base", {"m.weight": theta})
    tensors = pair("m", (2, 64), (64, 2))
    tensors = {k: v * np.float32(0.02) for k, v in tensors.items()}
    got = opened(path, adapter(tmp_path / "lora", tensors, lora_alpha=2))["m.weight"]
    a, b = (x.astype(np.float64) for x in tensors.values())
    error = np.abs((got - theta).astype(np.float64) - b @ a)
    assert (error <= np.spacing(np.maximum(abs(theta), abs(got)))).all()
    assert error.max() > 0


def test_dtypes_of_the_base(tmp_path):
    for dtype, want in {
        ml_dtypes.bfloat16: np.float32,
        np.float16: np.float32,
        np.float64: np.float64,
    }.items():
        home = tmp_path / np.dtype(dtype).name
        home.mkdir()
        theta = numbers(4, 6).astype(dtype)
        path = save(home / "base", {"m.weight": theta})
        tensors = pair("m", (2, 6), (4, 2))
        got = opened(path, adapter(home / "lora", tensors))["m.weight"]
        a, b = tensors.values()
        assert got.dtype == want
        np.testing.assert_allclose(
            got, theta.astype(want) + 1.5 * b @ a, rtol=1e-5, atol=1e-6
        )


def test_a_tied_head_is_the_embedding(tmp_path):
    embedding = numbers(9, 4)
    path = save(
        tmp_path / "base", {"lm_head.weight": embedding, "wte.weight": embedding}
    )
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    tensors = pair("lm_head", (2, 4), (9, 2))
    base = checkpoints.open(path)
    reader = checkpoints.open(adapter(tmp_path / "lora", tensors), base)
    assert base.aliases == reader.aliases == {"lm_head.weight": "wte.weight"}
    a, b = tensors.values()
    for name in ("wte.weight", "lm_head.weight"):
        got = reader.read(name).reshape(9, 4)
        np.testing.assert_allclose(got, embedding + 1.5 * b @ a, rtol=1e-5, atol=1e-6)
    differ = {
        f"{PREFIX}{n}.weight": numbers(9, 4, seed=i)
        for i, n in enumerate(["wte", "lm_head"], 40)
    }
    with pytest.raises(CheckpointError, match=r"is tied to .* but differs from it"):
        checkpoints.open(adapter(tmp_path / "two", differ), base)


Q = "model.layers.0.q_proj"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            pair("model.layers.9.q_proj", (2, 6), (4, 2)),
            {},
            r"no tensor model\.layers\.9",
        ),
        (pair("q_proj", (2, 6), (4, 2)), {}, r"fits several tensors: model\.layers\.0"),
        (
            pair(Q, (2, 5), (4, 2)),
            {},
            r"B A has shape \(4, 5\), the base's .* \(4, 6\)",
        ),
        (pair(Q, (3, 6), (4, 3)), {}, "rank 3, but adapter_config.json says 2"),
        (pair(Q, (2, 6), (4, 3)), {}, r"are not \[r, in\] and \[out, r\]"),
        (
            pair(Q, (2, 6), (4, 2)),
            {"target_modules": ["q_proj", "k_proj"]},
            "'k_proj' has no",
        ),
        (pair("model.steps", (2, 6), (4, 2)), {}, r"no tensor model\.steps\.weight"),
        (
            {f"{PREFIX}{Q}.lora_A.weight": numbers(2, 6)},
            {},
            "expected lora_A and lora_B",
        ),
        (
            {f"{PREFIX}{Q}.lora_magnitude_vector": numbers(4)},
            {},
            "not a matrix of LoRA",
        ),
        ({f"{PREFIX}model.norm.weight": numbers(7)}, {}, r"shape \(7,\).* has \(6,\)"),
        (
            {f"{PREFIX}score.weight": numbers(7)},
            {},
            r"no tensor score\.weight in the base",
        ),
        (
            pair(Q, (2, 6), (4, 2)) | pair("model.layers.1.o_proj", (2, 6), (6, 2)),
            {"fan_in_fan_out": True},
            "can't tell which way model.layers.1.o_proj.weight",
        ),
        ({}, {}, "it has no tensors"),
        ({}, {"peft_type": "LOHA"}, "got peft_type 'LOHA', expected 'LORA'"),
        ({}, {"use_dora": True}, "use_dora = True is not supported"),
        (
            {},
            {"layer_replication": [[0, 2]]},
            "layer_replication = .* is not supported",
        ),
        ({}, {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changed the"),
        ({}, {"init_lora_weights": 1}, "init_lora_weights = 1"),
        ({}, {"r": "2"}, "r: got '2', expected a positive whole number"),
        ({}, {"r": True}, "r: got True"),
        ({}, {"lora_alpha": None}, "lora_alpha: got None"),
        ({}, {"lora_alpha": math.inf}, "lora_alpha: got inf"),
        ({}, {"use_rslora": "yes"}, "use_rslora: got 'yes'"),
        ({}, {"rank_pattern": [1]}, "rank_pattern: got"),
        ({}, {"alpha_pattern": {"a": "b"}}, "alpha_pattern.'a'.: got 'b'"),
        ({}, {"rank_pattern": {"(a+)+": 1}}, "or a simple regex"),
        ({}, {"rank_pattern": {"(a": 1}}, "is no regex"),
        ({}, {"target_modules": [1]}, "target_modules: expected names"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, base, tensors, config, message):
    path = adapter(tmp_path / "lora", tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.open(path, checkpoints.open(base))


def test_quantised_base(tmp_path):
    path = save(tmp_path / "base", {"m.weight": np.zeros((4, 6), np.int8)})
    lora = adapter(tmp_path / "lora", pair("m", (2, 6), (4, 2)))
    with pytest.raises(CheckpointError, match=r"int8 in the base \(quantised"):
        checkpoints.open(lora, checkpoints.open(path))


@pytest.mark.parametrize("part", ["A.weight", "B.weight", "B.bias"])
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_quantised_adapter(tmp_path, base, part, dtype):
    tensors = pair(Q, (2, 6), (4, 2)) | {f"{PREFIX}{Q}.lora_B.bias": numbers(4)}
    key = f"{PREFIX}{Q}.lora_{part}"
    tensors[key] = tensors[key].astype(dtype)
    path = adapter(tmp_path / "lora", tensors)
    name = np.dtype(dtype).name
    with pytest.raises(CheckpointError, match=rf"lora_{part} is {name} \(quantised"):
        checkpoints.open(path, checkpoints.open(base))


def test_opening(tmp_path, base):
    path = adapter(tmp_path / "lora", pair(Q, (2, 6), (4, 2)))
    for p in (path, path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"a LoRA adapter .*--base=BASE"):
            checkpoints.open(p)
        assert checkpoints.open(p, checkpoints.open(base)).format == "lora"
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds a model and an adapter"):
        checkpoints.open(path, checkpoints.open(base))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text("{}")
    (pickled / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle"):
        checkpoints.open(pickled, checkpoints.open(base))


@pytest.mark.parametrize("text", ["[]", "{", '{"r": 1, "r": 2}'])
def test_damaged_config(tmp_path, base, text):
    path = adapter(tmp_path / "lora", pair(Q, (2, 6), (4, 2)))
    (path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config|twice"):
        checkpoints.open(path, checkpoints.open(base))
    (path / "adapter_config.json").write_text(" " * ((1 << 24) + 1))
    with pytest.raises(CheckpointError, match="more than 16777216 bytes"):
        checkpoints.open(path, checkpoints.open(base))


def test_threads_read_the_same(tmp_path, base):
    path = adapter(tmp_path / "lora", pair(Q, (2, 6), (4, 2)))
    reader = checkpoints.open(path, checkpoints.open(base))
    name, found = f"{Q}.weight", []
    want = np.array(reader.read(name))

    def work():
        found.append(all((reader.read(name) == want).all() for _ in range(200)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 4


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "linear", "slerp"])
def test_merging_adapters_is_merging_their_models(tmp_path, base, method):
    """An adapter beside a full model: as if the adapter had been written out."""
    paths = [
        adapter(tmp_path / "lora", pair(Q, (2, 6), (4, 2))),
        adapter(
            tmp_path / "other", pair("model.layers.1.o_proj", (2, 6), (6, 2), seed=3)
        ),
    ]
    full = [save(tmp_path / f"full{i}", opened(base, p)) for i, p in enumerate(paths)]
    for name, models in {"a": [paths[0], full[1]], "b": full}.items():
        merging.merge_checkpoints(
            merging.METHODS[method](), base, models, tmp_path / name, progress=False
        )
    got, want = load(tmp_path / "a"), load(tmp_path / "b")
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x)
    with pytest.raises(CheckpointError, match=r"needs|--base"):
        merging.merge_checkpoints(
            merging.linear(), None, [full[0], paths[1]], tmp_path / "c", progress=False
        )


def test_nothing_whole_is_kept(tmp_path):
    """Reading a chunk forms that chunk: memory goes with the range, not the tensor."""
    import tracemalloc

    side = 3000
    home = tmp_path / "base"
    with checkpoints.create(
        home, [TensorInfo("m.weight", (side, side), np.dtype("f4"))]
    ) as w:
        for i in range(0, side * side, side * 100):
            w.write("m.weight", i, np.ones(side * 100, np.float32))
    path = adapter(tmp_path / "lora", pair("m", (2, side), (side, 2)))
    reader = checkpoints.open(path, checkpoints.open(home))
    tracemalloc.start()
    for start in range(0, side * side, 1 << 18):
        reader.read("m.weight", start, min(start + (1 << 18), side * side))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # the tensor has 36 MB


def test_whole_names_cost_nothing_and_the_first_match_counts(tmp_path):
    """Thousands of experts may have ranks of their own, as extract_lora writes them."""
    modules = [f"layers.{i}.experts.{j}.up" for i in range(40) for j in range(200)]
    patterns = {f"^{re.escape(m)}": 1 + n % 7 for n, m in enumerate(modules)}
    patterns = {"experts.7.up": 9} | patterns | {"up": 11}
    path = tmp_path / "adapter_config.json"
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": patterns}
    path.write_text(json.dumps(about))
    config = lora_config.read_config(path)
    lora_config.check_cost(path, config, modules)
    for n, m in enumerate(modules):
        assert config.rank_of(m) == (9 if m.endswith("experts.7.up") else 1 + n % 7)
    assert config.rank_of("other.up") == 11
    assert config.rank_of(f"model.{modules[0]}") == 11  # not whole
    assert config.rank_of("other.down") == 8
