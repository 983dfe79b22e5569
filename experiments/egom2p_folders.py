"""What lies in a run's folders, and by which flags and from what it was made.

WORKDIR/tokenizers, tokens and model have a settings.json each: the flags that their
contents depend on, and digests of the clips and tokenizers that they were made from.
Clips of test are none of these: nothing is kept of them, `evaluate` reads them anew.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import egom2p_tokens as tokens_of
from experiments import json_files, study_store
from multitask_jax.data import egocentric

if TYPE_CHECKING:
    from experiments.egom2p import Config

_RECORD = ("seed", "clips")
_TOKENIZE = (
    *_RECORD, "video_steps", "trajectory_steps", "tokenizer_batch", "quantizer",
    "mirror",
)  # fmt: skip
_PRETRAIN = (
    *_TOKENIZE, "size", "steps", "batch", "rate", "inputs", "targets_budget", "masking",
    "focus", "evaluate_every",
)  # fmt: skip
# Folder -> the flags that its contents depend on.
_DEPENDS = {"tokenizers": _TOKENIZE, "tokens": _TOKENIZE, "model": _PRETRAIN}
_FILE = "settings.json"


def agree(config: "Config", *names: str) -> None:
    """Refuses folders of WORKDIR that were made by other settings than now.

    Settings that are alone in their folder are those of a stage that failed before it
    made anything: they bind nobody.

    Raises:
      ValueError: tells the folder and what differs.
      FileNotFoundError: the clips are gone.
    """
    workdir = Path(config.workdir)
    for name in names:
        folder = workdir / name
        file = folder / _FILE
        if not file.exists():
            continue
        if all(p.name.startswith((_FILE, ".")) for p in folder.iterdir()):
            continue
        clips_there(workdir)
        if differ := changed(file, _settings(config, name), workdir):
            raise ValueError(
                f"{folder} was made with other settings (there, now): {differ}; choose"
                " another --workdir, or remove that folder and what was made after it"
            )


def remember(config: "Config", name: str) -> None:
    """Writes a folder's settings.json; call it once its inputs were read."""
    path = Path(config.workdir) / name / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write(path, _settings(config, name), indent=1)


def as_trained(config: "Config") -> "Config":
    """The config with the flags by which the model in its workdir was made.

    Raises:
      FileNotFoundError: there is no model.
    """
    file = Path(config.workdir) / "model" / _FILE
    made = json_files.read(there(file, "pretrain"))
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: made[k] for k in names & made.keys()})


def there(path: Path, stage: str) -> Path:
    """The path; FileNotFoundError names the stage that makes it."""
    if not path.exists():
        raise FileNotFoundError(f"no {path}; run --stage={stage} first")
    return path


def clips_there(workdir: Path) -> None:
    """Raises FileNotFoundError where clips were, and there are none any more."""
    for split in tokens_of.LEARNT:
        folder = workdir / "clips" / split
        if not egocentric.files_below(folder):
            raise FileNotFoundError(
                f"no clips in {folder}; expected those that {workdir} was made of: put"
                " them back, or choose another --workdir"
            )


def own_clips(workdir: Path) -> bool:
    """Whether WORKDIR/clips are the user's own: a recording has a dataset.json."""
    clips = workdir / "clips"
    return clips.exists() and not (clips / "dataset.json").exists()


def recorded(clips: Path) -> None:
    """Refuses a recording that was cut off; the user's own clips have no dataset.json.

    Raises:
      FileNotFoundError: shards are missing.
    """
    file = clips / "dataset.json"
    if not file.exists():
        return
    about = json_files.read(file)
    shards = [
        clips / folder / f"{name}.npz"
        for folder, names in about.get("maps", {}).items()
        for name in names
    ]
    # With fewer clips than maps, some of these have none.
    wanted = min(about.get("clips", 0), len(shards))
    done = sum(path.exists() for path in shards)
    if done < wanted:
        raise FileNotFoundError(
            f"{clips}: got {done} shards of a recording, expected {wanted}; run"
            " --stage=record, it goes on"
        )


def fit_together(workdir: Path, *names: str) -> None:
    """Refuses tokens or a model of other tokenizers than WORKDIR has now.

    Raises:
      ValueError: tells the folder.
    """
    codes = tokens_of.tokenizers_of(workdir / "tokenizers")
    for name in names:
        if study_store.changed(workdir / name / _FILE, {"codes": codes}):
            raise ValueError(
                f"{workdir / name} was made with other tokenizers than are in"
                f" {workdir / 'tokenizers'}; remove it and what was made after it, and"
                " make them anew"
            )


def tokenized(workdir: Path) -> None:
    """Raises FileNotFoundError without the last file of the stage `tokenize`."""
    there(workdir / "tokens" / f"{tokens_of.LEARNT[-1]}.npz", "tokenize")


def digests(workdir: Path) -> dict[str, str]:
    """Of the clips that are learned from, by split."""
    clips = workdir / "clips"
    return {split: tokens_of.files_of(clips / split) for split in tokens_of.LEARNT}


def changed(
    file: Path, told: Mapping[str, Any], workdir: Path
) -> dict[str, tuple[Any, Any]]:
    """`study_store.changed`, where `told` has "files", the `digests` of WORKDIR.

    Earlier versions wrote one digest of all clips, those of test too: such a file is
    told that.
    """
    if file.exists() and isinstance(json_files.read(file).get("files"), str):
        told = {**told, "files": tokens_of.files_of(workdir / "clips")}
    return study_store.changed(file, told)


def _settings(config: "Config", name: str) -> dict[str, Any]:
    settings = {key: getattr(config, key) for key in _DEPENDS[name]}
    workdir = Path(config.workdir)
    if own_clips(workdir):
        del settings["clips"]  # of a recording
    settings["files"] = digests(workdir)
    if name != "tokenizers":  # what comes after them
        settings["codes"] = tokens_of.tokenizers_of(workdir / "tokenizers")
    return settings
