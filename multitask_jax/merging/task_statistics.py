"""What a merge may know of a model's data: a statistic for each of its tensors.

Two kinds. "fisher": the diagonal Fisher information, an array of the tensor's shape.
"gram": for the weight of a dense layer, `Gram`, X^T X of the layer's inputs X. A
model's statistics are a pytree or a dict by leaf path; tensors that it lacks are
averaged. `save_statistics` writes them beside a checkpoint, for the streamed merge:

    fisher = merging.fisher_diagonal(apply_fn, params, batches)
    merging.save_statistics("A/fisher.safetensors", fisher, examples=256)

    python -m experiments.merge --method=fisher --models=A,B --output=OUT \
      --statistics=A/fisher.safetensors,B/fisher.safetensors

Leaf paths must be the names in the checkpoint: for a Hugging Face directory, compute
them on a dict by these names, {"model.layers.0.mlp.up_proj.weight": ...}.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from multitask_jax import checkpoints, tree
from multitask_jax.checkpoints import CheckpointError, TensorInfo, safetensors_file
from multitask_jax.checkpoints.safetensors_writer import SafetensorsWriter

Kind = Literal["fisher", "gram"]
_FLOATS = safetensors_file.FLOATS
_HOW = {
    "fisher": "merging.fisher_diagonal(apply_fn, params, batches)",
    "gram": "merging.gram_matrices(apply_fn, params, batches)",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
    """X^T X of a dense layer's inputs X [rows, n], and how its weight meets them."""

    matrix: Any  # [*batch sizes, n, n]; n: product of the contracted axes' sizes
    # Axes of the weight that are contracted with X: (0,) for a flax kernel [in, out],
    # (1,) for torch's [out, in], (0, 1) for attention's [heads, width, out].
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    # Axes over which the weight is a stack of matrices (scanned layers, experts).
    batch: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})


class Spec(NamedTuple):
    """Kind and shape of a tensor's statistic."""

    kind: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()


