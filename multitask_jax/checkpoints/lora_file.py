"""PEFT's LoRA directories as models: theta_0 + s B A, formed a range at a time.

A target W [out, in] has lora_A [r, in] and lora_B [out, r] (Hu et al. 2022, arXiv
2106.09685): dW = s B A with s = alpha / r, or alpha / sqrt(r) if use_rslora
(Kalajdzievski 2023, arXiv 2312.03732). Where layers store W^T (fan_in_fan_out: GPT-2's
Conv1D; embeddings) dW^T is added; a convolution's kernel [out, in, ...] is the matrix
[out, in * ...]. Biases and modules_to_save are stored whole and take the base's place.
Of a tied matrix both uses change, as in PEFT's merge_and_unload.
"""

import bisect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitask_jax.checkpoints import safetensors_file
from multitask_jax.checkpoints.changed import Change, ChangedReader, sum_dtype
from multitask_jax.checkpoints.lora_config import (
    CONFIG,
    Config,
    check_cost,
    read_config,
)
from multitask_jax.checkpoints.types import CheckpointError, Reader, TensorInfo

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Multiplications that OpenBLAS does in the calling thread. Larger products wait for its
# own threads, on cores that the threads of a merge keep busy: 20 times slower.
_SMALL = 1 << 18
# module.(part), `default` being the adapter's name in some training checkpoints.
_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B))"
    r"(?:\.default)?(?P<bias>\.bias)?(?:\.weight)?"
)


def is_format(path: Path) -> bool:
    """Whether `path` is an adapter's directory, or the weights in one."""
    if not path.is_dir():
        return path.name == WEIGHTS and (path.parent / CONFIG).is_file()
    files = (WEIGHTS, "adapter_model.bin")
    return (path / CONFIG).is_file() and any((path / f).is_file() for f in files)


