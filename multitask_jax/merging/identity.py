"""What a merge is, as values that can be kept and compared; and that inputs stay so."""

import functools
import hashlib
import os
import platform
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import multitask_jax
from multitask_jax.checkpoints import (
    CheckpointError,
    TensorInfo,
    lora_config,
    lora_file,
)

# Of a directory, what a merge reads: weights, and what names or tokens depend on.
_READ = (
    "*.safetensors",
    "*.msgpack",
    "*.index.json",
    "config.json",
    "adapter_config.json",
    "tokenizer*",
    "vocab*",
    "*.model",
    "added_tokens.json",
)
_LIBRARIES = {"jax", "jaxlib", "numpy", "ml_dtypes", "optax", "chex", "flax"}
_SAMPLES, _SAMPLE = 512, 4096  # pieces of all inputs that tell their content apart
# Flags that change no byte of the weights, or that other parts of the identity hold.
_NO_SAY = {
    *("base", "models", "mergekit_config", "statistics", "output", "max_shard_size"),
    *("overwrite", "report", "dry_run", "max_memory", "progress", "threads"),
    *("resume", "verify"),
}


class Inputs:
    """The files that a merge reads, as they were when it began."""

    def __init__(self, paths: Iterable[Path]):
        """`paths`: checkpoints, files or directories."""
        files = [f for p in paths for f in _files(p)]
        self._files = {f: _stat(f) for f in dict.fromkeys(files)}

    def check(self) -> None:
        """A CheckpointError where a file was changed, replaced or removed since."""
        for file, then in self._files.items():
            try:
                now = _stat(file)
            except OSError as e:
                now = {"missing": e.strerror}
            if now == then:
                continue
            what = "was replaced by another file"
            for key, name in (("bytes", "size"), ("modified", "time of change")):
                if now.get(key) != then[key]:
                    what = f"changed ({name} {_said(key, then[key])} before"
                    what += f", {_said(key, now[key])} now)" if key in now else ")"
            if "missing" in now:
                what = f"can't be found any more ({now['missing']})"
            raise CheckpointError(
                f"{file} {what} while it was being merged: the result would be of"
                " neither state, so it was not written. Merge again when nothing"
                " writes there"
            )

    def identity(self) -> dict[str, dict[str, Any]]:
        """Size, time of change and a hash of samples, by file."""
        pieces = max(1, _SAMPLES // max(1, len(self._files)))
        return {
            str(f): {
                "bytes": stat["bytes"],
                "modified": stat["modified"],
                "content": _sampled(f, stat["bytes"], pieces),
            }
            for f, stat in self._files.items()
        }


def _files(path: Path) -> list[Path]:
    path = Path(os.path.abspath(path))  # links are kept: what they point to may change
    if not path.is_dir():
        if lora_file.is_format(path):  # its scaling is beside it
            return [path, path.with_name(lora_config.CONFIG)]
        return [path]
    weights = ("*.safetensors", "*.msgpack")
    if any(f.is_file() for pattern in weights for f in path.glob(pattern)):
        return sorted(
            {f for pattern in _READ for f in path.glob(pattern) if f.is_file()}
        )
    return sorted(f for f in path.rglob("*") if f.is_file())


def _stat(file: Path) -> dict[str, Any]:
    s = file.stat()
    return {"bytes": s.st_size, "modified": s.st_mtime_ns, "id": (s.st_dev, s.st_ino)}


def _sampled(file: Path, size: int, pieces: int) -> str:
    """Hash of evenly spaced pieces; the first has (much of) a safetensors header."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        digest.update(f.read(1 << 16))
        for i in range(1, pieces + 1):
            f.seek(max(0, size - _SAMPLE) * i // pieces)
            digest.update(f.read(_SAMPLE))
    return digest.hexdigest()


def identity_of(
    jobs: Sequence[Any],
    tensors: Sequence[TensorInfo],
    target: Mapping[str, Any],
    inputs: Inputs,
    about: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """What decides the bytes of a merge's output, fit for JSON.

    Args:
      jobs: of `execution.execute`.
      tensors, target: of the output.
      inputs: of all jobs.
      about: flags or recipe, by name; those without influence are left out.
      **options: plain values that count as well.
    """
    roles = [
        [*map(str, (r.path for r in j.readers)), *(str(s.path) for s in j.statistics)]
        for j in jobs
    ]
    shards = target.get("max_shard_size")
    layout = _text(tensors), target.get("format"), shards
    options |= {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
    }
    return {
        "version": multitask_jax.__version__,
        "recipe": {k: str(v) for k, v in about.items() if k not in _NO_SAY},
        "method": digest([(j.method, j.weights) for j in jobs]),
        "tensors": digest(
            [roles, *(_text((*j.plan.merged, *j.plan.copied)) for j in jobs)]
        ),
        "layout": digest(layout),
        "options": {k: str(v) for k, v in options.items()},
        "inputs": inputs.identity(),
    }


def _text(rows: Iterable[Sequence[Any]]) -> str:
    """Entries or TensorInfos, a line each; there may be very many."""
    names: dict[Any, str] = {}  # NumPy takes its time to name a dtype

    def plain(x: Any) -> Any:
        if isinstance(x, tuple):
            return [*map(plain, x)]
        if not isinstance(x, np.dtype):
            return x
        if x not in names:
            names[x] = x.name
        return names[x]

    return "\n".join(str([*map(plain, row)]) for row in rows)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two identities, in words; [] if nothing did."""
    said = []
    for part, name in (
        ("version", "multitask_jax"),
        ("recipe", "--"),
        ("options", ""),
    ):
        a, b = then.get(part), now.get(part)
        if not isinstance(a, dict) or not isinstance(b, dict):
            a, b = {"": a}, {"": b}
        for key in dict.fromkeys((*a, *b)):
            if a.get(key) == b.get(key):
                continue
            if "\n" in f"{a.get(key)}{b.get(key)}":
                said.append(f"{name}{key} changed")
            else:
                was, is_now = (_short(x.get(key, "not given")) for x in (a, b))
                said.append(f"{name}{key}: {was} then, {is_now} now")
    before, after = then.get("inputs") or {}, now["inputs"]
    for file in dict.fromkeys((*before, *after)):
        if file not in after:
            said.append(f"{file} was an input and is none now")
        elif file not in before:
            said.append(f"{file} is an input and was none then")
        else:
            a, b = before[file], after[file]
            keys = [k for k in b if a.get(k) != b[k]]
            if keys:
                was, is_now = (_said(keys[0], x[keys[0]]) for x in (a, b))
                said.append(f"{file}: {keys[0]} {was} then, {is_now} now")
    if not said:
        for part, name in (
            ("method", "the method, its options or the weights"),
            ("tensors", "which tensors are merged, or the inputs' order"),
            ("layout", "the output's dtypes or the size of its files"),
        ):
            if then.get(part) != now[part]:
                said.append(name)
    return said


def _short(x: Any) -> str:
    text = str(x)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _said(key: str, value: Any) -> str:
    if key == "modified":
        whole = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value // 10**9))
        return f"{whole}.{value % 10**9:09d}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:12]


def digest(x: Any) -> str:
    """SHA-256 of a value and, of functions, of their code and what they enclose.

    Two chains built by the same code from the same numbers have the same digest, in
    this process or another one (of the same Python).
    """
    h = hashlib.sha256()
    _feed(h, x, ())
    return h.hexdigest()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _feed(h: Any, x: Any, above: tuple[int, ...]) -> None:
    if id(x) in above:  # a function that encloses itself
        h.update(b"<above>")
        return
    above = (*above, id(x))

    def feed(*parts: Any) -> None:
        h.update(f"({type(x).__name__} {len(parts)}".encode())
        for part in parts:
            _feed(h, part, above)
        h.update(b")")

    if x is None or isinstance(x, bool | int | float | complex | str | bytes):
        h.update(f"{type(x).__name__} {x!r};".encode())
    elif isinstance(x, Path | np.dtype):
        h.update(f"{x};".encode())
    elif isinstance(x, Mapping):
        feed(*x.items())
    elif isinstance(x, set | frozenset):
        feed(*sorted(map(digest, x)))
    elif isinstance(x, list | tuple):
        feed(*x)
    elif isinstance(x, functools.partial):
        feed(x.func, x.args, x.keywords)
    elif isinstance(x, types.CodeType):
        feed(x.co_code, x.co_consts, x.co_names)
    elif isinstance(x, types.MethodType):
        feed(x.__func__, x.__self__)
    elif isinstance(x, types.FunctionType):
        cells = [_content(c) for c in x.__closure__ or ()]
        # A library's functions are known by name; what they enclose counts too.
        code = None if _of_library(x.__module__) else x.__code__
        defaults = (x.__defaults__, x.__kwdefaults__) if code else ()
        feed(x.__module__, x.__qualname__, code, cells, *defaults)
    elif hasattr(x, "dtype") and hasattr(x, "shape"):
        array = np.asarray(x)
        feed(array.dtype, array.shape, array.tobytes())
    elif isinstance(x, types.ModuleType):
        feed(x.__name__)
    elif hasattr(x, "__wrapped__"):  # jit, functools.cache
        feed(x.__wrapped__)
    elif hasattr(x, "__qualname__"):  # classes, builtins
        feed(str(getattr(x, "__module__", "")), x.__qualname__)
    else:
        inside = vars(x) if hasattr(x, "__dict__") else None
        feed(str(type(x)), None if _of_library(type(x).__module__) else inside)


def _of_library(module: str | None) -> bool:
    return str(module).partition(".")[0] in _LIBRARIES
