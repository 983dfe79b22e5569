"""What binds a run's folders: flags, clips and tokenizers; no run."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from experiments import egom2p, egom2p_folders, egom2p_study, egom2p_tokens


@pytest.fixture
def config(tmp_path):
    """Of a run with a clip in each split, whose tokenizers were made."""
    for split in (*egom2p_tokens.LEARNT, "test"):
        put(tmp_path, split)
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "rgb.json").write_text("{}")
    config = egom2p.Config(workdir=str(tmp_path))
    egom2p_folders.remember(config, "tokenizers")
    egom2p_folders.agree(config, "tokenizers")
    return config


def put(workdir, split, text="1", name="mine"):
    """A clip, as far as digests go."""
    path = workdir / "clips" / split / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("split", [*egom2p_tokens.LEARNT, "test"])
def test_only_clips_to_learn_from_bind(config, tmp_path, split):
    put(tmp_path, split, name="later")
    if split == "test":
        egom2p_folders.agree(config, "tokenizers")
        return
    with pytest.raises(ValueError, match=r"made with other settings.*'files'"):
        egom2p_folders.agree(config, "tokenizers")


def test_a_number_of_clips_binds_only_a_recording(config, tmp_path):
    other = dataclasses.replace(config, clips=7)
    egom2p_folders.agree(other, "tokenizers")
    with pytest.raises(ValueError, match=r"other settings.*'seed'"):
        egom2p_folders.agree(dataclasses.replace(config, seed=7), "tokenizers")
    (tmp_path / "clips" / "dataset.json").write_text("{}")
    egom2p_folders.remember(config, "tokenizers")
    with pytest.raises(ValueError, match=r"other settings.*'clips': \(6000, 7\)"):
        egom2p_folders.agree(other, "tokenizers")


def test_clips_behind_a_link_bind_too(config, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "clips" / "train" / "linked").symlink_to(elsewhere)
    egom2p_folders.agree(config, "tokenizers")
    (elsewhere / "later.npz").write_text("1")
    with pytest.raises(ValueError, match=r"made with other settings.*'files'"):
        egom2p_folders.agree(config, "tokenizers")


def test_clips_that_are_gone_are_told(config, tmp_path):
    shutil.rmtree(tmp_path / "clips" / "validation")
    with pytest.raises(FileNotFoundError, match=r"no clips in .*validation"):
        egom2p_folders.agree(config, "tokenizers")


def test_settings_alone_bind_nobody_and_damaged_ones_are_told(config, tmp_path):
    (tmp_path / "tokenizers" / "rgb.json").unlink()
    put(tmp_path, "train", "22")
    egom2p_folders.agree(config, "tokenizers")
    (tmp_path / "tokenizers" / "rgb.json").write_text("{}")
    (tmp_path / "tokenizers" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizers/settings\.json.*damaged"):
        egom2p_folders.agree(config, "tokenizers")


def test_one_digest_of_all_splits_is_still_read(config, tmp_path):
    """As earlier versions wrote it."""
    file = tmp_path / "tokenizers" / "settings.json"
    one = {"files": egom2p_tokens.files_of(tmp_path / "clips")}
    file.write_text(json.dumps(json.loads(file.read_text()) | one))
    egom2p_folders.agree(config, "tokenizers")
    put(tmp_path, "train", "22")
    with pytest.raises(ValueError, match="made with other settings"):
        egom2p_folders.agree(config, "tokenizers")


def test_a_recording_that_was_cut_off_is_not_tokenized(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    maps = {"train/all": ["MAP01", "MAP06"], "test/all": ["MAP05"]}
    about = clips / "dataset.json"
    about.write_text(json.dumps({"clips": 9, "maps": maps}))
    put(tmp_path, "train/all", name="MAP01")
    config = egom2p.Config(workdir=str(tmp_path), stage="tokenize")
    with pytest.raises(FileNotFoundError, match=r"got 1 shards .* 3; run --stage=rec"):
        egom2p.run(config)
    # Of two clips, the third map has none.
    about.write_text(json.dumps({"clips": 2, "maps": maps}))
    put(tmp_path, "test/all", name="MAP05")
    egom2p_folders.recorded(clips)
    about.unlink()
    (clips / "test" / "all" / "MAP05.npz").unlink()
    egom2p_folders.recorded(clips)


def test_home_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(egom2p, "record", lambda config, workdir: None)
    egom2p.run(egom2p.Config(workdir="~/w", stage="record", progress=False))
    told = json.loads((tmp_path / "w" / "config.json").read_text())
    assert told["workdir"] == str(tmp_path / "w")
    made = egom2p.Config(stage="generate", input="~/no.npz", targets="depth")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/no.npz: no such file"):
        egom2p.run(made)
    monkeypatch.setattr(egom2p, "generate", lambda config: config.output)
    assert egom2p.run(egom2p.Config(stage="generate", output="~/made")) == str(
        tmp_path / "made"
    )
    with pytest.raises(FileNotFoundError, match=f"no {tmp_path}/base/tokens"):
        egom2p_study.run(egom2p_study.Config(base="~/base", workdir="~/study"))


def test_an_evaluation_leaves_the_runs_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(egom2p, "evaluate", lambda config, workdir: {"found": 1})
    monkeypatch.setattr(egom2p, "pretrain", lambda config, workdir: None)
    config = egom2p.Config(workdir=str(tmp_path), stage="pretrain", steps=7)
    egom2p.run(config)
    bare = egom2p.Config(workdir=str(tmp_path), stage="evaluate")
    assert egom2p.run(bare) == {"found": 1}
    assert json.loads(Path(tmp_path, "config.json").read_text())["steps"] == 7
