"""First-person clips from a folder of .npz files: recorded here, or the user's own.

    clips = load("clips/train")
    clips.arrays["rgb"][i], clips.present["gaze"][i], clips.names[i]

A file holds one clip, or a shard (a leading axis of clips), with any of

    rgb     uint8 [F, H, W, 3]
    depth   float [F, H, W]     metres along z; NaN (or 0) where unknown
    camera  float [S, 4, 4]     camera-to-world, OpenCV axes, metres
    gaze    float [S, 2]        x, y in [0, 1] of the image; NaN where invalid

A frame every fourth sample: 16 frames and 64 samples of about 2 s in EgoM2P's manner
(sizes are a reconstruction: the paper has 16 x 256 x 256 and 60 samples).

Legend: N clips, C clips of a file, F frames, H = W pixels, S samples.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitask_jax.data import poses

FRAMES, SIZE, SAMPLES = 16, 64, 64
MODALITIES = ("rgb", "depth", "camera", "gaze")
SHAPES = {
    "rgb": (FRAMES, SIZE, SIZE, 3),
    "depth": (FRAMES, SIZE, SIZE),
    "camera": (SAMPLES, 4, 4),
    "gaze": (SAMPLES, 2),
}
DTYPES = {name: np.uint8 if name == "rgb" else np.float32 for name in MODALITIES}
_NAN = ("depth", "gaze")  # missing values of these; of the others 0
_ACROSS = np.outer([-1, 1, 1, 1], [-1, 1, 1, 1]).astype(np.float32)  # S T S, S = S^-1
_EDGE = 0.01  # of the image, that a gaze may lie outside of it before it is an error


class Clips(NamedTuple):
    """Clips of many files, in the order of their names; nobody writes to them."""

    # [N, *SHAPES]; missing: 0 (rgb, camera) or NaN, which is one number, seen N times,
    # where no file has the modality.
    arrays: dict[str, np.ndarray]
    present: dict[str, np.ndarray]  # [N] bool: some of the modality is known
    names: list[str]  # "folder/file.npz#3"
    group: list[str]  # of a shard "folder/file", of a clip in its own file "folder"


def load(folder: str | os.PathLike[str], *, limit: int | None = None) -> Clips:
    """All clips below a folder, or of one file.

    Cameras come out relative to the first sample, T_0^-1 T_t, whatever world they
    were in. Where a depth or a gaze has no known value in a whole clip, the modality is
    not present there.

    Args:
      folder: searched for .npz files, as `files_below` does; or such a file.
      limit: clips at most, spread evenly over all files; all if not given.

    Raises:
      FileNotFoundError: no such file or folder, or no .npz in it.
      ValueError: a file is damaged or does not hold what the module's text says; or a
        limit below 1.
    """
    root = Path(folder)
    files = [root] if root.is_file() else files_below(root)
    if not files:
        what = "no .npz below it" if root.is_dir() else "no such file or folder"
        raise FileNotFoundError(
            f"{root}: {what}; expected files of clips, which"
            " multitask_jax.data.vizdoom_clips.record can make"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or None for all")
    headers = [_open(path, _headers) for path in files]
    counts = [_clips_in(h, str(p)) for p, h in zip(files, headers, strict=True)]
    total = sum(counts)
    n = total if limit is None else min(limit, total)
    taken = np.arange(n) * total // n  # all, or evenly spaced ones
    arrays = {name: _missing(name, n) for name in MODALITIES}
    for name in set().union(*headers):
        arrays[name] = np.zeros((n, *SHAPES[name]), DTYPES[name])
        if name in _NAN:
            arrays[name].fill(np.nan)
    present = {name: np.zeros(n, bool) for name in MODALITIES}
    names, group = [], []
    first = 0  # clip of the file, among all
    for path, header, count in zip(files, headers, counts, strict=True):
        low, high = np.searchsorted(taken, [first, first + count])
        rows = taken[low:high] - first
        first += count
        if not len(rows):
            continue
        for name, x in _checked(_open(path, _arrays), str(path)).items():
            arrays[name][low:high] = x[rows]
            present[name][low:high] = _known(x[rows])
        name = path.relative_to(root) if path != root else Path(path.name)
        names += [f"{name.as_posix()}#{i}" for i in rows]
        alone = all(shape == SHAPES[key] for key, (shape, _) in header.items())
        home = name.parent if alone else name.with_suffix("")
        group += [home.as_posix()] * len(rows)
    return Clips(arrays, present, names, group)


def files_below(folder: str | os.PathLike[str]) -> list[Path]:
    """Its .npz files at any depth, sorted. Links are followed, into a folder once.

    A link may lead to a folder above it: without end, if it were followed again.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for home, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(home)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # which name a folder of two has is the same anywhere
        found += [Path(home, name) for name in names if name.endswith(".npz")]
    return sorted(found)


def mirrored(clips: Clips) -> Clips:
    """The clips as a mirror shows them: left is right, in every modality.

    A second sight of the same walks, to learn from. Names end in "/mirrored".
    """
    arrays = {
        name: x if _is_missing(x) else _MIRROR[name](x)
        for name, x in clips.arrays.items()
    }
    names = [f"{name}/mirrored" for name in clips.names]
    return Clips(arrays, dict(clips.present), names, list(clips.group))


def joined(first: Clips, second: Clips) -> Clips:
    """The clips of both, behind each other."""
    return Clips(
        {k: _behind(k, x, second.arrays[k]) for k, x in first.arrays.items()},
        {k: np.concatenate([x, second.present[k]]) for k, x in first.present.items()},
        [*first.names, *second.names],
        [*first.group, *second.group],
    )


