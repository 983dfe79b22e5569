"""safetensors, memory-mapped in and written in place: one file, or indexed shards.

The header is parsed here rather than by the `safetensors` package because that package
hands out whole tensors only; a merge reads and writes slices of them.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from multitask_jax.checkpoints.json_file import (
    MAX_BYTES,
    check_regular,
    parse_json,
    read_json,
)
from multitask_jax.checkpoints.types import (
    CheckpointError,
    FormatWriter,
    TensorInfo,
    brief,
    name_problem,
    shape_problem,
)

INDEX_NAME = "model.safetensors.index.json"
# The reference implementation refuses longer headers too.
MAX_HEADER_BYTES = MAX_BYTES
MOST_MAPS = 32  # files of a checkpoint that are mapped at a time
# A slice of at most this many bytes, of a tensor of many more, is one of a sample.
_GLANCE = 1 << 16

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = frozenset(dtype for name, dtype in DTYPES.items() if "F" in name)


def is_format(path: Path) -> bool:
    """Whether `path` is a safetensors file, or a directory that holds some."""
    if path.is_dir():
        return any(path.glob("*.safetensors")) or (path / INDEX_NAME).exists()
    return path.suffix == ".safetensors"


def _is_natural(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _entry(name: str, entry: Any, data_bytes: int, where: Path) -> tuple[Any, int]:
    """Checks one tensor of a header; returns its TensorInfo and its byte offset."""
    at = f"{where}: tensor {name[:120]!r}"
    if problem := name_problem(name):
        raise CheckpointError(f"{at}: {problem}")
    if not isinstance(entry, dict) or {"dtype", "shape", "data_offsets"} - set(entry):
        raise CheckpointError(f"{at}: expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{at}: got dtype {brief(entry['dtype'])}, expected one of"
            f" {', '.join(DTYPES)}; convert the file to one of these"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or (problem := shape_problem(shape)):
        problem = problem or "expected natural numbers"
        raise CheckpointError(f"{at}: got shape {brief(shape)}, {problem}: damaged")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_natural, offsets))
        or not offsets[0] <= offsets[1] <= data_bytes
    ):
        raise CheckpointError(
            f"{at}: got data_offsets {brief(offsets)}, expected a range within the"
            f" {data_bytes} bytes after the header: the file is truncated or damaged;"
            " download or save it again"
        )
    info = TensorInfo(name, tuple(shape), dtype)
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(
            f"{at}: data_offsets span {offsets[1] - offsets[0]} bytes, but"
            f" {entry['dtype']} {shape} takes {info.nbytes}: the file is damaged"
        )
    return info, offsets[0]


def _texts(metadata: Any, where: Path) -> dict[str, str]:
    """The metadata of a header, which must be texts by name."""
    metadata = metadata or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(x, str) for x in metadata.values()
    ):
        raise CheckpointError(
            f"{where}: got __metadata__ {brief(metadata)}, expected texts by name"
        )
    return metadata


class _File:
    """One file: its tensors in file order and where they lie."""

    def __init__(self, path: Path):
        self.name = path.name
        size = check_regular(path)
        if size < 8:
            raise CheckpointError(f"{path}: got {size} bytes, not a safetensors file")
        self._path, self._size = path, size
        mapped = np.memmap(path, np.uint8, mode="r")
        header = int.from_bytes(mapped[:8].tobytes(), "little")
        if header > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: the header claims {header} bytes, but the file has {size}"
                f" (limit {MAX_HEADER_BYTES}): truncated, or not a safetensors file"
            )
        self._start = 8 + header
        data_bytes = size - self._start
        content = parse_json(mapped[8 : self._start].tobytes(), path)
        self.metadata = _texts(content.pop("__metadata__", None), path)
        found = [_entry(k, v, data_bytes, path) for k, v in content.items()]
        found.sort(key=lambda item: (item[1], item[1] + item[0].nbytes))
        end = 0
        for info, offset in found:
            if offset != end:
                raise CheckpointError(
                    f"{path}: tensor {info.name[:120]!r} starts at byte {offset},"
                    f" expected {end}: overlapping tensors or a hole between them"
                )
            end = offset + info.nbytes
        if end != data_bytes:
            raise CheckpointError(
                f"{path}: the tensors end at byte {end} of {data_bytes}:"
                " the header does not describe the whole file"
            )
        self.tensors = {info.name: info for info, _ in found}
        self._offsets = {info.name: offset for info, offset in found}

    def map(self) -> np.ndarray:
        """The bytes of all tensors; the map takes a file descriptor."""
        # A plain array: views of np.memmap are slow to make.
        mapped = np.asarray(np.memmap(self._path, np.uint8, mode="r"))
        if len(mapped) != self._size:
            raise CheckpointError(
                f"{self._path}: has {len(mapped)} bytes now, {self._size} when it was"
                " opened: it was changed meanwhile"
            )
        return mapped[self._start :]

    def glance(self, name: str, start: int, stop: int) -> np.ndarray:
        """A copy of a few entries. A map would read megabytes around each."""
        dtype = self.tensors[name].dtype
        place = self._start + self._offsets[name] + start * dtype.itemsize
        with self._path.open("rb", buffering=0) as file:
            file.seek(place)
            data = file.read((stop - start) * dtype.itemsize)
        if len(data) != (stop - start) * dtype.itemsize:
            raise CheckpointError(f"{self._path}: ends before {name!r}: it was changed")
        return np.frombuffer(data, dtype)

    def view(self, data: np.ndarray, name: str, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of a tensor, where `data` is the map."""
        dtype = self.tensors[name].dtype
        begin = self._offsets[name]
        item = dtype.itemsize
        return data[begin + start * item : begin + stop * item].view(dtype)


