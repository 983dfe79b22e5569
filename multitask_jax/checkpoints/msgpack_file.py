"""flax msgpack files, memory-mapped in and written in place; flax is not imported.

The format is flax's (`flax/serialization.py`): a msgpack tree whose arrays are
extension values (shape, dtype name, row-major bytes), and arrays above 2**30 bytes
are dictionaries of flat chunks. The `msgpack` package decodes whole files only, so
the tree is walked here and arrays stay where they are in the file.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from multitask_jax.checkpoints.types import CheckpointError, TensorInfo

FILE_NAME = "flax_model.msgpack"
# flax's limit: msgpack itself holds at most 2**32 - 1 bytes in one value.
MAX_CHUNK_BYTES = 2**30
MAX_DEPTH = 100
NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # flax's extension types
_CHUNKED = "__msgpack_chunked_array__"
# One byte of type, then the length in this many bytes.
_LENGTHS = {
    **{0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4)},
    **{0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4)},
    **{0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4)},
    **{0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)},
}
_FIXED = {0xCA: 4, 0xCB: 8, **{0xCC + i: 1 << i % 4 for i in range(8)}}
DTYPES: dict[str, np.dtype] = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        [
            *(np.bool_, np.int8, np.int16, np.int32, np.int64),
            *(np.uint8, np.uint16, np.uint32, np.uint64),
            *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
            *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
        ],
    )
}


class _Array(NamedTuple):
    """Where an array lies: one (byte offset, entries) a chunk, in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[int, int], ...]


