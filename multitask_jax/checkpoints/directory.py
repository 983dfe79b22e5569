"""Opening any checkpoint, and creating one aside so that it appears whole or not."""

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from multitask_jax.checkpoints import (
    abstract_file,
    delta_file,
    lora_file,
    safetensors_file,
    staging,
)
from multitask_jax.checkpoints.types import (
    CheckpointError,
    FormatWriter,
    Reader,
    TensorInfo,
)

FORMATS = ("safetensors", "orbax", "msgpack", "delta")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What Hugging Face tools keep beside the weights. The card is written anew.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")
_NOT_COMPANIONS = (
    "README.md",
    "merge_report.md",
    "merge_report.json",
    "checksums.json",
)


def _module(name: str) -> ModuleType:
    """The format's module; Orbax costs a second to import, so only on use."""
    if name == "safetensors":
        return safetensors_file
    if name == "orbax":
        from multitask_jax.checkpoints import orbax_file

        return orbax_file
    if name == "msgpack":
        from multitask_jax.checkpoints import msgpack_file

        return msgpack_file
    if name == "delta":
        return delta_file
    raise ValueError(f"got format {name!r}, expected one of {', '.join(FORMATS)}")


_ORBAX_MARKERS = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")


def _looks_like_orbax(path: Path) -> bool:
    return path.is_dir() and any(
        (directory / marker).exists()
        for directory in (path, *(p for p in path.iterdir() if p.is_dir()))
        for marker in _ORBAX_MARKERS
    )


def _refuse_more(path: Path) -> None:
    """Refuses to replace a folder that holds more than its own checkpoint.

    Such as a trainer's, with a folder a step, or one of a single Orbax item and logs.
    What a merge by EMR writes for its tasks belongs to it.
    """
    if any((path / marker).exists() for marker in _ORBAX_MARKERS):
        return
    weights = ("*.safetensors", "*.msgpack", "*.bin", "*.pt", *_ORBAX_MARKERS)
    for inside in sorted(p for p in path.iterdir() if p.is_dir()):
        if inside.name != "tasks" and any(
            f for pattern in weights for f in inside.rglob(pattern)
        ):
            raise CheckpointError(
                f"{path} holds more than one checkpoint ({inside.name} too), so"
                " overwrite does not delete it; remove what you do not need yourself,"
                " or choose another output"
            )