class SafetensorsReader:
    """Lazy, memory-mapped tensors of a file or a Hugging Face directory."""

    format = "safetensors"

    def __init__(self, path: Path):
        self.path = path
        # Checkpoints of a thousand files would take a descriptor each.
        self._map = functools.lru_cache(MOST_MAPS)(_File.map)
        found, weight_map = _files(path)
        files = {p.name: _File(p) for p in found}
        self.metadata = next(iter(files.values())).metadata if files else {}
        self._home: dict[str, _File] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for filename, file in files.items():
            for name, info in file.tensors.items():
                if name in self._home:
                    raise CheckpointError(
                        f"{path}: tensor {name[:120]!r} is in two shards, the second is"
                        f" {filename}"
                    )
                self._home[name] = file
                self.tensors[name] = info
        lost = [n for n in weight_map if n not in self.tensors]
        unlisted = [n for n in self.tensors if weight_map and n not in weight_map]
        if lost or unlisted:
            raise CheckpointError(
                f"{path}: the index and the shards differ: only in the index"
                f" {brief(lost)}, only in shards {brief(unlisted)}; download it again"
            )
        self.aliases: dict[str, str] = {}
        if path.is_dir():
            self.aliases = self._tied()
        for alias in self.aliases:
            del self.tensors[alias]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop), read-only: a view of the file, unless few."""
        name = self.aliases.get(name, name)
        info, file = self.tensors[name], self._home[name]
        stop = info.size if stop is None else stop
        if 32 * (stop - start) * info.dtype.itemsize < min(32 * _GLANCE, info.nbytes):
            return file.glance(name, start, stop)
        return file.view(self._map(file), name, start, stop)

    def file_of(self, name: str) -> str:
        """Name of the file that a tensor lies in."""
        return self._home[self.aliases.get(name, name)].name

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor, one slice an axis: a view that touches nothing else."""
        name = self.aliases.get(name, name)
        return self.read(name).reshape(self.tensors[name].shape)[box]

    def close(self) -> None:
        """Drops the maps (the files close when no view is left)."""
        self._home = {}
        self._map.cache_clear()

    def _tied(self) -> dict[str, str]:
        """Embedding-like matrices that config.json ties and that are stored twice."""
        config = self.path / "config.json"
        if not config.exists():
            return {}
        settings = read_json(config)
        text = settings.get("text_config")
        tied = settings.get("tie_word_embeddings")
        if tied is None and isinstance(text, dict):
            tied = text.get("tie_word_embeddings")
        if tied is not True:
            return {}
        words = ("embed", "wte", "shared", "lm_head", "output", "decoder.weight")
        groups: dict[Any, list[str]] = {}
        for name, info in self.tensors.items():
            in_block = any(part.isdigit() for part in name.split("."))
            candidate = len(info.shape) == 2 and not in_block
            if candidate and any(word in name for word in words):
                groups.setdefault((info.shape, info.dtype), []).append(name)
        aliases: dict[str, str] = {}
        for names in groups.values():
            # The head is the alias: loaders rebuild it from the embedding.
            names = sorted(names, key=lambda n: ("head" in n or "output" in n, len(n)))
            for name in names[1:]:
                if same_bytes(self.read(names[0]), self.read(name)):
                    aliases[name] = names[0]
        return aliases


def same_bytes(a: np.ndarray, b: np.ndarray, chunk: int = 1 << 20) -> bool:
    """Whether two flat arrays are stored alike; NaN is itself."""
    a, b = a.view(np.uint8), b.view(np.uint8)
    return len(a) == len(b) and all(
        np.array_equal(a[i : i + chunk], b[i : i + chunk])
        for i in range(0, len(a), chunk)
    )


def _files(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The files of a checkpoint, and the weight map of its index if it has one.

    File names in an index are plain names of files in its directory. These may be links
    (as in the hub's cache), which are the owner's, while an index is a stranger's.
    """
    if not path.is_dir():
        return [path], {}
    indices = sorted(path.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(path.glob("*.safetensors"))
        if len(files) > 1 and (path / "model.safetensors") in files:
            return [path / "model.safetensors"], {}
        if len(files) > 1:
            raise CheckpointError(
                f"{path}: {len(files)} safetensors files ({files[0].name}, ...) but no"
                f" {INDEX_NAME}; name one of the files, or restore the index"
            )
        return files, {}
    index = indices[0] if len(indices) == 1 else path / INDEX_NAME
    if index not in indices:
        raise CheckpointError(f"{path}: several index files, none is {INDEX_NAME}")
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{index}: expected a non-empty weight_map")
    out = []
    if not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError(f"{index}: expected file names in the weight_map")
    for name in dict.fromkeys(weights.values()):
        if not _is_plain(name):
            raise CheckpointError(
                f"{index}: got the file name {name[:120]!r}, expected one in this"
                " directory"
            )
        if not (path / name).is_file():
            raise CheckpointError(f"{index}: the shard {name} is missing from {path}")
        out.append(path / name)
    return out, weights


def _is_plain(name: str) -> bool:
    """Whether a file name stays where it is, on any system."""
    parts = set(name) & set("/\\:")
    return not (
        name in ("", ".", "..") or parts or len(name) > 255 or name_problem(name)
    )


def open_reader(path: Path) -> SafetensorsReader:
    """Opens a file or directory; raises CheckpointError where it is damaged."""
    return SafetensorsReader(path)


def create_writer(
    staging: Path, tensors: Sequence[TensorInfo], **options: Any
) -> FormatWriter:
    """A writer into `staging`; options: `max_shard_size` (bytes), `metadata`, `stem`.

    The file is STEM.safetensors ("model" by default).
    """
    from multitask_jax.checkpoints.safetensors_writer import SafetensorsWriter

    return SafetensorsWriter(staging, tensors, **options)
