"""Embeddings of models whose tokenizers differ, aligned by token."""

import json

import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging.mergekit import vocabularies
from tests.merging.common import load, save

WIDTH = 3
BASE = ["a", "b", "c", "d"]
REORDERED = ["d", "c", "b", "a"]  # the same tokens
LARGER = ["a", "b", "e", "c", "<f>"]  # no d; e and an added <f>
OTHER = ["a", "e", "d", "b"]  # e, but no c
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def row(token, seed):
    """A row that tells its token and model."""
    return np.arange(WIDTH) + 10.0 * ord(token.strip("<>")[0]) + seed / 8


def make(folder, name, tokens, seed, *, rows=None, files="tokenizer.json"):
    rng = np.random.default_rng(seed)
    table = np.zeros((rows or len(tokens), WIDTH), np.float32)
    for i, t in enumerate(tokens):
        table[i] = row(t, seed)
    params = {
        "model.embed_tokens.weight": table,
        "model.layers.0.mlp.weight": rng.standard_normal((4, WIDTH)),
        "model.position_embeddings.weight": rng.standard_normal((len(table), WIDTH)),
        "model.norm.weight": rng.standard_normal(WIDTH),
        "lm_head.weight": -table,
    }
    save(folder / name, {k: v.astype(np.float32) for k, v in params.items()})
    config = {
        "vocab_size": len(table),
        "num_hidden_layers": 1,
        "bos_token_id": tokens.index("a"),
    }
    (folder / name / "config.json").write_text(json.dumps(config))
    plain = {t: i for i, t in enumerate(tokens) if not t.startswith("<")}
    added = [
        {"id": i, "content": t, "special": True}
        for i, t in enumerate(tokens)
        if t.startswith("<")
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": plain, "merges": []},
    }
    if files == "tokenizer.json":
        (folder / name / files).write_text(json.dumps(content))
        declared = {str(e["id"]): {"content": e["content"]} for e in added}
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": name, "added_tokens_decoder": declared})
        )
    elif files == "vocab.json":
        (folder / name / files).write_text(json.dumps(plain))
        ids = {e["content"]: e["id"] for e in added}
        (folder / name / "added_tokens.json").write_text(json.dumps(ids))
    elif files == "vocab.txt":
        (folder / name / files).write_text("\n".join(tokens) + "\n")
    return folder / name


def run(folder, models, *, rule="union", method="linear", **top):
    content = {
        "merge_method": method,
        "models": [
            {"model": str(folder / m), "parameters": {"weight": w}}
            for m, w in models.items()
        ],
        **({"tokenizer_source": rule} if isinstance(rule, str) else rule),
        **top,
    }
    result = merging.merge_mergekit(
        content, folder / "out", progress=False, report_files=False
    )
    config = json.loads((folder / "out" / "config.json").read_text())
    return load(folder / "out"), config, result


def written_tokens(folder):
    return vocabularies.read_vocabulary(folder / "out").ids


def check_rows(out, ids, want):
    """want: token -> its row of the embedding; the head has minus that."""
    assert out[EMBEDDINGS[0]].shape == (1 + max(ids.values()), WIDTH)
    for token, i in ids.items():
        for name, sign in zip(EMBEDDINGS, (1, -1), strict=True):
            np.testing.assert_allclose(
                out[name][i], sign * want[token], rtol=1e-6, err_msg=token
            )


def test_the_same_tokens_in_another_order(tmp_path):
    make(tmp_path, "one", BASE, 1)
    make(tmp_path, "two", REORDERED, 2)
    out, config, _ = run(tmp_path, {"one": 1, "two": 3})
    ids = written_tokens(tmp_path)
    assert ids == {t: i for i, t in enumerate(BASE)}
    check_rows(out, ids, {t: 0.25 * row(t, 1) + 0.75 * row(t, 2) for t in BASE})
    assert config["vocab_size"] == 4
    # Nothing else moves: positions are no tokens.
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    name = "model.position_embeddings.weight"
    np.testing.assert_allclose(
        out[name], 0.25 * one[name] + 0.75 * two[name], rtol=1e-5, atol=1e-6
    )


