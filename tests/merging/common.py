"""Models that the merging tests share, and ways to run a merge."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from multitask_jax import checkpoints, merging, tree
from multitask_jax.checkpoints import TensorInfo

# What is not about bits need not be optimised: it compiles in half the time.
BRIEFLY = {"xla_backend_optimization_level": 0}


def make_tree(
    rng: np.random.Generator,
    dtype: Any = np.float32,
    *,
    rows: int = 560,
    blocks: int = 3,
) -> dict[str, Any]:
    """Parameters with blocks, a scalar, an empty leaf and one of several chunks."""

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), np.float32).astype(dtype)

    body = {
        f"block_{i}": {
            "mlp": {"kernel": normal(24, 40), "bias": normal(40)},
            "attention": {"kernel": normal(3, 8, 16)},
        }
        for i in range(blocks)
    }
    return {
        "embed": normal(rows, 500),
        **body,
        "scale": normal(),
        "nothing": normal(0, 8),
    }


def make_models(
    count: int, dtype: Any = np.float32, seed: int = 0, **sizes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A base and fine-tunes of it: small changes, some of them zero or equal."""
    rng = np.random.default_rng(seed)
    base = make_tree(rng, dtype, **sizes)

    def fine_tune(x: np.ndarray) -> np.ndarray:
        delta = 0.1 * rng.standard_normal(x.shape)
        delta = np.where(rng.random(x.shape) < 0.3, 0, delta)
        rough = np.round(delta * 16) / 16  # sums that cancel, magnitudes that tie
        delta = np.where(rng.random(x.shape) < 0.3, rough, delta)
        return (x.astype(np.float32) + delta.astype(np.float32)).astype(dtype)

    return base, [jax.tree.map(fine_tune, base) for _ in range(count)]


def save(path: Path, params: Any, format: str = "safetensors") -> Path:
    """Writes a tree as a checkpoint whose names are the leaf paths."""
    leaves = {k: np.asarray(v) for k, v in tree.flatten(params).items()}
    infos = [TensorInfo(k, v.shape, v.dtype) for k, v in leaves.items()]
    with checkpoints.create(path, infos, format=format) as writer:
        for name, value in leaves.items():
            writer.write(name, 0, value.reshape(-1))
    return path


def load(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name."""
    reader = checkpoints.open(path)
    return {
        name: np.array(reader.read(name)).reshape(info.shape)
        for name, info in reader.tensors.items()
    }


def merged(method: merging.Method, base: Any, models: Any, **kwargs: Any) -> Any:
    """The merge in memory, jitted: one program where eager ones compile each step."""
    return jax.jit(lambda b, m: merging.merge(method, b, m, **kwargs))(base, models)


def random_statistics(kind: str, base: Any, count: int) -> list[Any]:
    """Fishers of all leaves, or Grams of all kernels, of `count` models."""
    rng = np.random.default_rng(7)

    def fisher(x: Any) -> np.ndarray:
        return np.asarray(rng.random(np.shape(x)) ** 4, np.float32)

    def gram(n: int) -> merging.Gram:
        x = rng.standard_normal((2 * n, n)).astype(np.float32)
        return merging.Gram(x.T @ x, (0,))

    shapes = {p: np.shape(x) for p, x in tree.flatten(base).items()}
    kernels = {p: s[0] for p, s in shapes.items() if "kernel" in p}
    if kind == "fisher":
        return [jax.tree.map(fisher, base) for _ in range(count)]
    return [{p: gram(n) for p, n in kernels.items()} for _ in range(count)]


def stream(
    folder: Path,
    method: merging.Method,
    base: Any,
    models: Any,
    *,
    report_files: bool = False,
    statistics: Any = None,
    **kwargs: Any,
) -> dict[str, np.ndarray]:
    """Merges through the disk."""
    base_path = save(folder / "base", base)
    paths = [save(folder / f"m{t}", m) for t, m in enumerate(models)]
    if statistics is not None:
        kwargs["statistics"] = [
            merging.save_statistics(p / "statistics.safetensors", s, overwrite=True)
            for p, s in zip(paths, statistics, strict=True)
        ]
    merging.merge_checkpoints(
        method,
        base_path,
        paths,
        folder / "out",
        progress=False,
        report_files=report_files,
        **kwargs,
    )
    return load(folder / "out")


def bits(x: Any) -> np.ndarray:
    """The bytes as integers, so that -0 is not 0 and NaN is itself."""
    x = np.ascontiguousarray(x)
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return x.reshape(-1).view(kinds[x.dtype.itemsize])


def assert_same_bits(a: Any, b: Any) -> None:
    """Equal trees, bit for bit, zeros of either sign being equal."""
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        x, y = np.asarray(a[path]), np.asarray(b[path])
        assert x.dtype == y.dtype, path
        assert x.shape == y.shape, path
        different = (bits(x) != bits(y)) & ~((x == 0) & (y == 0)).reshape(-1)
        assert not different.any(), f"{path}: {different.mean():.2%} differ"


FLOATS = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