def _to_disk(path: Path) -> None:
    """Returns when files, and the folders' lists of them, are on the disk."""
    for p in (*path.rglob("*"), path):
        number = os.open(p, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# Changes of a base, which are models with it alone.
_CHANGES = {"a LoRA adapter": lora_file, "a delta": delta_file}


def open(path: str | os.PathLike[str], base: Reader | None = None) -> Reader:
    """Opens a checkpoint for lazy reading; the format is told from the files.

    Args:
      path: file or directory. A PEFT LoRA adapter or a delta (format="delta") is a
        model too, with the base that it changes. A JSON file (`abstract_file`) tells
        names and shapes alone.
      base: what an adapter or a delta is added to, as it is read; it must stay open.
        Other checkpoints are whole without.

    Raises:
      CheckpointError: missing, not a checkpoint, damaged, or pickle-based; an adapter
        or a delta without its base, or with another one.
    """
    path = Path(path).expanduser()
    try:
        return _open(path, base)
    except OSError as e:
        where = e.filename or path
        raise CheckpointError(f"{where}: can't be read ({e.strerror})") from None


def is_change(path: str | os.PathLike[str]) -> bool:
    """Whether it changes a base and is no model without: a LoRA adapter or a delta."""
    path = Path(path).expanduser()
    return any(module.is_format(path) for module in _CHANGES.values())


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by their stored names.

    Raises:
      CheckpointError: not a checkpoint, or damaged.
    """
    with contextlib.closing(open(path)) as reader:
        return {
            name: np.array(reader.read(name)).reshape(info.shape)
            for name, info in reader.tensors.items()
        }


def _open(path: Path, base: Reader | None) -> Reader:
    if not path.exists():
        near = _similar(path)
        raise CheckpointError(f"{path}: no such file or directory{near}")
    for kind, module in _CHANGES.items():
        if module.is_format(path):
            if base is None:
                raise CheckpointError(
                    f"{path}: {kind} changes a base and is no model without: give the"
                    " base it was made for (--base=BASE; in Python base=open(BASE))"
                )
            return module.open_reader(path, base)
    if safetensors_file.is_format(path):
        return safetensors_file.open_reader(path)
    if _looks_like_orbax(path):
        return _module("orbax").open_reader(path)
    if path.suffix == ".msgpack" or (path.is_dir() and any(path.glob("*.msgpack"))):
        return _module("msgpack").open_reader(path)
    if abstract_file.is_format(path):
        return abstract_file.open_reader(path)
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    pickles = [p.name for p in candidates if p.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{path}: {pickles[0]} is a pickle, which can run code when loaded, so it"
            " is never opened; convert it once where you trust it: in transformers"
            " `AutoModel.from_pretrained(DIR).save_pretrained(OUT,"
            " safe_serialization=True)`, or `safetensors.torch.save_file(torch.load("
            "FILE, weights_only=True), 'model.safetensors')`"
        )
    listing = ", ".join(p.name for p in candidates[:8]) or "nothing"
    raise CheckpointError(
        f"{path}: not a checkpoint: found {listing}; expected *.safetensors, an Orbax"
        " directory (_METADATA) or flax *.msgpack"
    )


def _similar(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def is_file_like_output(path: Path) -> bool:
    """Outputs are directories; a name that promises a single file would mislead."""
    return path.suffix in (".safetensors", ".msgpack", *PICKLES)


class Writer:
    """A checkpoint in the making, in a hidden directory beside its final path.

    Used as a context manager: a clean exit renames it into place, an exception or a
    kill leaves the final path as it was.
    """

    def __init__(self, path: Path, directory: Path, inner: FormatWriter, replace: bool):
        self.path = path
        self.directory = directory
        self.keep = False  # whether `abort` leaves the files, for `attach`
        self._inner = inner
        self._replace = replace
        self._complete = False
        self._pulse = staging.Pulse(directory)

    def write(self, name: str, start: int, flat: np.ndarray) -> None:
        """Stores flat entries [start, start + len(flat)) of a tensor; thread-safe."""
        self._inner.write(name, start, flat)

    @property
    def shards(self) -> list[list[str]]:
        """Names of the tensors of each file, if the format has such files."""
        return getattr(self._inner, "shards", [])

    def skip(self, names: Sequence[str]) -> None:
        """Says that tensors are written already: by another process, or before."""
        self._inner.skip(names)

    def complete(self) -> None:
        """Finishes the files: `directory` is a checkpoint from now on."""
        if not self._complete:
            self._inner.finish()
            self._complete = True
            self._pulse.stop()

    def commit(self) -> None:
        """Finishes the files and renames the directory to its final path."""
        self.complete()
        if not self._replace:
            _refuse_existing(self.path)
        old = None
        if self.path.exists():
            _to_disk(self.directory)  # or a power cut could take both
            old = staging.replaced(self.path)
            self.path.rename(old)
        try:
            self.directory.rename(self.path)
        except OSError:
            if old is not None:
                old.rename(self.path)
            raise
        if old is not None:
            shutil.rmtree(old)

    def abort(self) -> None:
        """Removes everything written so far (unless `keep` is set)."""
        self._pulse.stop()
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()
        if self.keep:
            staging.release(self.directory)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._fail(error)
            return
        try:
            self.commit()
        except BaseException as e:
            self._fail(e)
            raise

    def _fail(self, error: BaseException) -> None:
        self.abort()
        if _is_full(error):
            raise _no_room(self.path, kept=self.keep) from None


def _is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, OSError) and error.errno in full


def _no_room(path: Path, need: int = 0, *, kept: bool = False) -> CheckpointError:
    """The error of a full disk: before work if `need` bytes are known, or later."""
    free = shutil.disk_usage(path.parent).free
    takes = f" it takes {need:,} bytes, free are {free:,};" if need else ""
    end = "nothing was written" if need else "nothing is left there; free some"
    if kept:
        end = "free some and go on with resume (--resume); the rest is kept"
    return CheckpointError(f"{path.parent}: no room for the output:{takes} {end}")


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise CheckpointError(
            f"{path} exists; pass overwrite (on the command line --overwrite) to"
            " replace it, or choose another output"
        )


def check_output(
    path: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> Path:
    """Refuses an output that exists, lies in an input, or would swallow one.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: naming the path and what to do.
      ValueError: unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"got format {format!r}, expected one of {', '.join(FORMATS)}")
    path = Path(path).expanduser().absolute()
    if is_file_like_output(path):
        raise CheckpointError(
            f"{path}: the output is a directory; drop the suffix {path.suffix}"
        )
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise CheckpointError(
                f"{path}: {parent} is a file, not a directory; choose another output"
            )
    here = path.resolve()
    for source in inputs:
        source = source.resolve()
        home = source if source.is_dir() else source.parent
        if here == source or here.is_relative_to(source) or home.is_relative_to(here):
            raise CheckpointError(
                f"the output {path} and the input {source} overlap; choose an output"
                " outside every input"
            )
    if not overwrite:
        _refuse_existing(path)
    elif path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CheckpointError(f"{path} is not a directory: not overwritten")
    elif any(module.is_format(path) for module in _CHANGES.values()):
        pass
    elif path.is_dir() and any(path.iterdir()):
        try:
            open(path).close()
        except CheckpointError as e:
            raise CheckpointError(
                f"{path} holds no checkpoint, so overwrite does not delete it; remove"
                f" it yourself or choose another output ({e})"
            ) from None
        _refuse_more(path)
    return path