class _File:
    """Walks a mapped msgpack file; every position is checked against its end."""

    def __init__(self, path: Path):
        self.path = path
        if not path.stat().st_size:
            raise CheckpointError(f"{path}: the file is empty")
        self.data = np.memmap(path, np.uint8, mode="r")

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def take(self, pos: int, n: int) -> bytes:
        if pos + n > len(self.data):
            raise self.error(
                f"a value of {n} bytes starts at byte {pos}, but the file ends at"
                f" {len(self.data)}: truncated or damaged; download or save it again"
            )
        return self.data[pos : pos + n].tobytes()

    def head(self, pos: int) -> tuple[str, int, int]:
        """(kind, length, where the content starts) of the value at `pos`.

        The length counts bytes, or items of an array or map; of "small" values
        (numbers, booleans, nil) the content is the whole value.
        """
        first = self.take(pos, 1)[0]
        if first in _LENGTHS:
            kind, width = _LENGTHS[first]
            n = int.from_bytes(self.take(pos + 1, width), "big")
            pos += 1 + width
        elif first <= 0x7F or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):
            return "small", 1, pos
        elif first <= 0x8F:
            kind, n, pos = "map", first & 0x0F, pos + 1
        elif first <= 0x9F:
            kind, n, pos = "array", first & 0x0F, pos + 1
        elif first <= 0xBF:
            kind, n, pos = "str", first & 0x1F, pos + 1
        elif first in _FIXED:
            kind, n = "small", 1 + _FIXED[first]
        elif 0xD4 <= first <= 0xD8:
            kind, n, pos = "ext", 1 << (first - 0xD4), pos + 1
        else:
            raise self.error(f"byte {pos} is {first:#x}, which is not msgpack")
        # The type of an extension stands before its content and is not counted.
        size = n + (kind == "ext")
        # An item takes a byte at least, so a damaged count fails before a long loop.
        if pos + size > len(self.data):
            self.take(pos, size)
        return kind, n, pos

    def small(self, pos: int) -> tuple[Any, int]:
        """A number, boolean, nil or string, and the position after it."""
        kind, n, start = self.head(pos)
        if kind not in ("small", "str"):
            raise self.error(f"byte {pos} starts a {kind}, expected a plain value")
        text = self.take(pos, start - pos + n)
        try:
            return msgpack.unpackb(text), start + n
        except ValueError as e:
            raise self.error(f"the value at byte {pos} is damaged: {e}") from None

    def array(self, pos: int, end: int, name: str) -> _Array:
        """The (shape, dtype name, bytes) triple of an extension value."""
        kind, n, at = self.head(pos)
        if (kind, n) != ("array", 3):
            raise self.error(f"{name}: expected an array of shape, dtype and bytes")
        kind, rank, at = self.head(at)
        if kind != "array":
            raise self.error(f"{name}: expected a shape, got a {kind}")
        shape = []
        for _ in range(rank):
            n, at = self.small(at)
            shape.append(n)
        if not all(type(n) is int and n >= 0 for n in shape):
            raise self.error(f"{name}: got shape {shape}, expected natural numbers")
        kind, n, at = self.head(at)
        text = self.take(at, n) if kind in ("str", "bin") else b"?"
        dtype = DTYPES.get(text.decode("utf-8", "replace"))
        if dtype is None:
            raise self.error(
                f"{name}: got dtype {text[:40]!r}, expected one of {', '.join(DTYPES)}"
            )
        kind, n, at = self.head(at + n)
        info = TensorInfo(name, tuple(shape), dtype)
        if kind not in ("bin", "str") or n != info.nbytes or at + n != end:
            raise self.error(
                f"{name}: {dtype} {shape} takes {info.nbytes} bytes, the file holds"
                f" {n}: damaged"
            )
        return _Array(info.shape, dtype, ((at, info.size),))

    def extension(self, start: int, n: int, name: str) -> "_Array | np.ndarray":
        """The value of an extension whose type byte is at `start`."""
        code = self.take(start, 1)[0]
        if code in (NDARRAY, SCALAR):
            return self.array(start + 1, start + 1 + n, name)
        if code == COMPLEX:
            kind, items, at = self.head(start + 1)
            if (kind, items) == ("array", 2):
                real, at = self.small(at)
                imaginary, at = self.small(at)
                if type(real) is type(imaginary) is float and at == start + 1 + n:
                    return np.array(complex(real, imaginary))
            raise self.error(f"{name}: damaged complex number")
        raise self.error(
            f"{name}: got the extension type {code}, expected flax's ndarray (1),"
            " complex (2) or scalar (3)"
        )

    def tree(self, pos: int, name: str = "", depth: int = 0) -> tuple[Any, int]:
        """Dicts of arrays at `pos` (lists become dicts), and where they end."""
        kind, n, at = self.head(pos)
        if depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} levels at {name[:80]!r}")
        if kind == "ext":
            return self.extension(at, n, name), at + 1 + n
        if kind not in ("map", "array"):
            if kind != "small":
                raise self.error(f"{name}: got a {kind}, expected arrays and numbers")
            value, at = self.small(pos)
            return self.number(value, name), at
        out: dict[str, Any] = {}
        for i in range(n):
            key: Any = i
            if kind == "map":
                key, at = self.small(at)
            if type(key) not in (str, int):
                raise self.error(f"{name}: got the key {key!r}, expected a string")
            if str(key) in out:
                raise self.error(f"{name}: the key {str(key)[:80]!r} occurs twice")
            inner = f"{name}/{key}" if name else str(key)
            out[str(key)], at = self.tree(at, inner, depth + 1)
        return (self.chunked(out, name) if _CHUNKED in out else out), at

    def chunked(self, fields: dict[str, Any], name: str) -> _Array:
        """The array of a dictionary of flat chunks."""
        shape, chunks = fields.get("shape"), fields.get("chunks")
        if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
            raise self.error(f"{name}: a chunked array without shape or chunks")
        parts = [chunks.get(str(i)) for i in range(len(chunks))]
        sizes = [shape.get(str(i)) for i in range(len(shape))]
        dtypes = {p.dtype if isinstance(p, _Array) else None for p in parts}
        if len(dtypes) > 1 or None in dtypes or not all(map(_is_size, sizes)):
            raise self.error(f"{name}: a chunked array with damaged shape or chunks")
        out = _Array(
            tuple(int(n) for n in sizes),
            parts[0].dtype,
            tuple(part for p in parts for part in p.parts),
        )
        held = sum(n for _, n in out.parts)
        if held != TensorInfo(name, *out[:2]).size:
            raise self.error(f"{name}: chunks of {held} entries for {out.shape}")
        return out

    def number(self, value: Any, name: str) -> np.ndarray:
        if value is None:
            raise self.error(
                f"{name}: got None, expected an array or a number; save the tree"
                " without it"
            )
        dtype = {bool: np.bool_, int: np.int64, float: np.float64}[type(value)]
        if type(value) is int and value >= 2**63:
            dtype = np.uint64
        return np.array(value, dtype)


