"""Checksums of a checkpoint, by tensor: they hold for copies and other shardings too.

A tensor's checksum is the SHA-256 of its dtype, shape and bytes (C order, little
endian), whatever file it lies in. A merge with verify reads its output once more, from
memory mostly, and keeps the checksums in merge_report.json (checksums.json if there is
no report); `compare` and `python -m experiments.verify` check them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitask_jax.checkpoints import delta_file, directory, safetensors_file
from multitask_jax.checkpoints.types import CheckpointError, Reader, TensorInfo

REPORT, ALONE = "merge_report.json", "checksums.json"
_KEY = "checksums"
_CHUNK = 1 << 20  # bytes at a time


class Comparison(NamedTuple):
    """What differs: (name, what is the matter)."""

    tensors: list[tuple[str, str]]
    files: list[tuple[str, str]]
    checked: int  # tensors that were compared

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.tensors and not self.files


def tensor_checksum(
    reader: Reader, name: str, advance: Callable[[int], None] = lambda nbytes: None
) -> str:
    """SHA-256 of a tensor, in hexadecimal."""
    info = _info(reader, name)
    digest = hashlib.sha256(f"{info.dtype} {list(info.shape)}\n".encode())
    step = max(1, _CHUNK // info.dtype.itemsize)
    for start in range(0, info.size, step):
        flat = reader.read(name, start, min(start + step, info.size))
        digest.update(np.ascontiguousarray(flat).view(np.uint8))
        advance(flat.nbytes)
    return digest.hexdigest()


def write(path: Path, threads: int = 2) -> Path:
    """Adds checksums of all tensors to the report in a checkpoint's directory.

    Args:
      path: of the checkpoint. Files beside the weights get a checksum too.
      threads: that compute them.

    Returns:
      The file that has them now.
    """
    reader = _open(path)
    try:
        with ThreadPoolExecutor(threads) as pool:
            names = list(reader.tensors)
            sums = list(pool.map(lambda n: tensor_checksum(reader, n), names))
        tensors = {
            n: {
                "dtype": str(reader.tensors[n].dtype),
                "shape": list(reader.tensors[n].shape),
                "sha256": s,
            }
            for n, s in zip(names, sums, strict=True)
        }
    finally:
        reader.close()
    files = {str(f.relative_to(path)): _file_checksum(f) for f in _beside(path)}
    content = {"tensors": tensors, "files": files}
    report = path / REPORT
    if report.exists():
        data = json.loads(report.read_text())
        report.write_text(json.dumps({**data, _KEY: content}, indent=1) + "\n")
        return report
    (path / ALONE).write_text(json.dumps(content, indent=1) + "\n")
    return path / ALONE


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checksums in a file or in a checkpoint's directory.

    Returns:
      "tensors": {name: {"dtype", "shape", "sha256"}} and "files": {name: sha256}.

    Raises:
      CheckpointError: there are none.
    """
    path = Path(path).expanduser()
    for file in (path / REPORT, path / ALONE) if path.is_dir() else (path,):
        if not file.exists():
            continue
        content = safetensors_file.parse_json(file.read_bytes(), file)
        content = content.get(_KEY, content)
        if _sound(content):
            return content
    raise CheckpointError(
        f"{path}: no checksums there (in {REPORT} or {ALONE}): a merge writes them when"
        " asked to (--verify; in Python verify=True)"
    )


def _sound(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    tensors, files = content.get("tensors"), content.get("files", {})
    return (
        isinstance(tensors, dict)
        and isinstance(files, dict)
        and all(
            isinstance(t, dict) and {"dtype", "shape", "sha256"} <= t.keys()
            for t in tensors.values()
        )
    )


def compare(
    path: str | os.PathLike[str],
    expected: Mapping[str, Any],
    *,
    files: bool = True,
    advance: Callable[[int], None] = lambda nbytes: None,
    threads: int = 2,
) -> Comparison:
    """Reads a checkpoint and tells where it differs from checksums.

    Args:
      path: a checkpoint; it may be copied, sharded in another way, or converted.
      expected: what `read` returns.
      files: whether files beside the weights count too.
      advance: hears of bytes read; called from several threads.
      threads: that read.

    Raises:
      CheckpointError: no checkpoint, or one that is damaged so that it can't be opened.
    """
    path = Path(path).expanduser()
    reader = _open(path)
    try:
        wanted = expected["tensors"]
        with ThreadPoolExecutor(threads) as pool:
            said = pool.map(lambda n: _matter(reader, n, wanted[n], advance), wanted)
            tensors = [(n, s) for n, s in zip(wanted, said, strict=True) if s]
        extra = [n for n in reader.tensors if n not in wanted]
        tensors += [(n, "not in the checksums") for n in extra]
    finally:
        reader.close()
    others = []
    home = path if path.is_dir() else path.parent
    for name, value in (expected.get("files", {}) if files else {}).items():
        inside = Path(name).parts and not Path(name).is_absolute()
        file = home / name
        if ".." in Path(name).parts or not inside or not file.is_file():
            others.append((name, "missing"))
        elif _file_checksum(file) != value:
            others.append((name, "differs"))
    return Comparison(tensors, others, len(wanted))


def _matter(
    reader: Reader, name: str, wanted: Mapping[str, Any], advance: Callable[[int], None]
) -> str:
    """What is wrong with a tensor; "" if nothing is."""
    if name not in reader.tensors and name not in reader.aliases:
        return "missing"
    info = _info(reader, name)
    got, expected = f"{info.dtype} {list(info.shape)}", f"{wanted['dtype']}"
    expected += f" {wanted['shape']}"
    if got != expected:
        return f"got {got}, expected {expected}"
    if tensor_checksum(reader, name, advance) == wanted["sha256"]:
        return ""
    file_of = getattr(reader, "file_of", None)
    return f"differs (in {file_of(name)})" if file_of else "differs"


def _info(reader: Reader, name: str) -> TensorInfo:
    return reader.tensors[reader.aliases.get(name, name)]


def _open(path: Path) -> Reader:
    """A delta as it is stored: its base is not needed to tell whether it changed."""
    if path.exists() and delta_file.is_format(path):
        return safetensors_file.open_reader(path)
    return directory.open(path)


def nbytes(path: Path) -> int:
    """Bytes of all tensors of a checkpoint."""
    reader = _open(path)
    try:
        return sum(t.nbytes for t in reader.tensors.values())
    finally:
        reader.close()


def _beside(path: Path) -> list[Path]:
    """Files of a checkpoint that are not its weights: config, tokenizer, tasks."""
    tasks = {f for f in path.glob("*/*.safetensors") if f.is_file()}
    return sorted({*directory.companions(path), *tasks})


def _file_checksum(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
