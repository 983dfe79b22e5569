"""Clips become tokens: tokenizers are trained on the training clips, then frozen.

Legend: N clips, M modalities, L tokens of a clip.
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import json_files
from multitask_jax.data import egocentric
from multitask_jax.data.egocentric import MODALITIES, Clips
from multitask_jax.masked import modalities as mods
from multitask_jax.masked import tokenizers
from multitask_jax.masked.modalities import Modalities, Modality
from multitask_jax.masked.tokenizers import Tokenizer

LEARNT = ("train", "validation")  # splits whose tokens are kept
VIDEO = ("rgb", "depth")


class Tokens(NamedTuple):
    """Clips of a split as ids of the joint table."""

    ids: np.ndarray  # int32 [N, L]
    present: np.ndarray  # bool [N, M]
    known: np.ndarray  # bool [N, L]: the token stands for something known

    def at(self, rows: np.ndarray) -> "Tokens":
        """Some of the clips."""
        return Tokens(self.ids[rows], self.present[rows], self.known[rows])


def train(
    clips: Clips,
    validation: Clips,
    folder: Path,
    *,
    seed: int,
    video_steps: int,
    trajectory_steps: int,
    batch: int,
    temporal: int = 4,
    quantizer: str = "vq",
    kinds: Sequence[str] = MODALITIES,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Trains a tokenizer of each kind that `folder` lacks, on the clips that have it.

    Writes folder/KIND and folder/KIND.json: its curve, and how well clips of "split"
    survive: of validation, or, where none has it, the last of training. A kind that no
    training clip has gets no tokenizer. Returns what is in the files, by kind.
    `quantizer` is that of videos.

    Raises:
      ValueError: fewer than two kinds are there.
      FileNotFoundError: KIND.json is there, but folder/KIND is gone.
    """
    there = [kind for kind in kinds if clips.present[kind].any()]
    if len(there) < min(2, len(kinds)):
        raise ValueError(
            f"training clips have {there}, expected two or more of {', '.join(kinds)}"
        )
    if left := sorted(set(kinds) - set(there)):
        print(f"no training clip has {', '.join(left)}: the model will not know it")
    found = {}
    for i, kind in enumerate(kinds):
        if kind in left:
            continue
        report = folder / f"{kind}.json"
        if report.exists():
            _require(folder / kind)
        else:
            data, valid = having(clips, kind), having(validation, kind)
            split = "validation" if len(valid) else "train"
            valid = valid if len(valid) else data[-max(1, len(data) // 10) :]
            tokenizer, curve = tokenizers.fit(
                config_of(kind, quantizer=quantizer, temporal=temporal),
                data,
                valid,
                key=jax.random.fold_in(jax.random.key(seed), i),
                steps=video_steps if kind in VIDEO else trajectory_steps,
                batch=min(batch if kind in VIDEO else 8 * batch, len(data)),
                learning_rate=3e-3 if kind in VIDEO else 1e-3,
                progress=progress,
            )
            tokenizers.save(tokenizer, folder / kind)
            quality = tokenizers.reconstruction_report(tokenizer, valid)
            about = {"quality": quality, "curve": curve, "split": split}
            json_files.write(report, about)
        found[kind] = json_files.read(report)
    return found


def config_of(kind: str, *, quantizer: str, temporal: int = 4) -> tokenizers.Config:
    """Of a kind's tokenizer; trajectories have their own quantiser."""
    if kind not in VIDEO:
        return tokenizers.Config(kind)
    return tokenizers.Config(kind, quantizer=quantizer, temporal=temporal)


def having(clips: Clips, kind: str) -> np.ndarray:
    """A modality of the clips that have it; a view where all have."""
    array, rows = clips.arrays[kind], clips.present[kind]
    return array if rows.all() else array[rows]


def kinds_in(folder: Path) -> list[str]:
    """Kinds that `train` wrote a tokenizer of: those that training clips have."""
    return [kind for kind in MODALITIES if (folder / f"{kind}.json").exists()]


def load(folder: Path) -> dict[str, Tokenizer]:
    """The tokenizers that `train` wrote, by kind.

    Raises:
      FileNotFoundError: there is none, or of one folder/KIND or KIND.json is gone.
    """
    files = {kind: (folder / kind, folder / f"{kind}.json") for kind in MODALITIES}
    files = {kind: two for kind, two in files.items() if any(p.exists() for p in two)}
    if not files:
        raise FileNotFoundError(f"no tokenizers in {folder}; run --stage=tokenize")
    for path in (path for two in files.values() for path in two):
        _require(path)
    return {kind: tokenizers.load(path) for kind, (path, _) in files.items()}


def _require(path: Path) -> None:
    """Raises FileNotFoundError for a part of a tokenizer that is gone."""
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}, of a tokenizer whose other part is there; put it back, or"
            f" remove {path.parent} and what was made after it, and run"
            " --stage=tokenize"
        )