def test_union_without_a_base(tmp_path):
    """Tokens that a model lacks: the mean of those that have them."""
    make(tmp_path, "one", BASE, 1)
    make(tmp_path, "two", LARGER, 2)
    make(tmp_path, "three", OTHER, 3)
    for name in ("one", "two", "three"):  # positions have one size
        path = tmp_path / name
        params = load(path)
        params.pop("model.position_embeddings.weight")
        save_again(path, params)
    out, config, result = run(tmp_path, {"one": 1, "two": 2, "three": 1})
    ids = written_tokens(tmp_path)
    # The base's, then words of the others, then added tokens.
    assert ids == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "<f>": 5}
    mean = lambda *rows: np.mean(rows, axis=0)  # noqa: E731
    of = lambda t, *seeds: [row(t, s) for s in seeds]  # noqa: E731
    want = {
        "a": (row("a", 1) + 2 * row("a", 2) + row("a", 3)) / 4,
        "b": (row("b", 1) + 2 * row("b", 2) + row("b", 3)) / 4,
        "c": (row("c", 1) + 2 * row("c", 2) + mean(*of("c", 1, 2))) / 4,
        "d": (row("d", 1) + 2 * mean(*of("d", 1, 3)) + row("d", 3)) / 4,
        "e": (mean(*of("e", 2, 3)) + 2 * row("e", 2) + row("e", 3)) / 4,
        "<f>": row("<f>", 2),
    }
    check_rows(out, ids, want)
    assert config["vocab_size"] == 6
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [(e["id"], e["content"], e["special"]) for e in content["added_tokens"]] == [
        (4, "e", False),
        (5, "<f>", True),
    ]
    declared = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert sorted(declared["added_tokens_decoder"]) == ["4", "5"]
    assert any("aligned by token (6 rows, 6 tokens)" in n for n in result.notes)


def save_again(path, params):
    """The same directory with other tensors."""
    (path / "model.safetensors").unlink()
    save(path / "new", params)
    (path / "new" / "model.safetensors").rename(path / "model.safetensors")
    (path / "new").rmdir()


@pytest.fixture
def three(tmp_path):
    for name, tokens, seed in (("base", BASE, 0), ("m1", LARGER, 1), ("m2", OTHER, 2)):
        path = make(tmp_path, name, tokens, seed)
        params = load(path)
        params.pop("model.position_embeddings.weight")
        save_again(path, params)
    return tmp_path


def test_tokens_that_a_model_lacks_take_the_bases_row(three):
    """So that their task vector is 0."""
    out, config, _ = run(
        three,
        {"m1": 1, "m2": 0.5},
        method="task_arithmetic",
        base_model=str(three / "base"),
        rule="base",
    )
    ids = written_tokens(three)
    assert list(ids) == BASE
    step = {t: np.zeros(WIDTH) for t in BASE}
    for seed, weight, tokens in ((1, 1, LARGER), (2, 0.5, OTHER)):
        for t in set(tokens) & set(BASE):
            step[t] += weight * (row(t, seed) - row(t, 0))
    check_rows(out, ids, {t: row(t, 0) + step[t] for t in BASE})
    assert config["vocab_size"] == 4


def test_tokens_new_to_the_base_get_the_mean_as_its_row(three):
    out, _, _ = run(
        three,
        {"m1": 1, "m2": 0.5},
        method="task_arithmetic",
        base_model=str(three / "base"),
    )
    ids = written_tokens(three)
    assert ids == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "<f>": 5}
    # e is in m1 and m2: the base gets their mean. <f> is m1's: nothing changes.
    mean = (row("e", 1) + row("e", 2)) / 2
    e = mean + (row("e", 1) - mean) + 0.5 * (row("e", 2) - mean)
    np.testing.assert_allclose(out[EMBEDDINGS[0]][ids["e"]], e, rtol=1e-6)
    np.testing.assert_allclose(out[EMBEDDINGS[0]][ids["<f>"]], row("<f>", 1), rtol=1e-6)


def test_a_models_tokenizer(three):
    out, config, _ = run(three, {"base": 1, "m2": 1}, rule=str(three / "m1"))
    ids = written_tokens(three)
    assert list(ids) == ["a", "b", "e", "c", "<f>"]
    want = {t: (row(t, 0) + row(t, 2)) / 2 for t in "ab"}
    want |= {"c": row("c", 0), "e": row("e", 2), "<f>": np.zeros(WIDTH)}
    check_rows(out, ids, want)
    assert config["vocab_size"] == 5
    files = json.loads((three / "out" / "tokenizer_config.json").read_text())
    assert files["tokenizer_class"] == "m1"
    assert config["bos_token_id"] == 0