def _is_size(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "iu" and int(x) >= 0


def _flatten(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield name, tree
        return
    for key, value in tree.items():
        yield from _flatten(value, f"{name}/{key}" if name else key)


class MsgpackReader:
    """Lazy, memory-mapped arrays of a flax msgpack file, named by path."""

    format = "msgpack"

    def __init__(self, path: Path):
        self.path = path
        self.aliases: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._file: _File | None = _File(_find(path))
        tree, end = self._file.tree(0)
        if not isinstance(tree, dict):
            raise self._file.error("expected a dictionary of arrays at the top")
        if end != len(self._file.data):
            raise self._file.error(
                f"the tree ends at byte {end} of {len(self._file.data)}: damaged"
            )
        self._leaves: dict[str, Any] = {}
        for name, leaf in _flatten(tree):
            if name in self._leaves:
                raise self._file.error(f"two arrays are called {name!r}")
            self._leaves[name] = leaf
            self.tensors[name] = TensorInfo(name, leaf.shape, leaf.dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop), a view of the file unless chunks meet in it."""
        leaf, info = self._leaves[name], self.tensors[name]
        stop = info.size if stop is None else stop
        if isinstance(leaf, np.ndarray):
            return leaf.reshape(-1)[start:stop]
        found = []
        for offset, size in leaf.parts:
            a, b = max(start, 0), min(stop, size)
            if a < b:
                item = info.dtype.itemsize
                view = self._file.data[offset + a * item : offset + b * item]
                found.append(view.view(info.dtype))
            start, stop = start - size, stop - size
        if not found:
            return np.empty(0, info.dtype)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def close(self) -> None:
        """Drops the map (the file closes when no view is left)."""
        self._file = None


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.msgpack"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files[:4]) or "none"
        raise CheckpointError(
            f"{path}: expected one *.msgpack file, got {len(files)} ({names}); name"
            " the file to open; shards with an index have to be joined first"
        )
    return files[0]


def open_reader(path: Path) -> MsgpackReader:
    """Opens a file, or a directory with one; CheckpointError where it is damaged."""
    return MsgpackReader(path)


def nest(tensors: Sequence[TensorInfo]) -> dict[str, Any]:
    """Nested dictionaries of tensors, from names with "/" between the keys.

    Raises:
      CheckpointError: empty keys, a name twice, or a name inside another.
    """
    tree: dict[str, Any] = {}
    for info in tensors:
        *parents, last = info.name.split("/")
        if not all((*parents, last)):
            raise CheckpointError(
                f"got the name {info.name!r}, expected non-empty keys between '/'"
            )
        here: Any = tree
        for key in parents:
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                break
        if not isinstance(here, dict) or last in here:
            raise CheckpointError(
                f"the name {info.name!r} occurs twice, or one of it and another name"
                " is a prefix of the other: they fit in no tree; rename one"
            )
        here[last] = info
    return tree


class MsgpackWriter:
    """One file of known layout, written in place and in any order."""

    def __init__(self, staging: Path, tensors: Sequence[TensorInfo], chunk_bytes: int):
        self._path = staging / FILE_NAME
        self._chunk_bytes = chunk_bytes
        self._parts: dict[str, list[tuple[int, int, int]]] = {}
        self._left = {t.name: t.size for t in tensors}
        self._dtypes = {t.name: np.dtype(t.dtype) for t in tensors}
        self._lock = threading.Lock()
        self._end = 0
        for t in tensors:
            name = np.dtype(t.dtype).name
            if name not in DTYPES:
                raise CheckpointError(
                    f"{t.name}: got dtype {name}, expected one of {', '.join(DTYPES)}"
                )
        tree = nest(tensors)
        self._pieces: list[tuple[int, bytes]] = []
        self._lay(tree)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            # Reserve the space now: a full disk is an error before work, not after.
            os.posix_fallocate(self._fd, 0, self._end)
            for offset, text in self._pieces:
                self._write_all(text, offset)
        except BaseException:
            self.close()
            raise

    def _emit(self, text: bytes) -> None:
        self._pieces.append((self._end, text))
        self._end += len(text)

    def _lay(self, tree: Mapping[str, Any]) -> None:
        """Fixes where everything goes, depth first."""
        packer = msgpack.Packer()
        self._emit(packer.pack_map_header(len(tree)))
        for key, value in tree.items():
            self._emit(packer.pack(key))
            if isinstance(value, dict):
                self._lay(value)
            elif value.nbytes <= self._chunk_bytes:
                self._lay_array(value, 0, value.size, value.shape)
            else:
                self._lay_chunks(value, packer)

    def _lay_chunks(self, info: TensorInfo, packer: msgpack.Packer) -> None:
        step = max(1, self._chunk_bytes // np.dtype(info.dtype).itemsize)
        starts = range(0, info.size, step)
        self._emit(packer.pack_map_header(3))
        self._emit(packer.pack(_CHUNKED) + packer.pack(True) + packer.pack("shape"))
        self._emit(packer.pack({str(i): n for i, n in enumerate(info.shape)}))
        self._emit(packer.pack("chunks") + packer.pack_map_header(len(starts)))
        for i, start in enumerate(starts):
            stop = min(start + step, info.size)
            self._emit(packer.pack(str(i)))
            self._lay_array(info, start, stop, (stop - start,))

    def _lay_array(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> None:
        """The extension value around entries [start, stop), which come later."""
        dtype = np.dtype(info.dtype)
        n = (stop - start) * dtype.itemsize
        triple = b"\x93" + msgpack.packb(shape) + msgpack.packb(dtype.name)
        triple += _head(n, {1: 0xC4, 2: 0xC5, 4: 0xC6})
        size = len(triple) + n
        if size in (1, 2, 4, 8, 16):
            head = bytes([0xD4 + size.bit_length() - 1])
        else:
            head = _head(size, {1: 0xC7, 2: 0xC8, 4: 0xC9})
        self._emit(head + bytes([NDARRAY]) + triple)
        self._parts.setdefault(info.name, []).append((start, stop, self._end))
        self._end += n

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)) of a tensor."""
        dtype, parts = self._dtypes[name], self._parts[name]
        if flat.dtype != dtype or start + flat.size > parts[-1][1]:
            raise ValueError(
                f"{name}: got {flat.size} {flat.dtype} entries at {start}, expected"
                f" {dtype} within {parts[-1][1]}"
            )
        flat = np.ascontiguousarray(flat).reshape(-1)
        for a, b, offset in parts:
            low, high = max(a, start), min(b, start + flat.size)
            if low < high:
                piece = flat[low - start : high - start].view(np.uint8)
                self._write_all(piece, offset + (low - a) * dtype.itemsize)
        with self._lock:
            self._left[name] -= flat.size

    def _write_all(self, data: bytes | np.ndarray, offset: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self._fd, view, offset)
            view, offset = view[n:], offset + n

    def finish(self) -> None:
        """Closes the file; a tensor not fully written is an error."""
        missing = [name for name, left in self._left.items() if left]
        self.close()
        if missing:
            raise CheckpointError(f"not fully written: {missing[:5]}")

    def close(self) -> None:
        """Closes the file as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _head(n: int, codes: Mapping[int, int]) -> bytes:
    """The shortest of the length prefixes `codes` (bytes of length -> type)."""
    width = next(w for w in codes if n < 1 << 8 * w)
    return bytes([codes[width]]) + n.to_bytes(width, "big")


def create_writer(
    staging: Path,
    tensors: Sequence[TensorInfo],
    *,
    chunk_bytes: int = MAX_CHUNK_BYTES,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> MsgpackWriter:
    """A writer of `flax_model.msgpack`, for `flax.serialization.msgpack_restore`.

    Args:
      staging: an existing directory.
      tensors: names ("/" nests dictionaries), shapes and dtypes, in file order.
      chunk_bytes: larger arrays are stored as chunks, as flax does.
      max_shard_size: not of this format.
      metadata: not stored: the format has no place for it.

    Raises:
      ValueError: `max_shard_size` is given.
      CheckpointError: a dtype that flax cannot read, or names that form no tree.
    """
    del metadata
    if max_shard_size is not None:
        raise ValueError(
            f"got max_shard_size {max_shard_size}, but a msgpack checkpoint is one"
            " file; drop it, or write safetensors"
        )
    return MsgpackWriter(staging, tensors, chunk_bytes)
