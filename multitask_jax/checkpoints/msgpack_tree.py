"""The tree of a flax msgpack file, walked without reading the arrays in it.

The format is flax's (`flax/serialization.py`): a msgpack tree whose arrays are
extension values (shape, dtype name, row-major bytes), and arrays above 2**30 bytes
are dictionaries of flat chunks. The `msgpack` package decodes whole files only.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from multitask_jax.checkpoints.json_file import check_regular
from multitask_jax.checkpoints.types import (
    MAX_NAME,
    MAX_TENSORS,
    CheckpointError,
    TensorInfo,
    brief,
    name_problem,
    shape_problem,
)

MAX_DEPTH = 100
NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # flax's extension types
CHUNKED = "__msgpack_chunked_array__"
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


class StoredArray(NamedTuple):
    """Where an array lies: one (byte offset, entries) a chunk, in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[int, int], ...]


class MappedFile:
    """Walks a mapped msgpack file; every position is checked against its end."""

    def __init__(self, path: Path):
        self.path = path
        self._values = 0  # seen so far
        if not check_regular(path):
            raise CheckpointError(f"{path}: the file is empty")
        self.data = np.memmap(path, np.uint8, mode="r")

    def error(self, message: str) -> CheckpointError:
        """What to raise, with the file's path."""
        return CheckpointError(f"{self.path}: {message}")

    def take(self, pos: int, n: int) -> bytes:
        """A copy of `n` bytes; CheckpointError if the file ends before."""
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
        if n > 4 * MAX_NAME:
            raise self.error(f"byte {pos} starts a name of {n} bytes: damaged")
        text = self.take(pos, start - pos + n)
        try:
            return msgpack.unpackb(text), start + n
        except ValueError as e:
            raise self.error(f"the value at byte {pos} is damaged: {e}") from None

    def array(self, pos: int, end: int, name: str) -> StoredArray:
        """The (shape, dtype name, bytes) triple of an extension value."""
        kind, n, at = self.head(pos)
        inner, rank, at = self.head(at)
        if (kind, n, inner) != ("array", 3, "array"):
            raise self.error(f"{name}: expected an array of shape, dtype and bytes")
        shape: list[Any] = []
        if rank > 64:
            raise self.error(f"{name}: got {rank} axes, expected 64 at most")
        for _ in range(rank):
            n, at = self.small(at)
            shape.append(n)
        if problem := shape_problem(shape):
            raise self.error(f"{name}: got shape {brief(shape)}, {problem}")
        kind, n, at = self.head(at)
        text = self.take(at, min(n, 80)) if kind in ("str", "bin") else b"?"
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
        return StoredArray(info.shape, dtype, ((at, info.size),))

    def extension(self, start: int, n: int, name: str) -> "StoredArray | np.ndarray":
        """The value of an extension whose type byte is at `start`."""
        code = self.take(start, 1)[0]
        if code in (NDARRAY, SCALAR):
            return self.array(start + 1, start + 1 + n, name)
        if code == COMPLEX:
            text = self.take(start + 1, n)
            if n == 19 and text[:2] + text[10:11] == b"\x92\xcb\xcb":
                return np.array(complex(*struct.unpack(">2xdxd", text)))
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
        if problem := name_problem(name):
            raise self.error(f"{name[:80]!r}: {problem}")
        self._values += 1
        if self._values > MAX_TENSORS:
            raise self.error(f"more than {MAX_TENSORS:,} values: no parameters")
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
                raise self.error(f"{name}: got the key {brief(key)}, expected a string")
            if str(key) in out:
                raise self.error(f"{name}: the key {str(key)[:80]!r} occurs twice")
            inner = f"{name}/{key}" if name else str(key)
            out[str(key)], at = self.tree(at, inner, depth + 1)
        return (self.chunked(out, name) if CHUNKED in out else out), at

    def chunked(self, fields: dict[str, Any], name: str) -> StoredArray:
        """The array of a dictionary of flat chunks."""
        shape, chunks = fields.get("shape"), fields.get("chunks")
        if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
            raise self.error(f"{name}: a chunked array without shape or chunks")
        parts = [chunks.get(str(i)) for i in range(len(chunks))]
        sizes = [shape.get(str(i)) for i in range(len(shape))]
        dtypes = {p.dtype if isinstance(p, StoredArray) else None for p in parts}
        sound = len(dtypes) == 1 and None not in dtypes and all(map(_is_size, sizes))
        whole = [int(n) for n in sizes] if sound else []
        if not sound or shape_problem(whole):
            raise self.error(f"{name}: a chunked array with damaged shape or chunks")
        out = StoredArray(
            tuple(whole),
            parts[0].dtype,
            tuple(part for p in parts for part in p.parts),
        )
        held = sum(n for _, n in out.parts)
        if held != TensorInfo(name, *out[:2]).size:
            raise self.error(f"{name}: chunks of {held} entries for {out.shape}")
        return out

    def number(self, value: Any, name: str) -> np.ndarray:
        """A plain value as a 0-d array."""
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


def flatten(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries, with the keys above them joined by "/"."""
    if not isinstance(tree, dict):
        yield name, tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{name}/{key}" if name else key)
