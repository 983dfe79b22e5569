"""Collections that lack a modality."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import egom2p_tokens, json_files
from multitask_jax.data.egocentric import Clips
from multitask_jax.masked import tokenizers

KINDS = ("depth", "camera", "gaze")


def clips(count: int, **present: bool) -> Clips:
    """Clips of numbers that stand for them (*synthetic*)."""
    return Clips(
        {k: np.arange(count, dtype=np.float32) for k in KINDS},
        {k: np.full(count, present.get(k, True)) for k in KINDS},
        np.array([f"clip {i}" for i in range(count)]),
        np.array(["mine"] * count),
    )


@pytest.fixture
def fitted(monkeypatch):
    """(kind, training clips, validation clips) of each tokenizer that is asked for."""
    seen = []

    def fit(config, data, valid, **_):
        seen.append((config.kind, len(data), list(valid)))
        return config.kind, []

    monkeypatch.setattr(tokenizers, "fit", fit)
    monkeypatch.setattr(tokenizers, "save", lambda _, path: path.mkdir(exist_ok=True))
    monkeypatch.setattr(tokenizers, "reconstruction_report", lambda *_: {"used": 1})
    return seen


def train(tmp_path, some, validation):
    return egom2p_tokens.train(
        some,
        validation,
        tmp_path,
        seed=0,
        video_steps=1,
        trajectory_steps=1,
        batch=2,
        kinds=KINDS,
        progress=False,
    )


def test_a_modality_that_no_clip_has_is_left_out(tmp_path, fitted, capsys):
    made = train(tmp_path, clips(20, gaze=False), clips(3, depth=False))
    assert "no training clip has gaze" in capsys.readouterr().out
    assert list(made) == ["depth", "camera"]
    # Validation lacks depth: what survives is told of the last training clips.
    assert fitted == [("depth", 20, [18, 19]), ("camera", 20, [0, 1, 2])]
    assert [made[kind]["split"] for kind in made] == ["train", "validation"]
    again = train(tmp_path, clips(20, gaze=False), clips(3))
    assert again == made
    assert len(fitted) == 2


def test_one_modality_is_nothing_to_make_others_of(tmp_path, fitted):
    alone = clips(20, gaze=False, camera=False)
    with pytest.raises(ValueError, match=r"training clips have \['depth'\], expected"):
        train(tmp_path, alone, clips(3))
    assert fitted == []
    assert list(tmp_path.iterdir()) == []


def test_half_a_tokenizer_is_named(tmp_path, fitted):
    """By training, which would take it for made, and by reading."""
    with pytest.raises(FileNotFoundError, match="no tokenizers in"):
        egom2p_tokens.load(tmp_path)
    train(tmp_path, clips(20), clips(3))
    (tmp_path / "camera").rmdir()
    for read in (
        lambda: train(tmp_path, clips(20), clips(3)),
        lambda: egom2p_tokens.load(tmp_path),
    ):
        with pytest.raises(FileNotFoundError, match=r"no .*/camera, .*=tokenize"):
            read()
    (tmp_path / "camera").mkdir()
    (tmp_path / "gaze.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*/gaze\.json, "):
        egom2p_tokens.load(tmp_path)
    # Cut off between the two, training makes it again.
    train(tmp_path, clips(20), clips(3))
    assert [kind for kind, *_ in fitted] == [*KINDS, "gaze"]


def test_a_kinds_file_is_whole_or_told(tmp_path, fitted):
    """A run that was cut off while it wrote, as another editor could leave it."""
    made = train(tmp_path, clips(20), clips(3))
    assert not list(tmp_path.glob("*.partial"))
    whole = (tmp_path / "gaze.json").read_text()
    assert json.loads(whole) == made["gaze"]
    (tmp_path / "gaze.json").write_text(whole[:-3])
    with pytest.raises(ValueError, match=r"gaze\.json: expected JSON, got a damaged"):
        train(tmp_path, clips(20), clips(3))


def test_a_file_of_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "history.json"
    json_files.write(path, [1])

    def fail(self, text):
        with self.open("w") as file:
            file.write(text[:2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space"):
        json_files.write(path, [1, 2, 3])
    assert json_files.read(path) == [1]