def test_the_newer_form_and_padding(three):
    rule = {"tokenizer": {"source": "base", "pad_to_multiple_of": 8}}
    out, config, _ = run(three, {"base": 1, "m2": 1}, rule=rule)
    assert out[EMBEDDINGS[0]].shape == (8, WIDTH)
    assert not out[EMBEDDINGS[0]][4:].any()
    assert config["vocab_size"] == 8


def test_padded_rows_of_inputs_are_left_out(tmp_path):
    """Rows beyond the tokenizer are padding; a token beyond the rows does not count."""
    make(tmp_path, "one", BASE, 1, rows=8)
    make(tmp_path, "two", [*BASE, "z"], 2)
    for name in ("one", "two"):
        params = load(tmp_path / name)
        params.pop("model.position_embeddings.weight")
        if name == "two":
            params |= {n: params[n][:4] for n in EMBEDDINGS}
            text = (tmp_path / name / "config.json").read_text()
            config = json.loads(text) | {"vocab_size": 4}
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_again(tmp_path / name, params)
    out, _, _ = run(tmp_path, {"one": 1, "two": 1})
    ids = written_tokens(tmp_path)
    assert list(ids) == BASE
    check_rows(out, ids, {t: (row(t, 1) + row(t, 2)) / 2 for t in BASE})


@pytest.mark.parametrize("files", ["vocab.json", "vocab.txt"])
def test_slow_tokenizers(tmp_path, files):
    make(tmp_path, "one", BASE, 1, files=files)
    make(tmp_path, "two", OTHER, 2, files=files)
    _, config, _ = run(tmp_path, {"one": 1, "two": 1})
    assert written_tokens(tmp_path) == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert config["vocab_size"] == 5
    added = json.loads((tmp_path / "out" / "added_tokens.json").read_text())
    assert added == {"e": 4}


def test_unigram_vocabularies(tmp_path):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "Unigram", "vocab": [["x", -1.0], ["y", -2.0]]}})
    )
    found = vocabularies.read_vocabulary(tmp_path)
    assert (found.ids, found.kind) == ({"x": 0, "y": 1}, "Unigram")


def test_slices_with_a_union(three):
    """The embedding comes from the first slice, but no token's row is lost."""
    content = {
        "merge_method": "passthrough",
        "tokenizer_source": "union",
        "slices": [
            {"sources": [{"model": str(three / m), "layer_range": [0, 1]}]}
            for m in ("base", "m1")
        ],
    }
    merging.merge_mergekit(content, three / "out", progress=False, report_files=False)
    out, ids = load(three / "out"), written_tokens(three)
    want = {t: row(t, 0) for t in BASE} | {"e": row("e", 1), "<f>": row("<f>", 1)}
    for t, i in ids.items():
        np.testing.assert_allclose(out[EMBEDDINGS[0]][i], want[t])
    want |= {t: row(t, 1) for t in LARGER}  # the head is m1's; d is the base's
    for t, i in ids.items():
        np.testing.assert_allclose(out[EMBEDDINGS[1]][i], -want[t])


def test_without_a_rule(three):
    with pytest.raises(
        CheckpointError,
        match=r"tokenizer_source: got none, but lm_head.weight has 4 rows in .*base and"
        r" 5 in .*m1: .* set tokenizer_source",
    ):
        run(three, {"base": 1, "m1": 1}, rule={})
    assert not (three / "out").exists()


def test_tokenizers_that_cannot_be_read(three):
    (three / "m1" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"m1 has no tokenizer.json, vocab.json"):
        run(three, {"base": 1, "m1": 1})
    (three / "m2" / "tokenizer.json").unlink()  # as many rows as the base
    _, _, result = run(three, {"base": 1, "m2": 1})
    assert any("m2 has no tokenizer: taken to be the base's" in n for n in result.notes)
    (three / "base" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json: not a tokenizer: KeyErr"
    ):
        run(three, {"base": 1, "m2": 1})
    vocab = {"model": {"vocab": {"a": 0, "b": 0}}}
    (three / "base" / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(CheckpointError, match=r"the id 0 belongs to two tokens"):
        run(three, {"base": 1, "m2": 1})


def test_models_without_token_embeddings(tmp_path):
    save(tmp_path / "m", {"layers.0.mlp.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match=r"has no tensor with a row a token"):
        run(tmp_path, {"m": 1})