def save_shard(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one clip or a shard of them, whole or not at all; not compressed.

    Dtypes are kept: float16 halves the size of a depth.

    Raises:
      ValueError: it is not what `load` takes.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: got {path.suffix!r}, expected a name in .npz")
    _checked(arrays, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def _open(path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(path)
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise ValueError(
            f"{path} can't be read ({type(e).__name__}: {e}); expected an .npz of"
            " np.savez without pickles: if it was one, it is damaged or cut off, so"
            " make it again"
        ) from e


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file}


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of a file's arrays, without reading them."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                old = version == (1, 0)
                shape, _, dtype = (
                    np.lib.format.read_array_header_1_0(file)
                    if old
                    else np.lib.format.read_array_header_2_0(file)
                )
                found[member.removesuffix(".npy")] = shape, dtype
    return found


def _clips_in(headers: dict[str, tuple[tuple[int, ...], np.dtype]], where: str) -> int:
    counts = {k: _count(k, *header, f"{where}, {k}") for k, header in headers.items()}
    return _agreed(counts, where)


def _count(key: str, shape: tuple[int, ...], dtype: np.dtype, where: str) -> int:
    """Clips of an array of such a shape; 1 without an axis of them."""
    if key not in SHAPES:
        raise ValueError(
            f"{where}: got an unknown name, expected some of {list(MODALITIES)}; rename"
            " or remove it"
        )
    kind, advice = ("f", "float32"), ""
    if key == "rgb":
        kind, advice = ("u", "uint8"), " (values from 0 to 255)"
    elif dtype.kind in "iu":
        advice = " (convert it, to metres if it is a depth in millimetres)"
    elif dtype.kind == "O":
        advice = " (objects are pickles, which are not opened)"
    if dtype.kind != kind[0] or (key == "rgb" and dtype.itemsize != 1):
        raise ValueError(f"{where}: got {dtype}, expected {kind[1]}{advice}")
    own = SHAPES[key]
    if shape == own:
        return 1
    if shape[1:] == own and shape[0] > 0:
        return shape[0]
    raise ValueError(
        f"{where}: got the shape {list(shape)}, expected {list(own)}, or [clips,"
        f" {str(list(own))[1:]} with one clip at least; crop, resize or resample it"
    )


def _agreed(counts: Mapping[str, int], where: str) -> int:
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"{where}: got clips by modality {dict(counts)}, expected one number for"
            " all; fill the clips that lack a depth or a gaze with NaN, or put clips"
            " that lack something into a file of their own"
        )
    return next(iter(counts.values()))


def _checked(arrays: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """[C, *SHAPES] by modality, of the dtypes that `Clips` has."""
    out, counts = {}, {}
    for key in arrays:
        x = np.asarray(arrays[key])
        counts[key] = _count(key, x.shape, x.dtype, f"{where}, {key}")
        x = x.reshape(counts[key], *SHAPES[key])
        out[key] = _CHECKS[key](x, f"{where}, {key}").astype(DTYPES[key], copy=False)
    _agreed(counts, where)
    return out


def _depth(x: np.ndarray, where: str) -> np.ndarray:
    _refuse((x < 0) | np.isinf(x), x, where, "metres, not negative, NaN where unknown")
    return np.where(x == 0, np.nan, x)  # as many sensors write what they can't see


def _camera(x: np.ndarray, where: str) -> np.ndarray:
    poses.check(x, where)
    # In float64, for a world may be large; then rigid to the last digit.
    own = poses.relative(x.astype(np.float64))
    return poses.from_vector(poses.to_vector(own))


def _gaze(x: np.ndarray, where: str) -> np.ndarray:
    outside = (x < -_EDGE) | (x > 1 + _EDGE)
    _refuse(outside, x, where, "shares of the image from 0 to 1 (divide pixels by it)")
    half = np.isnan(x) & ~np.isnan(x).all(-1, keepdims=True)
    _refuse(half, x, where, "NaN for both x and y, or for neither")
    return x.clip(0, 1)


def _refuse(bad: np.ndarray, x: np.ndarray, where: str, expected: str) -> None:
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{where}{list(index)}: got {x[index]}, expected {expected}"
            f" ({int(bad.sum())} such values in all)"
        )


def _known(x: np.ndarray) -> np.ndarray:
    """[C] bool: the clip has a value that is not NaN."""
    return ~np.isnan(x).reshape(len(x), -1).all(1)


def _missing(name: str, count: int) -> np.ndarray:
    """A modality of clips that all lack it: [count, *SHAPES], a view of one number.

    Of 100,000 clips, NaN as their depths would take 26 GB.
    """
    one = np.array(np.nan if name in _NAN else 0, DTYPES[name])
    return np.broadcast_to(one, (count, *SHAPES[name]))


def _is_missing(x: np.ndarray) -> bool:
    return not any(x.strides)


def _behind(name: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if _is_missing(first) and _is_missing(second):
        return _missing(name, len(first) + len(second))
    return np.concatenate([first, second])


_MIRROR: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rgb": lambda x: x[..., ::-1, :],
    "depth": lambda x: x[..., ::-1],
    "camera": lambda x: x * _ACROSS,
    "gaze": lambda x: np.stack([1 - x[..., 0], x[..., 1]], axis=-1),
}
_CHECKS = {"rgb": lambda x, where: x, "depth": _depth, "camera": _camera, "gaze": _gaze}
