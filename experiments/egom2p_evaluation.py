"""Measures of generated clips, and of the predictions that ask for no model.

Legend: N clips, S samples of a trajectory, F frames.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.egom2p_tokens import Tokens
from multitask_jax import evaluation
from multitask_jax.data import poses
from multitask_jax.data.egocentric import Clips
from multitask_jax.masked import modalities as mods
from multitask_jax.masked import tokenizers
from multitask_jax.masked.modalities import Modalities
from multitask_jax.masked.tokenizers import Tokenizer
from multitask_jax.models import egom2p, egom2p_generation
from multitask_jax.models.egom2p import Shape


class Task(NamedTuple):
    """One modality from another, in the paper's number of steps."""

    given: str
    wanted: str
    steps: int

    @property
    def name(self) -> str:
        """Such as "rgb -> depth"."""
        return f"{self.given} -> {self.wanted}"


TASKS = (
    Task("rgb", "gaze", 5),
    Task("rgb", "camera", 3),
    Task("rgb", "depth", 3),
    Task("depth", "rgb", 6),
)


def has_both(clips: Clips, task: Task) -> np.ndarray:
    """[N] bool: the clip has both modalities of a task."""
    return clips.present[task.given] & clips.present[task.wanted]


# Clips that a mean is of (see `tokenizers.decode_mean`), chosen on validation clips:
# few leave a path's turns to chance, and of RGB the mean of vectors is as good.
DRAWS = {"gaze": 256, "camera": 256, "depth": 64, "rgb": 0}
# Measure -> (unit, whether more is better).
MEASURES = {
    "gaze": {"MSE": ("", False)},
    "camera": {"ATE": ("m", False), "RTE": ("m", False), "RRE": ("deg", False)},
    "depth": {"AbsRel": ("", False), "delta < 1.25": ("", True)},
    "rgb": {"PSNR": ("dB", True), "SSIM": ("", True)},
}

# Keys that tables and legends tell more of.
_CALLED = {"gaze": "gaze proxy", "ATE": "ATE without alignment"}


def called(name: str) -> str:
    """A key for people: "rgb -> gaze" -> "rgb -> gaze proxy"."""
    for key, said in _CALLED.items():
        name = name.replace(key, said)
    return name


def _gaze(estimate: Any, truth: Any) -> tuple[Any, ...]:
    return (evaluation.gaze_mse(estimate, truth),)


def _camera(estimate: Any, truth: Any) -> tuple[Any, ...]:
    # As it is: poses are relative to the first, so that nothing is left to align.
    steps = evaluation.relative_errors(estimate, truth)
    return evaluation.ate(estimate, truth, alignment="none"), steps.rte, steps.rre


def _depth(estimate: Any, truth: Any) -> tuple[Any, ...]:
    return tuple(evaluation.depth_errors(estimate, truth))


def _rgb(estimate: Any, truth: Any) -> tuple[Any, ...]:
    estimate, truth = (x.astype(jnp.float32) for x in (estimate, truth))
    similar = jax.lax.map(lambda pair: evaluation.ssim(*pair), (estimate, truth))
    return evaluation.psnr(estimate, truth), jnp.mean(similar)


_SCORES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "gaze": jax.jit(jax.vmap(_gaze)),
    "camera": jax.jit(jax.vmap(_camera)),
    "depth": jax.jit(jax.vmap(_depth)),
    "rgb": jax.jit(lambda a, b: jax.lax.map(lambda pair: _rgb(*pair), (a, b))),
}