def create(
    path: str | os.PathLike[str],
    tensors: Sequence[TensorInfo],
    *,
    format: str = "safetensors",
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    **options: Any,
) -> Writer:
    """Starts a checkpoint whose tensors are known up front.

    Args:
      path: the directory that appears on success.
      tensors: names, shapes and dtypes, in the order of writing.
      format: safetensors, orbax, msgpack or delta (the tensors are a task vector).
      overwrite: replace a checkpoint at `path`.
      inputs: paths that the output must not touch.
      **options: of the format (safetensors: max_shard_size, metadata, stem; delta:
        max_shard_size and `base`, the open base that it will be added to).

    Raises:
      CheckpointError: the path is taken or overlaps an input; the disk is too small.
    """
    path = Path(path).expanduser().absolute()
    staging.remove_stale(path)
    check_output(path, format=format, overwrite=overwrite, inputs=inputs)
    module = _module(format)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = staging.ours(path)
        directory.mkdir()
    except OSError as e:
        raise CheckpointError(
            f"{path}: can't write there ({e.strerror}); choose another output"
        ) from None
    try:
        inner = module.create_writer(directory, tensors, **options)
    except OSError as e:
        shutil.rmtree(directory, ignore_errors=True)
        if _is_full(e):
            raise _no_room(path, sum(t.nbytes for t in tensors)) from None
        raise
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return Writer(path, directory, inner, overwrite)


def attach(
    directory: Path,
    path: str | os.PathLike[str],
    tensors: Sequence[TensorInfo],
    *,
    overwrite: bool = False,
    **options: Any,
) -> Writer:
    """Goes on with a safetensors checkpoint in the making: `create`'s `directory`.

    Args:
      directory: of a writer of another process, or of one that was killed.
      path, tensors, overwrite, options: as they were given to `create`.

    Raises:
      CheckpointError: the files are of another layout.
    """
    path = Path(path).expanduser().absolute()
    inner = safetensors_file.create_writer(directory, tensors, attach=True, **options)
    return Writer(path, directory, inner, overwrite)


def companions(source: Path) -> list[Path]:
    """Config, tokenizer and generation files of a Hugging Face directory.

    Those of subdirectories too, if they hold no weights (sentence-transformers keeps
    the settings of its modules there; other checkpoints are left alone).
    """
    if not source.is_dir():
        return []
    weights = (".safetensors", ".msgpack", *PICKLES)
    files = list(source.iterdir())
    for folder in (f for f in files if f.is_dir()):
        inside = list(folder.iterdir())
        if not any(f.suffix in weights for f in inside):
            files += inside
    found = []
    for file in sorted(files):
        name = file.relative_to(source)
        keep = file.suffix in _COMPANIONS or file.name.startswith("LICENSE")
        hidden = any(part.startswith(".") for part in name.parts)
        index = file.name.endswith(".index.json")
        written_anew = str(name) in _NOT_COMPANIONS
        if file.is_file() and keep and not (hidden or index or written_anew):
            found.append(file)
    return found


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies the `companions` of one directory to another; returns their names."""
    copied = []
    for file in companions(source):
        name = file.relative_to(source)
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)
        copied.append(str(name))
    return copied