def by_path(statistics: Any) -> dict[str, Any]:
    """A pytree of arrays or of Grams as {leaf path: array or Gram}."""
    marked = jax.tree.map(_Whole, statistics, is_leaf=lambda x: isinstance(x, Gram))
    return {p: whole.content for p, whole in tree.flatten(marked).items()}


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Keeps a Gram in one piece while trees are flattened."""

    content: Any


def spec(statistic: Any) -> Spec:
    """Kind and shape of an array or a Gram."""
    if isinstance(statistic, Gram):
        shape = tuple(np.shape(statistic.matrix))
        return Spec("gram", shape, statistic.axes, statistic.batch)
    return Spec("fisher", tuple(np.shape(statistic)))


def check(
    wanted: Kind | None,
    shapes: Mapping[str, tuple[int, ...]],
    statistics: Sequence[Mapping[str, Spec]] | None,
    count: int,
    *,
    names: Sequence[str] = (),
    aliases: Collection[str] = (),
) -> None:
    """Whether each model has the statistics that a method wants, of the right shapes.

    Args:
      wanted: the method's kind; None takes no statistics.
      shapes: of the base's leaves by path.
      statistics: kinds and shapes by path, one mapping a model.
      count: the number of models.
      names: what errors call the statistics of each model.
      aliases: names of tied tensors, which may have statistics that are not used.

    Raises:
      ValueError: none where some are needed, of another kind or shape, of leaves that
        do not exist, or of a leaf for some models only.
    """
    if wanted is None:
        if statistics is not None:
            raise ValueError("got statistics, but this method takes none: leave them")
        return
    if statistics is None:
        raise ValueError(
            f"this method needs {wanted} statistics, one set a model: compute them with"
            f" {_HOW[wanted]} and pass statistics=[...], or save them with"
            " merging.save_statistics and pass their paths (on the command line"
            " --statistics=A/FILE,B/FILE)"
        )
    if len(statistics) != count:
        raise ValueError(f"got {len(statistics)} sets of statistics for {count} models")
    names = names or [f"statistics of model {t}" for t in range(count)]
    for name, specs in zip(names, statistics, strict=True):
        unknown = [p for p in specs if p not in shapes and p not in aliases]
        if unknown or not specs:
            raise ValueError(
                f"{name}: got leaves {unknown[:5]} that the base lacks, expected some"
                f" of {list(shapes)[:5]}, ...; compute them on parameters by the names"
                " of the merge"
            )
        for path, s in specs.items():
            _check_one(wanted, f"{name}: {path}", shapes.get(path), s)
    first = statistics[0]
    for name, specs in zip(names, statistics, strict=True):
        lacking = sorted(set(first) ^ set(specs))
        if lacking:
            raise ValueError(
                f"{names[0]} and {name} are of other leaves: {lacking[:5]} are in one"
                " of them only; compute both with the same function and leaves"
            )
        for path, s in specs.items():
            if s[2:] != first[path][2:]:
                raise ValueError(
                    f"{path}: axes {s.axes} (stacked over {s.batch}) are contracted in"
                    f" {name}, {first[path].axes} ({first[path].batch}) in {names[0]}"
                )


def _check_one(
    wanted: Kind, where: str, shape: tuple[int, ...] | None, s: Spec
) -> None:
    if s.kind != wanted:
        raise ValueError(
            f"{where}: got {s.kind} statistics, expected {wanted}: {_HOW[wanted]}"
        )
    if shape is None:
        return
    expected = shape
    if wanted == "gram":
        if not all(0 <= a < len(shape) for a in (*s.axes, *s.batch)):
            raise ValueError(
                f"{where}: axes {s.axes} and {s.batch} do not fit the weight {shape}"
            )
        n = math.prod(shape[a] for a in s.axes)
        expected = (*(shape[a] for a in s.batch), n, n)
    if s.shape != expected:
        raise ValueError(
            f"{where}: got shape {s.shape}, expected {expected} for a tensor {shape}"
        )


# -- on disk ---------------------------------------------------------------------------


def save_statistics(
    path: str | os.PathLike[str],
    statistics: Any,
    *,
    examples: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model's statistics as one safetensors file, whole or not at all.

        gram = merging.gram_matrices(apply_fn, params, batches)
        merging.save_statistics("A/gram.safetensors", gram, examples=1024)

    Args:
      path: the file, like "A/fisher.safetensors" beside A/model.safetensors.
      statistics: from `fisher_diagonal` or `gram_matrices`; stored as float32 (float64
        stays float64).
      examples: how many they are from, for the record.
      overwrite: replace a file of statistics.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: another suffix, or the path exists.
      ValueError: no statistics, both kinds in one tree, or NaN.
    """
    path = Path(path).expanduser().absolute()
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: expected a file name like gram.safetensors")
    if path.exists() and not (overwrite and _is_statistics(path)):
        raise CheckpointError(
            f"{path} exists; choose another name, or pass overwrite to replace it (only"
            " ever a file of statistics)"
        )
    known = by_path(statistics)
    specs = {p: spec(x) for p, x in known.items()}
    kinds = sorted({s.kind for s in specs.values()})
    if len(kinds) != 1:
        raise ValueError(f"got statistics of kinds {kinds}, expected one kind")
    arrays = {p: _to_host(p, x) for p, x in known.items()}
    axes = {p: {"axes": s.axes, "batch": s.batch} for p, s in specs.items()}
    metadata = {"statistics": kinds[0], "examples": str(examples or "")}
    if kinds == ["gram"]:
        metadata["axes"] = json.dumps(axes)
    infos = [TensorInfo(p, x.shape, x.dtype) for p, x in arrays.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.partial-{os.getpid()}"
    staging.mkdir()
    try:
        writer = SafetensorsWriter(staging, infos, metadata=metadata)
        for p, x in arrays.items():
            writer.write(p, 0, x.reshape(-1))
        writer.finish()
        (staging / "model.safetensors").replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def _to_host(path: str, x: Any) -> np.ndarray:
    x = np.asarray(x.matrix if isinstance(x, Gram) else x)
    if x.dtype != np.float64:
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: the statistic has NaN or infinity")
    return np.array(x, order="C")


def _is_statistics(path: Path) -> bool:
    reader = checkpoints.open(path)
    try:
        metadata = getattr(reader, "metadata", None)
        return isinstance(metadata, dict) and bool(metadata.get("statistics"))
    finally:
        reader.close()


class StatisticsFile:
    """Statistics of one model on disk, read tensor by tensor (Fisher: by slices)."""

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the file.

        Raises:
          CheckpointError: no statistics, integers, or axes that are damaged.
        """
        self.path = Path(path).expanduser()
        self._reader = checkpoints.open(self.path)
        found = getattr(self._reader, "metadata", None)
        self.metadata: dict[str, str] = found if isinstance(found, dict) else {}
        kind = self.metadata.get("statistics")
        if not isinstance(kind, str) or kind not in _HOW:
            self.close()
            raise CheckpointError(
                f"{self.path}: a checkpoint, not statistics: write such files with"
                " merging.save_statistics"
            )
        self.specs: dict[str, Spec] = {}
        try:
            axes = json.loads(self.metadata.get("axes", "{}"))
            for p, info in self._reader.tensors.items():
                at = axes[p] if kind == "gram" else {"axes": (), "batch": ()}
                where = (tuple(at["axes"]), tuple(at["batch"]))
                _check_axes(kind, *where)
                self.specs[p] = Spec(kind, info.shape, *where)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.close()
            raise CheckpointError(
                f"{self.path}: damaged: its metadata do not say which axes of the"
                " weights were contracted; write it again with merging.save_statistics"
            ) from None
        for p, info in self._reader.tensors.items():
            if info.dtype not in _FLOATS:
                self.close()
                raise CheckpointError(
                    f"{self.path}: the statistic of {p} is {info.dtype}, expected"
                    " floats; write it again with merging.save_statistics"
                )

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's statistic; 0 if it has none."""
        info = self._reader.tensors.get(name)
        return info.nbytes if info else 0

    def read(
        self, name: str, start: int, stop: int, place: Callable[[np.ndarray], Any]
    ) -> Any:
        """The statistic of a tensor, or of its flat entries [start, stop).

        `place` casts, pads and shapes a Fisher's entries as those of the parameters; a
        Gram comes whole.

        Raises:
          CheckpointError: NaN or infinity, or Fisher information below 0.
        """
        s = self.specs[name]
        if s.kind == "fisher":
            flat = self._reader.read(name, start, stop)
        else:
            flat = self._reader.read(name)
        if not np.isfinite(flat).all():
            raise CheckpointError(
                f"{self.path}: the statistic of {name} has NaN or infinity"
            )
        if s.kind == "fisher":
            if (flat < 0).any():
                raise CheckpointError(
                    f"{self.path}: the statistic of {name} has entries below 0, which"
                    " Fisher information has not; compute it with"
                    f" {_HOW['fisher']}"
                )
            return place(flat)
        return Gram(flat.reshape(s.shape), s.axes, s.batch)

    def close(self) -> None:
        """Releases the file."""
        self._reader.close()


def _check_axes(kind: str, axes: tuple[Any, ...], batch: tuple[Any, ...]) -> None:
    """Raises ValueError for what no array can have; which fit is seen at the weight."""
    every = (*axes, *batch)
    whole = all(type(a) is int and a >= 0 for a in every)
    if not whole or len(set(every)) != len(every) or (kind == "gram" and not axes):
        raise ValueError(f"got axes {axes} and {batch}")


def load_statistics(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_statistics` wrote: {leaf path: array or Gram}.

    Raises:
      CheckpointError: missing, damaged, or not a file of statistics.
    """
    file = StatisticsFile(path)
    try:
        return {
            p: file.read(
                p, 0, math.prod(s.shape), lambda x, s=s: np.array(x).reshape(s.shape)
            )
            for p, s in file.specs.items()
        }
    finally:
        file.close()