def modalities_of(tokenizer_of: Mapping[str, Tokenizer]) -> Modalities:
    """What the model is told of them."""
    return tuple(
        Modality(k, tokenizers.grid(t.config), tokenizers.vocabulary(t.config))
        for k, t in tokenizer_of.items()
    )


def tokenize(tokenizer_of: Mapping[str, Tokenizer], clips: Clips) -> Tokens:
    """Tokens of all clips; a modality that a clip lacks is marked as missing."""
    layout = modalities_of(tokenizer_of)
    codes, known = {}, []
    for m in layout:
        rows = clips.present[m.name]
        codes[m.name] = np.zeros((len(rows), *m.grid), np.int32)
        there = np.zeros((len(rows), *m.grid), bool)
        if rows.any():
            some = having(clips, m.name)
            codes[m.name][rows] = tokenizers.encode(tokenizer_of[m.name], some)
            there[rows] = tokenizers.known(tokenizer_of[m.name], some)
        known.append(there.reshape(len(rows), -1))
    ids, _ = mods.flatten(layout, codes)
    present = np.stack([clips.present[m.name] for m in layout], axis=1)
    return Tokens(ids, present, np.concatenate(known, axis=1))


def with_mirrored(clips: Clips) -> Clips:
    """Clips and their mirror images: twice as much to learn from."""
    return egocentric.joined(clips, egocentric.mirrored(clips))


def save(tokens: Tokens, path: Path) -> None:
    """Writes a split's tokens, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **tokens._asdict())
    partial.rename(path)


def read(path: Path) -> Tokens:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as file:
        if missing := [name for name in Tokens._fields if name not in file]:
            raise ValueError(
                f"{path}: got no {', '.join(missing)}: it was made by an earlier"
                " version; remove its folder and what was made after it"
            )
        return Tokens(*(file[name] for name in Tokens._fields))


def files_of(folder: Path) -> str:
    """A digest of all clips' files in a folder: names and checksums, without reading.

    An .npz is a zip, whose directory has a checksum of each array.
    """
    about = [
        f"{p.relative_to(folder).as_posix()} {checksums(p)}"
        for p in egocentric.files_below(folder)
    ]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def checksums(path: Path) -> list[int]:
    """Of each array of an .npz; of another file its size: reading it tells more."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.CRC for info in archive.infolist()]
    except zipfile.BadZipFile:
        return [path.stat().st_size]


def tokenizers_of(folder: Path) -> str:
    """A digest of the tokenizers in a folder, by what `train` wrote of them."""
    found = [(folder / f"{kind}.json").read_bytes() for kind in kinds_in(folder)]
    return hashlib.sha256(b"\n".join(found)).hexdigest()[:16]


def read_clips(folder: Path, limit: int | None = None) -> Clips:
    """A split's clips; its errors say what the stage `record` is for."""
    try:
        return egocentric.load(folder, limit=limit)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"{e}; or put your own clips into {folder} (train, validation and test)"
        ) from None