def score(kind: str, estimate: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Each clip's measures [N], by the names of `MEASURES`; NaN without any truth."""
    values = _SCORES[kind](estimate, truth)
    return {name: np.asarray(v) for name, v in zip(MEASURES[kind], values, strict=True)}


def constant(kind: str, clips: Clips, count: int) -> np.ndarray:
    """The mean of the training clips, for everyone: in log for depth.

    A pixel whose depth is never known has the median over all pixels.
    """
    x = clips.arrays[kind][clips.present[kind]]
    if kind == "camera":
        mean = poses.from_vector(poses.to_vector(x).mean(axis=0))
    elif kind == "gaze":
        mean = np.nanmean(x.reshape(-1, 2), axis=0)[None]
        mean = np.broadcast_to(mean, x.shape[1:])
    elif kind == "depth":
        # A pixel's own, over clips and frames.
        log = np.log(np.maximum(x, 1e-3), dtype=np.float32)
        known = np.isfinite(log)
        total = np.sum(log, axis=(0, 1), where=known, dtype=np.float64)
        times = known.sum(axis=(0, 1))
        mean = np.exp(total / np.maximum(times, 1))
        mean = _filled(np.where(times > 0, mean, np.nan))[None]
        mean = np.broadcast_to(mean, x.shape[1:])
    else:
        mean = x.mean(axis=(0, 1), dtype=np.float64)[None]
        mean = np.broadcast_to(np.rint(mean).astype(x.dtype), x.shape[1:])
    return np.broadcast_to(mean[None], (count, *x.shape[1:])).astype(x.dtype)


def least_abs_rel(clips: Clips, count: int, every: int = 8) -> np.ndarray:
    """Depth of least |x - d| / d over training clips, a pixel's own: [count, F, H, W].

    That is a median weighted by 1 / d; of each `every`-th frame. A pixel that is never
    known has the median over all pixels, as in `constant`.
    """
    x = clips.arrays["depth"][clips.present["depth"]]
    d = np.sort(x[:, ::every].reshape(-1, *x.shape[2:]), axis=0)  # NaN last
    weight = np.cumsum(np.nan_to_num(1 / np.maximum(d, 1e-3)), axis=0, dtype=np.float64)
    middle = np.argmax(weight >= weight[-1:] / 2, axis=0)
    median = _filled(np.take_along_axis(d, middle[None], axis=0))  # [1, H, W]
    return np.broadcast_to(median[None], (count, *x.shape[1:])).astype(x.dtype)


def _filled(values: np.ndarray) -> np.ndarray:
    """Values of pixels, the median of all in place of NaN."""
    return np.where(np.isfinite(values), values, np.nanmedian(values))


def copy_first(kind: str, truth: np.ndarray) -> np.ndarray:
    """The *true* first value of the target, held: no motion. No model is given that.

    The first known one of a gaze, and of each pixel of a depth; where a pixel has none
    in the whole clip, the clip's median.
    """
    if kind in ("rgb", "camera"):
        return np.broadcast_to(truth[:, :1], truth.shape).copy()
    known = np.isfinite(truth)
    at = np.argmax(known.all(axis=-1, keepdims=True) if kind == "gaze" else known, 1)
    held = np.take_along_axis(truth, at[:, None], axis=1)[:, 0]
    if kind == "depth":
        held = [
            np.where(np.isfinite(h), h, np.nanmedian(x))
            for h, x in zip(held, truth, strict=True)
        ]
        held = np.stack(held)
    return np.broadcast_to(held[:, None], truth.shape).copy()


class Model(NamedTuple):
    """A pretrained model and what reads and writes its tokens."""

    params: Any
    modalities: Modalities
    shape: Shape
    tokenizers: Mapping[str, Tokenizer]


def rows_in_batches(count: int, batch: int) -> Iterator[np.ndarray]:
    """Rows of `count` clips, so many at a time: one program for all.

    The last batch is filled up by its last clip; [:count] of what is made is right.
    """
    for start in range(0, count, batch):
        yield np.minimum(np.arange(start, start + min(batch, count)), count - 1)


def predict(
    model: Model,
    tokens: Tokens,
    given: tuple[str, ...],
    targets: Mapping[str, int],
    *,
    seed: int = 0,
    batch: int = 32,
    **sampling: Any,
) -> dict[str, np.ndarray]:
    """Codes of the targets by name [N, *grid], given some of the clips' tokens.

    Tokens that stand for nothing known are not shown, as in training.
    `sampling`: as `egom2p_generation.generate` has it.
    """
    codes = mods.unflatten(model.modalities, tokens.ids)
    count, found = len(tokens.ids), []
    for i, rows in enumerate(rows_in_batches(count, batch)):
        found.append(
            egom2p_generation.generate(
                model.params,
                {name: codes[name][rows] for name in given},
                targets,
                known=tokens.known[rows],
                modalities=model.modalities,
                shape=model.shape,
                key=jax.random.fold_in(jax.random.key(seed), i),
                **sampling,
            )
        )
    return {name: np.concatenate([f[name] for f in found])[:count] for name in targets}


def means(
    model: Model,
    tokens: Tokens,
    given: tuple[str, ...],
    wanted: str,
    *,
    batch: int = 16,
    seed: int = 0,
) -> np.ndarray:
    """The mean of what the model believes of a modality, in the data's units [N, ...].

    One pass: each token by itself, given some of the clips' tokens, of which those that
    stand for nothing known are not shown; then the mean of `DRAWS` clips of a seed.
    """
    codes = mods.unflatten(model.modalities, tokens.ids)
    count, found = len(tokens.ids), []
    for rows in rows_in_batches(count, batch):
        p = egom2p_generation.probabilities(
            model.params,
            {name: codes[name][rows] for name in given},
            [wanted],
            known=tokens.known[rows],
            modalities=model.modalities,
            shape=model.shape,
        )
        tokenizer = model.tokenizers[wanted]
        found.append(
            tokenizers.decode_mean(tokenizer, p[wanted], draws=DRAWS[wanted], seed=seed)
        )
    return np.concatenate(found)[:count]


def of_model(
    model: Model, task: Task, tokens: Tokens, *, seed: int, **sampling: Any
) -> dict[str, np.ndarray]:
    """What the model makes of clips, by method, in the data's units [N, ...].

    "sample" is one clip that could be, decoded in the task's steps; "mean" of `means`;
    "shown another clip" is that mean for a clip half the list away: a model that uses
    what it is shown does worse by it.
    """
    other = tokens.at(np.roll(np.arange(len(tokens.ids)), len(tokens.ids) // 2))
    codes = predict(
        model,
        tokens,
        (task.given,),
        {task.wanted: task.steps},
        seed=seed,
        **sampling,
    )
    return {
        "EgoM2P, mean": means(model, tokens, (task.given,), task.wanted, seed=seed),
        "EgoM2P, shown another clip": means(
            model, other, (task.given,), task.wanted, seed=seed
        ),
        "EgoM2P, sample": tokenizers.decode(
            model.tokenizers[task.wanted], codes[task.wanted]
        ),
    }


def baselines(
    task: Task, tokenizer: Tokenizer, train: Clips, truth: np.ndarray, codes: np.ndarray
) -> dict[str, np.ndarray]:
    """What needs no model, by method [N, ...]; `codes` are the truth's."""
    best = {}
    if task.wanted == "depth":
        best["constant of least AbsRel"] = least_abs_rel(train, len(truth))
    return {
        "constant": constant(task.wanted, train, len(truth)),
        **best,
        "first held": copy_first(task.wanted, truth),
        "its own tokens": tokenizers.decode(tokenizer, codes),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encoded(
    modalities: Modalities, shape: Shape, params: Any, ids: Any, position: Any
) -> Any:
    """The mean of the encoder's output over tokens: [N, n] each -> [N, D]."""
    net, valid = egom2p.EgoM2P(modalities, shape), jnp.ones(ids.shape, bool)
    out = net.apply({"params": params}, ids, position, valid, method="encode")
    return jnp.mean(out, axis=1)


def features(model: Model, codes: np.ndarray) -> np.ndarray:
    """Features of our own [N, D] of RGB tokens: the mean of the encoder's output."""
    ids, _ = mods.flatten(model.modalities, {"rgb": codes})
    position = mods.positions(model.modalities, ["rgb"])
    return np.concatenate(
        [
            np.asarray(
                _encoded(
                    model.modalities,
                    model.shape,
                    model.params,
                    part,
                    np.tile(position, (len(part), 1)),
                )
            )
            for part in np.array_split(ids[:, position], max(1, len(ids) // 64))
        ]
    )


class Interval(NamedTuple):
    """A mean over clips and its 95 % interval."""

    mean: float
    low: float
    high: float
    clips: int  # that have a value


def bootstrap(values: np.ndarray, *, replicates: int = 1000, seed: int = 0) -> Interval:
    """Mean over clips [N] that have a value, and its interval over these clips."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(*(float("nan"),) * 3, 0)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(values), (replicates, len(values)))
    low, high = evaluation.interval(values[rows].mean(axis=1))
    return Interval(float(values.mean()), low, high, len(values))


def decoded(
    tokenizer_of: Mapping[str, Tokenizer], codes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Codes by name as clips, in the data's units."""
    return {k: tokenizers.decode(tokenizer_of[k], c) for k, c in codes.items()}
