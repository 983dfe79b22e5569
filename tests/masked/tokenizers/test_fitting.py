import functools
import json

import jax
import numpy as np
import pytest

from multitask_jax.checkpoints import CheckpointError
from multitask_jax.masked import tokenizers
from multitask_jax.masked.tokenizers import Config, coding
from tests.masked.tokenizers import synthetic
from tests.merging.common import assert_same_bits

SIZES = {"width": 16, "blocks": 1, "frames": 8, "size": 16, "samples": 16}
SIZES |= {"stride": 2, "codes": 32}
KINDS = ["rgb", "depth", "camera", "gaze"]


def _config(kind):
    quantizer = "fsq" if kind == "depth" else "vq"
    return Config(kind, quantizer=quantizer, levels=(5, 5, 3), latent=8, **SIZES)


@functools.cache
def _data(kind):
    return synthetic.clips(_config(kind), 24)


@functools.cache
def _fitted(kind, seed=0, again=0):
    config, data = _config(kind), _data(kind)
    key = jax.random.key(seed)
    return tokenizers.fit(
        config, data, data[:5], key=key, steps=60, batch=6, progress=False
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_is_recorded(kind):
    _, history = _fitted(kind)
    # Every 25 steps, and ten times in all with a loss of validation.
    steps = sorted({25, 50, *range(6, 61, 6)})
    assert [record["step"] for record in history] == steps
    judged = [r["step"] for r in history if "valid_loss" in r]
    assert judged == list(range(6, 61, 6))
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["valid_loss"] < history[0]["valid_loss"]
    for record in history:
        assert 0 < record["used"] <= 1
        assert 1 <= record["perplexity"] <= 75


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_of_the_grid_and_decode_to_finite_data_units(kind):
    tokenizer, _ = _fitted(kind)
    data = _data(kind)
    tokens = tokenizers.encode(tokenizer, data)
    assert tokens.shape == (24, *tokenizers.grid(tokenizer.config))
    assert tokens.dtype == np.int32
    assert 0 <= tokens.min() <= tokens.max() < tokenizers.vocabulary(tokenizer.config)
    y = tokenizers.decode(tokenizer, tokens)
    assert y.shape == data.shape
    assert y.dtype == data.dtype
    assert np.isfinite(y).all()
    if kind == "camera":  # rigid motions, whatever the network says
        r = y[..., :3, :3]
        eye = np.broadcast_to(np.eye(3), r.shape)
        np.testing.assert_allclose(r @ np.swapaxes(r, -1, -2), eye, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_certain_tokens_is_their_clip(kind):
    tokenizer, _ = _fitted(kind)
    tokens = tokenizers.encode(tokenizer, _data(kind)[:4])
    size = tokenizers.vocabulary(tokenizer.config)
    sure = np.eye(size, dtype=np.float32)[tokens]
    made, clip = (
        x.astype(np.float32)
        for x in (
            tokenizers.decode_mean(tokenizer, sure),
            tokenizers.decode(tokenizer, tokens),
        )
    )
    # Bytes may round to the other side.
    np.testing.assert_allclose(made, clip, rtol=1e-4, atol=1 if kind == "rgb" else 1e-4)
    drawn = tokenizers.decode_mean(tokenizer, sure, draws=3).astype(np.float32)
    np.testing.assert_allclose(
        drawn, clip, rtol=1e-4, atol=1 if kind == "rgb" else 1e-4
    )
    for draws in (0, 2):
        even = np.full_like(sure, 1 / size)
        even = tokenizers.decode_mean(tokenizer, even, draws=draws)
        assert even.dtype == _data(kind).dtype
        assert np.isfinite(even).all()
    with pytest.raises(ValueError, match=r"probabilities: got \[4, .*expected \[N, "):
        tokenizers.decode_mean(tokenizer, sure[..., 1:])
    with pytest.raises(ValueError, match="draws: got -1"):
        tokenizers.decode_mean(tokenizer, sure, draws=-1)


def test_the_mean_of_draws_is_the_expected_signal():
    """Of a first token with two codes, each as likely: the mean of both clips."""
    tokenizer, _ = _fitted("gaze")
    tokens = tokenizers.encode(tokenizer, _data("gaze")[:1])
    size = tokenizers.vocabulary(tokenizer.config)
    both = [tokens.copy() for _ in range(2)]
    both[1][0, 0] = (tokens[0, 0] + 1) % size
    p = np.mean([np.eye(size, dtype=np.float32)[t] for t in both], axis=0)
    found = tokenizers.decode_mean(tokenizer, p, draws=4000)
    ends = np.stack([tokenizers.decode(tokenizer, t) for t in both])
    inside = ((ends > 0) & (ends < 1)).all(axis=0)  # others: cut at the picture's edge
    moved = np.abs(ends[0] - ends[1]) > 0.1
    assert (inside & moved).any()
    np.testing.assert_allclose(found[inside], ends.mean(axis=0)[inside], atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_reports_say_how_much_is_lost(kind):
    tokenizer, _ = _fitted(kind)
    report = tokenizers.reconstruction_report(tokenizer, _data(kind))
    names = {
        "rgb": {"psnr"},
        "depth": {"abs_rel"},
        "camera": {"translation_rmse", "rotation_error"},
        "gaze": {"rmse"},
    }[kind]
    assert report.keys() == names | {"used", "perplexity"}
    assert all(np.isfinite(value) for value in report.values())


def test_batches_are_padded_not_seen():
    tokenizer, _ = _fitted("gaze")
    data = _data("gaze")
    whole = tokenizers.encode(tokenizer, data, batch=32)
    before = coding._encode._cache_size()
    np.testing.assert_array_equal(tokenizers.encode(tokenizer, data, batch=16), whole)
    assert coding._encode._cache_size() == before + 1  # 16 and the 8 left: one shape
    some = tokenizers.encode(tokenizer, data[:0])
    assert some.shape == (0, 8)
    some, all_ = (tokenizers.decode(tokenizer, whole, batch=b) for b in (5, 64))
    np.testing.assert_allclose(some, all_, atol=1e-5)


def test_values_at_invalid_samples_do_not_matter():
    """NaN in one coordinate or in both: the sample is unknown all the same."""
    tokenizer, _ = _fitted("gaze")
    half = _data("gaze").copy()
    half[:, :2, 0] = 0.7  # y is NaN still
    np.testing.assert_array_equal(
        tokenizers.encode(tokenizer, half), tokenizers.encode(tokenizer, _data("gaze"))
    )


def test_a_gap_in_a_gaze_is_its_nearest_sample():
    """Not the picture's middle, which would be a gaze like any other."""
    tokenizer, _ = _fitted("gaze")
    whole = np.full((1, 16, 2), 0.2, np.float32)
    gap = whole.copy()
    gap[:, 4:10] = np.nan
    np.testing.assert_array_equal(
        tokenizers.encode(tokenizer, gap), tokenizers.encode(tokenizer, whole)
    )
    # Tokens are of two samples; those of unknown ones alone are no truth.
    expected = np.ones((1, 8), bool)
    expected[:, 2:5] = False
    np.testing.assert_array_equal(tokenizers.known(tokenizer, gap), expected)


def test_a_token_of_no_known_depth_is_no_truth():
    """A pixel of one frame that is known is enough; tokens are 4 frames of 8 x 8."""
    video, _ = _fitted("depth")
    assert tokenizers.known(video, _data("depth")).all()
    some = np.full((1, 8, 16, 16), 2.0, np.float32)
    some[:, 4:, 8:, :8] = np.nan
    some[:, 4:, :8, 8:] = np.nan
    some[0, 7, 7, 15] = 1.0
    expected = np.ones((1, 2, 2, 2), bool)
    expected[0, 1, 1, 0] = False
    np.testing.assert_array_equal(tokenizers.known(video, some), expected)


def test_decoded_cameras_begin_at_the_identity():
    tokenizer, _ = _fitted("camera")
    y = tokenizers.decode(tokenizer, tokenizers.encode(tokenizer, _data("camera")))
    eye = np.broadcast_to(np.eye(4), (len(y), 4, 4))
    np.testing.assert_allclose(y[:, 0], eye, atol=1e-5)


@pytest.mark.parametrize("kind", ["depth", "gaze"])
def test_a_key_gives_the_same_tokenizer_and_another_key_another(kind):
    first, history = _fitted(kind)
    second, again = _fitted(kind, again=1)
    assert history == again
    assert_same_bits(first.variables, second.variables)
    other, _ = _fitted(kind, seed=1)
    flat = [np.ravel(x) for x in jax.tree.leaves(first.variables)]
    there = [np.ravel(x) for x in jax.tree.leaves(other.variables)]
    assert (np.concatenate(flat) != np.concatenate(there)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_bit_for_bit(kind, tmp_path):
    tokenizer, _ = _fitted(kind)
    for _ in range(2):  # the second one replaces the first
        tokenizers.save(tokenizer, tmp_path / "a" / kind)
    found = tokenizers.load(tmp_path / "a" / kind)
    assert found.config == tokenizer.config
    assert_same_bits(found.variables, tokenizer.variables)
    assert_same_bits(found.statistics, tokenizer.statistics)
    assert [p.name for p in (tmp_path / "a").iterdir()] == [kind]
    data = _data(kind)
    np.testing.assert_array_equal(
        tokenizers.encode(found, data), tokenizers.encode(tokenizer, data)
    )


def test_what_is_no_tokenizer_is_refused(tmp_path):
    tokenizer, _ = _fitted("gaze")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        tokenizers.load(tmp_path)
    with pytest.raises(ValueError, match="is no tokenizer"):
        tokenizers.save(tokenizer, tmp_path)
    tokenizers.save(tokenizer, tmp_path / "t")
    path = tmp_path / "t" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"width": 32}))
    with pytest.raises(CheckpointError, match="shape"):
        tokenizers.load(tmp_path / "t")
    path.write_text(json.dumps(settings | {"width": -4}))
    with pytest.raises(CheckpointError, match="width: got -4"):
        tokenizers.load(tmp_path / "t")
    path.write_text(json.dumps({"kind": "gaze"}))
    with pytest.raises(CheckpointError, match="another version"):
        tokenizers.load(tmp_path / "t")


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    tokenizer, _ = _fitted("gaze")
    tokenizers.save(tokenizer, tmp_path / "t")

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(ocp, "save", fail)
    with pytest.raises(OSError, match="no space"):
        tokenizers.save(tokenizer, tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert tokenizers.load(tmp_path / "t").config == tokenizer.config


def test_clips_and_tokens_that_do_not_fit_are_refused():
    tokenizer, _ = _fitted("gaze")
    data = _data("gaze")
    with pytest.raises(
        ValueError, match=r"x: got float64\[24, 16, 2\], expected float"
    ):
        tokenizers.encode(tokenizer, data.astype(np.float64))
    with pytest.raises(ValueError, match=r"data: got float32\[24, 15, 2\]"):
        tokenizers.fit(
            _config("gaze"), data[:, 1:], key=jax.random.key(0), steps=1, batch=1
        )
    with pytest.raises(ValueError, match="batch=25 for 24 clips"):
        tokenizers.fit(_config("gaze"), data, key=jax.random.key(0), steps=1, batch=25)
    tokens = tokenizers.encode(tokenizer, data)
    with pytest.raises(ValueError, match=r"from 32 to 32, expected integers"):
        tokenizers.decode(tokenizer, np.full_like(tokens, 32))
    with pytest.raises(ValueError, match=r"tokens: got int32\[24, 7\]"):
        tokenizers.decode(tokenizer, tokens[:, 1:])
    nothing = np.full_like(_data("depth"), np.nan)
    with pytest.raises(ValueError, match="depth without any finite value"):
        tokenizers.fit(
            _config("depth"), nothing, key=jax.random.key(0), steps=1, batch=1
        )
