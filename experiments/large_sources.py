"""Checkpoints that are large without being stored, and a sink that stores nothing.

`make_sparse` writes a file of holes, which read as zeros. `LazyModel` makes up dense
values as they are read: those of a slice follow from the seed and the place alone, so
that every pass over the model sees the same. `ChecksumSink` takes a merge of any size.
"""

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from experiments import benchmark_merge
from multitask_jax import checkpoints
from multitask_jax.checkpoints import TensorInfo
from multitask_jax.checkpoints.safetensors_file import NAMES
from multitask_jax.checkpoints.writing import Due

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Philox makes 4 x 64 bits at a time: 16 values of 16 bits.
_VALUES = 16


def llama(parameters: float, width: int) -> list[TensorInfo]:
    """A Llama layout in bfloat16, of as many blocks as make up the parameters."""
    vocabulary = 8 * width
    of_a_block = 12.25 * width**2
    layers = max(1, round((parameters - 2 * vocabulary * width) / of_a_block))
    return benchmark_merge.llama_layout(
        benchmark_merge.Config(layers=layers, width=width, vocabulary=vocabulary)
    )


def experts(count: int, *, a_layer: int = 128) -> list[TensorInfo]:
    """`count` small matrices with the names of a mixture of experts."""
    out: list[TensorInfo] = []
    for i in range(count):
        layer, rest = divmod(i, 3 * a_layer)
        expert, which = divmod(rest, 3)
        name = f"experts.{expert}.{('gate', 'up', 'down')[which]}_proj"
        path = f"model.layers.{layer}.mlp.{name}.weight"
        out.append(TensorInfo(path, (64, 16), BFLOAT16))
    return out


def make_sparse(path: Path, layout: Sequence[TensorInfo]) -> Path:
    """A safetensors file of zeros: a header, and a hole for all tensors."""
    header, offset = {}, 0
    for t in layout:
        offsets = [offset, offset := offset + t.nbytes]
        dtype = NAMES[np.dtype(t.dtype)]
        header[t.name] = {"dtype": dtype, "shape": t.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + offset)
    return path


class LazyModel:
    """A checkpoint to read whose values are made on the way; a `Reader`.

    The base is uniform in +-.035. A fine-tune adds the cube of a uniform variable, up
    to 4e-3: most changes are small, as those of real ones.
    """

    format = "lazy"

    def __init__(
        self,
        path: Path,
        layout: Sequence[TensorInfo],
        base: Callable[[int, int], np.ndarray],
        seed: int = 0,
    ):
        """`seed`: of the fine-tune; 0 is the base."""
        self.path = path
        self.tensors = {t.name: t for t in layout}
        self.aliases: dict[str, str] = {}
        self._base, self._seed = base, seed
        # Where a tensor starts in the stream of random bits.
        sizes = [-(-t.size // _VALUES) * _VALUES for t in layout]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        self._starts = dict(zip(self.tensors, starts, strict=True))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Flat entries [start, stop) of a tensor."""
        stop = self.tensors[name].size if stop is None else stop
        first = self._starts[name] + start
        theta = self._base(first, first + stop - start)
        if not self._seed:
            return theta
        tau = uniform(self._seed, first, first + stop - start)
        tau *= tau * tau
        tau *= np.float32(4e-3)
        tau += theta
        return tau.astype(BFLOAT16)

    def close(self) -> None:
        """There is nothing to close."""


def uniform(seed: int, start: int, stop: int) -> np.ndarray:
    """Values [start, stop) of an endless stream, uniform in [-1, 1), float32."""
    before = start // _VALUES
    generator = np.random.Philox(key=seed)
    generator.advance(before)
    words = 4 * (-(-stop // _VALUES) - before)
    values = generator.random_raw(words).view(np.int16)
    skip = start - before * _VALUES
    return values[skip : skip + stop - start] * np.float32(2**-15)


def lazy_models(layout: Sequence[TensorInfo], count: int) -> list[LazyModel]:
    """A base and `count` fine-tunes of it."""

    # A merge reads the same slice of all models before it goes on.
    @functools.lru_cache(16)
    def base(start: int, stop: int) -> np.ndarray:
        theta = (uniform(0, start, stop) * np.float32(0.035)).astype(BFLOAT16)
        theta.setflags(write=False)
        return theta

    names = ["base", *(f"model-{k}" for k in range(1, count + 1))]
    return [LazyModel(Path(name), layout, base, k) for k, name in enumerate(names)]


def save(model: LazyModel, path: Path) -> Path:
    """Writes a lazy model to disk, unless it is there."""
    if not path.exists():
        with checkpoints.create(path, list(model.tensors.values())) as writer:
            for t in model.tensors.values():
                for start in range(0, t.size, 1 << 20):
                    flat = model.read(t.name, start, min(start + (1 << 20), t.size))
                    writer.write(t.name, start, flat)
    return path


class ChecksumSink:
    """Takes tensors and keeps one sum over all; a `FormatWriter`.

    The sum is of 64-bit digests of the pieces with their places, so the order in which
    threads write does not matter, but how tensors are cut does.
    """

    def __init__(self, tensors: Sequence[TensorInfo]):
        self._due = Due(tensors)
        self._sum = 0
        self._lock = threading.Lock()

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Adds flat entries [start, start + len(flat)); thread-safe."""
        flat = self._due.check(name, start, flat)
        digest = hashlib.blake2b(f"{name}\0{start}\0".encode(), digest_size=8)
        digest.update(flat.view(np.uint8))
        with self._lock:
            self._sum += int.from_bytes(digest.digest(), "little")
        self._due.written(name, flat.size)

    def finish(self) -> None:
        """A tensor not fully written is an error."""
        self._due.finish()

    @property
    def checksum(self) -> str:
        """The sum modulo 2^64, in hexadecimal."""
        return f"{self._sum % (1 << 64):016x}"
