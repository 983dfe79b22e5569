"""What a study needs of its base, told before anything is trained; no run."""

import json

import numpy as np
import pytest

from experiments import egom2p_folders, egom2p_study, egom2p_tokens
from experiments.egom2p_tokens import Tokens
from multitask_jax.data.egocentric import MODALITIES, Clips
from multitask_jax.masked.tokenizers import Tokenizer


@pytest.fixture
def base(tmp_path, monkeypatch):
    """(kinds with a tokenizer, kinds present by split) -> a study on such a base."""
    home = tmp_path / "base"
    for split in (*egom2p_tokens.LEARNT, "test"):
        (home / "clips" / split).mkdir(parents=True)
        (home / "clips" / split / "mine.npz").write_text("1")
    (home / "tokens").mkdir()
    for split in egom2p_tokens.LEARNT:
        (home / "tokens" / f"{split}.npz").write_text(split)
    (home / "tokenizers").mkdir()
    made = {"files": egom2p_folders.digests(home), "mirror": False}
    (home / "tokenizers" / "settings.json").write_text(json.dumps(made))

    def study(kinds=MODALITIES, *, count=3, parts, tasks="gaze,depth", **lacks):
        def tokens(split):
            present = [k not in lacks.get(split, ()) for k in kinds]
            present = np.tile(np.array(present), (count, 1))
            return Tokens(np.zeros((count, 4), np.int32), present, present)

        def own(kind):
            return Tokenizer(egom2p_tokens.config_of(kind, quantizer="vq"), None, None)

        for name, fake in (
            ("load", lambda _: {kind: own(kind) for kind in kinds}),
            ("read", lambda path: tokens(path.stem)),
            ("tokenize", lambda *_: tokens("test")),
            ("read_clips", lambda *_: Clips({}, {}, ["a"], ["a"])),
        ):
            monkeypatch.setattr(egom2p_tokens, name, fake)
        return egom2p_study.Config(
            base=str(home), workdir=str(tmp_path / "w"), parts=parts, tasks=tasks
        )

    return study


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"kinds": ("rgb", "depth")}, "--tasks: got gaze, but .* no tokenizer of gaze"),
        ({"test": ("gaze",)}, "--tasks: got gaze, but 0 clips of test .* expected 2"),
        ({"count": 1}, "--tasks: got gaze, but 1 clips of test"),
        (
            {"parts": "merging", "validation": ("depth",)},
            "--tasks: got depth, but 0 clips of validation .* leave it out",
        ),
        (
            {"kinds": ("rgb", "gaze"), "parts": "frames", "tasks": "gaze"},
            "--parts: got frames, but .* has no tokenizer of depth",
        ),
        (
            {"parts": "coverage", "train": ("gaze",)},
            "--parts: got coverage, but no training clip has all",
        ),
        ({"tasks": ""}, "--tasks: got none, expected some of gaze, camera"),
    ],
)
def test_what_the_base_lacks_is_told_first(base, tmp_path, about, message):
    with pytest.raises(ValueError, match=message):
        egom2p_study.run(base(**{"parts": "masking"} | about))
    assert not (tmp_path / "w").exists()


def test_what_no_part_needs_may_lack(base, tmp_path, monkeypatch):
    """And a study is bound to the test clips that it measured."""
    monkeypatch.setattr(egom2p_study, "masking", lambda study: study.tasks)
    monkeypatch.setattr(egom2p_study.reports, "write", lambda *_: None)
    config = base(("rgb", "gaze"), parts="masking", tasks="gaze", validation=("gaze",))
    (task,) = egom2p_study.run(config)["masking"]
    assert task.wanted == "gaze"
    (tmp_path / "base" / "clips" / "test" / "mine.npz").write_text("22")
    with pytest.raises(ValueError, match=r"another base .*'test'"):
        egom2p_study.run(config)