class LowRank(NamedTuple):
    """s L R as a [rows, columns] matrix, of which ranges of entries are formed."""

    left: np.ndarray  # [rows, r], as stored
    right: np.ndarray  # [r, columns]
    scaling: float

    def read(self, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        """Flat entries [start, stop)."""
        columns = self.right.shape[1]
        if start >= stop:  # of a matrix without columns, perhaps
            return np.empty(0, dtype)
        first, last = start // columns, -(-stop // columns)
        offset = start - first * columns
        right = self.right
        if last - first == 1:  # within one row
            right, offset = right[:, offset : offset + stop - start], 0
        left, right = self.left[first:last].astype(dtype), right.astype(dtype)
        out = np.empty((last - first, right.shape[1]), dtype)
        step = max(1, _SMALL // max(1, left.size))
        for i in range(0, right.shape[1], step):
            np.matmul(left, right[:, i : i + step], out=out[:, i : i + step])
        out *= self.scaling
        return out.reshape(-1)[offset : offset + stop - start]


def open_reader(path: Path, base: Reader) -> ChangedReader:
    """The adapter at `path` on its base; nothing is read but headers.

    Returns:
      A reader of the base's names and shapes. Changed tensors are float32 (float64 of
      a float64 base), formed for the range asked for; the rest are the base's bytes.

    Raises:
      CheckpointError: a pickle, an unsupported variant, or tensors of the adapter that
        fit no tensor of the base; lists them.
    """
    home = path if path.is_dir() else path.parent
    if not (home / WEIGHTS).is_file():
        raise CheckpointError(
            f"{home}: adapter_model.bin is a pickle, which can run code when loaded, so"
            " it is never opened; convert it once where you trust it:"
            " `PeftModel.from_pretrained(model, DIR).save_pretrained(OUT)`"
        )
    if path.is_dir() and any(home.glob("model*.safetensors")):
        raise CheckpointError(
            f"{home}: holds a model and an adapter; name the file that is meant, or"
            " move one of them away"
        )
    config = read_config(home / CONFIG)
    file = safetensors_file.open_reader(home / WEIGHTS)
    return ChangedReader(path, "lora", base, _changes(home, config, file, base))


def _changes(
    home: Path, config: Config, file: Reader, base: Reader
) -> dict[str, Change]:
    """What the adapter does to each tensor of the base."""
    pairs: dict[str, dict[str, str]] = {}  # module -> part -> key
    wholes: dict[str, str] = {}  # parameter -> key
    lines: list[str] = []
    for key in file.tensors:
        name = key.removeprefix(_PREFIX)
        m = _KEY.fullmatch(name)
        if m is not None:
            part = m["part"] + (m["bias"] or "")
            pairs.setdefault(m["module"], {})[part] = key
        elif "lora_" in name:
            lines.append(f"  {key}: not a matrix of LoRA (DoRA, or another variant?)")
        else:
            wholes[name.replace(".base_layer.", ".")] = key
    check_cost(home / CONFIG, config, pairs)
    ends = {end for p in pairs for end in (p, *_suffixes(p))} | {"all-linear"}
    lines += [
        f"  target_modules: {target[:80]!r} has no matrices in {WEIGHTS}"
        for target in config.targets
        if target not in ends
    ]
    find = _Finder(base)
    stored: dict[str, str] = {}
    for parameter, key in wholes.items():
        name, problem = find(parameter, file.tensors[key].shape)
        first = stored.setdefault(name, key)
        same = first == key or safetensors_file.same_bytes(
            *map(file.read, (first, key))
        )
        if not problem and not same:
            problem = f"is tied to {first} in the base, but differs from it"
        lines += [f"  {key}: {problem}"] if problem else []
    products: dict[str, list[LowRank]] = {}
    flagged: list[tuple[str, bool | None]] = []
    for module, parts in pairs.items():
        found = _low_rank(module, parts, file, config, find)
        if isinstance(found, str):
            lines.append(f"  {module}: {found}")
            continue
        for name, product, transposed in found:
            products.setdefault(name, []).append(product)
            flagged.append((name, transposed))
    # PEFT's flag is that of the last layer made; shapes tell except for squares.
    square = [name for name, transposed in flagged if transposed is None]
    other = [name for name, t in flagged if t is not None and t != config.transposed]
    if square and other:
        lines.append(
            f"  fan_in_fan_out = {config.transposed}, but shapes say the opposite of"
            f" {other[0]}: can't tell which way {square[0]} is stored"
        )
    if lines or not (stored or products):
        raise CheckpointError(
            f"{home}: the adapter does not fit the base {base.path}:\n"
            + "\n".join(lines[:20] or ["  it has no tensors"])
            + (f"\n  and {len(lines) - 20} more" if len(lines) > 20 else "")
            + "\nPass the base that it was trained on"
        )
    return {
        name: _change(
            base.tensors[name], file, stored.get(name), products.get(name, ())
        )
        for name in dict.fromkeys([*stored, *products])
    }


class _Finder:
    """Finds a parameter among the base's tensors; a prefix may be more or less."""

    def __init__(self, base: Reader):
        self.tensors = base.tensors
        self._names = {n: n for n in base.tensors} | dict(base.aliases)
        # Names of one ending are neighbours when sorted from their ends.
        self._reversed = sorted(name[::-1] for name in self._names)

    def __call__(
        self, parameter: str, shape: tuple[int, ...] | None = None
    ) -> tuple[str, str]:
        """The stored name, and what is wrong ("" if nothing is)."""
        found = [parameter] if parameter in self._names else []
        if not found:
            shorter = [s for s in _suffixes(parameter) if s in self._names]
            found = shorter + self._longer(parameter)
        stored = list(dict.fromkeys(self._names[n] for n in found))
        if len(stored) != 1:
            several = f"fits several tensors: {', '.join(stored[:4])}"
            return "", several if stored else f"no tensor {parameter} in the base"
        info = self.tensors[stored[0]]
        if shape is not None and info.shape != shape:
            return info.name, f"shape {shape}, the base's {info.name} has {info.shape}"
        return info.name, ""

    def _longer(self, ending: str) -> list[str]:
        """Some names that end with a dot and `ending`."""
        wanted = f".{ending}"[::-1]
        i = bisect.bisect_left(self._reversed, wanted)
        some = self._reversed[i : i + 8]
        return [name[::-1] for name in some if name.startswith(wanted)]


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _low_rank(
    module: str, parts: Mapping[str, str], file: Reader, config: Config, find: _Finder
) -> list[tuple[str, LowRank, bool | None]] | str:
    """(tensor, product, whether stored transposed) of a module, or what is wrong."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    kind = "lora_embedding_" if embedding else "lora_"
    if (
        not {f"{kind}A", f"{kind}B"}
        <= set(parts)
        <= {
            f"{kind}A",
            f"{kind}B",
            "lora_B.bias",
        }
    ):
        return f"expected {kind}A and {kind}B, got {', '.join(sorted(parts))}"
    for key in parts.values():
        if (dtype := file.tensors[key].dtype) not in safetensors_file.FLOATS:
            return f"{key} is {dtype} (quantised?); pass it in floats"
    a, b = (
        file.read(parts[kind + x]).reshape(file.tensors[parts[kind + x]].shape)
        for x in "AB"
    )
    if a.ndim < 2 or b.ndim < 2 or b.size != b.shape[0] * a.shape[0]:
        return f"shapes {a.shape} and {b.shape} are not [r, in] and [out, r]"
    rank, stated = a.shape[0], config.rank_of(module)
    if rank != stated:
        return f"rank {rank}, but {CONFIG} says {stated}: alpha / r is unclear"
    name, problem = find(f"{module}.weight")
    if problem:
        return problem
    info = find.tensors[name]
    if info.dtype not in safetensors_file.FLOATS:
        return f"{name} is {info.dtype} in the base (quantised?); pass it in floats"
    straight = (b.shape[0], *a.shape[1:])
    shapes = {False: straight, True: straight[::-1] if a.ndim == 2 else None}
    fits = [t for t, shape in shapes.items() if shape == info.shape]
    if embedding:
        fits = [t for t in fits if t]
    if not fits:
        return f"B A has shape {straight}, the base's {name} {info.shape}"
    transposed = fits[0] if len(fits) == 1 else config.transposed
    left, right = b.reshape(-1, rank), a.reshape(rank, -1)
    if transposed:
        left, right = right.T, left.T
    scaling = config.scaling(module)
    certain = embedding or a.ndim > 2
    flag = config.transposed if certain else fits[0] if len(fits) == 1 else None
    out = [(name, LowRank(left, right, scaling), flag)]
    if "lora_B.bias" in parts:  # lora_bias: s b is added to the bias
        vector = file.read(parts["lora_B.bias"])
        bias, problem = find(f"{module}.bias", vector.shape)
        if problem:
            return problem
        one = np.ones((1, 1), np.float32)
        product = LowRank(vector[:, None], one, scaling)
        out.append((bias, product, config.transposed))
    return out


def _change(
    info: TensorInfo, file: Reader, key: str | None, products: Sequence[LowRank]
) -> Change:
    """The stored tensor or the base's, plus all products."""
    if key is not None and not products:
        stored = file.tensors[key].dtype
        return Change(stored, lambda theta, i, j: file.read(key, i, j), whole=True)
    dtype = sum_dtype(info.dtype)

    def apply(theta: np.ndarray | None, start: int, stop: int) -> np.ndarray:
        if key is not None:
            theta = file.read(key, start, stop).astype(dtype)
        assert theta is not None
        for product in products:
            theta = theta + product.read(start, stop, dtype)
        return theta

    return Change(dtype, apply, whole=key is not None)
