"""Masked pretraining on tokens: masks are drawn within the jitted step.

Legend: B batch, N clips, L tokens of a clip, M modalities.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.egom2p_tokens import Tokens
from multitask_jax import sharding, training
from multitask_jax.masked import modalities as mods
from multitask_jax.masked.budgets import Budgets
from multitask_jax.masked.masks import (
    Masks,
    dirichlet_masks,
    masks_of,
    uniform_masks,
)
from multitask_jax.masked.modalities import Modalities
from multitask_jax.masked.tokenizers import Tokenizer, vocabulary
from multitask_jax.models import egom2p
from multitask_jax.models.egom2p import Shape
from multitask_jax.training import writers

Array = jax.Array
_AS_LARGE_AS_PLACES = 0.8  # entries of embeddings; those of sines and cosines have .7


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one run of training."""

    steps: int = 4000
    batch: int = 8
    rate: float = 7e-4  # the peak
    inputs: int = 256  # slots for what is shown
    targets: int = 128  # slots for what is asked
    masking: Literal["dirichlet", "uniform"] = "dirichlet"
    focus: float = 0.75  # of Dirichlet masks, see `dirichlet_budgets`, as the next
    fill: bool = True
    task: tuple[str, str] | None = None  # what is shown and asked alone: a specialist's
    evaluate_every: int = 250
    seed: int = 0


def draw_masks(
    key: Array, present: Array, modalities: Modalities, settings: Settings
) -> Masks:
    """Masks of a batch, each clip's its own; present: bool [B, M]."""
    if settings.task is not None:
        return task_masks(key, len(present), modalities, settings)
    one = {
        "dirichlet": functools.partial(
            dirichlet_masks, focus=settings.focus, fill=settings.fill
        ),
        "uniform": uniform_masks,
    }[settings.masking]
    one = functools.partial(
        one,
        modalities=modalities,
        inputs=settings.inputs,
        targets=settings.targets,
    )
    return jax.vmap(one)(jax.random.split(key, len(present)), present)


def task_masks(
    key: Array, count: int, modalities: Modalities, settings: Settings
) -> Masks:
    """Masks of `count` clips that show some of one modality and ask some of another."""
    given, wanted = mods.indices(modalities, settings.task)
    each, one = mods.lengths(modalities), np.arange(len(modalities))
    budgets = Budgets(
        jnp.asarray(np.where(one == given, np.minimum(each, settings.inputs), 0)),
        jnp.asarray(np.where(one == wanted, np.minimum(each, settings.targets), 0)),
    )
    draw = functools.partial(
        masks_of,
        budgets=budgets,
        modalities=modalities,
        inputs=settings.inputs,
        targets=settings.targets,
    )
    return jax.vmap(lambda key: draw(key))(jax.random.split(key, count))


def loss_fn(
    modalities: Modalities,
    shape: Shape,
    settings: Settings,
    mesh: Mesh | None = None,
) -> Callable[[Any, Tokens, Array], tuple[Array, Mapping[str, Array]]]:
    """(params, batch, key) -> (loss [], each modality's), for `training.make_step`."""
    layout = None
    if mesh is not None:
        layout = NamedSharding(mesh, PartitionSpec(mesh_layout(mesh)["batch_axis"]))

    def loss(params: Any, batch: Tokens, key: Array) -> tuple[Array, Any]:
        masks = draw_masks(key, batch.present, modalities, settings)
        masks = masks.of_known(batch.known)
        return egom2p.loss(
            params,
            batch.ids,
            masks,
            modalities=modalities,
            shape=shape,
            layout=layout,
        )

    return loss


def batches(
    clips: Any, size: int, seed: int, *, parts: int = 1
) -> Callable[[int], Any]:
    """Step -> batch: every epoch in an order of its own, what is left over dropped.

    Args:
      clips: `Tokens`, or what else has `ids` [N, L] and `at`.
      size: clips a batch, at most.
      seed: of the order.
      parts: what a mesh cuts a batch in.

    Raises:
      ValueError: there are no clips, or fewer than a batch, which parts do not divide.
    """
    count = len(clips.ids)
    if not count:
        raise ValueError("no training clip has what the training needs; add some")
    if count < size and count % parts:
        raise ValueError(
            f"--batch: got {size}, but there are only {count} training clips; expected"
            f" a multiple of {parts}, which --mesh cuts a batch in, of {count} at most;"
            " or pass a smaller --mesh"
        )
    if count < size:
        print(f"only {count} training clips: a batch is all of them, not {size}")
        size = count
    each = count // size

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def at(step: int) -> Any:
        epoch, i = divmod(step, each)
        return clips.at(order(epoch)[i * size : (i + 1) * size])

    return at


def from_codebooks(
    tokenizer_of: Mapping[str, Tokenizer], seed: int
) -> Callable[[Any], Any]:
    """`pretrain`'s start: `with_codebooks` of a run's seed, then `attend_alike`."""
    key = jax.random.key(seed)
    return lambda params: egom2p.attend_alike(with_codebooks(params, tokenizer_of, key))


def with_codebooks(
    params: Any, tokenizer_of: Mapping[str, Tokenizer], key: Array
) -> Any:
    """Embeddings and head begin as random projections of the codes' own vectors.

    Codes that look alike are alike from the start, which few clips can't teach, and
    embeddings are as large as places, beside which a learned start's are nothing (our
    choices at this size; the paper begins at random). Kinds without a codebook are
    made larger alone.
    """
    width = params["token_embedding"].shape[1]
    first, head = 0, params["head"]
    embeddings = params["token_embedding"] * (_AS_LARGE_AS_PLACES / 0.02)
    for i, tokenizer in enumerate(tokenizer_of.values()):
        if tokenizer.config.quantizer == "vq":
            # By the host: restored ones lie on one device, parameters on a mesh's.
            codes = jnp.asarray(np.asarray(tokenizer.variables["codebook"].codes))
            codes = codes / jnp.linalg.norm(codes, axis=1, keepdims=True)
            keys = jax.random.split(jax.random.fold_in(key, i))
            rows = slice(first, first + len(codes))
            into = jax.random.normal(keys[0], (codes.shape[1], width))
            into *= _AS_LARGE_AS_PLACES  # codes are of length 1
            out = jax.random.normal(keys[1], (width, codes.shape[1])) * 0.02
            embeddings = embeddings.at[rows].set(codes @ into)
            head = head.at[:, rows].set(out @ codes.T)
        first += vocabulary(tokenizer.config)
    return {**params, "token_embedding": embeddings, "head": head}


class Pretrained(NamedTuple):
    """What training made."""

    params: Any  # the best on validation
    history: list[dict[str, float]]
    waiting: float  # at most, for batches: a share of training's time, see `fit`


def pretrain(
    tokens: Tokens,
    validation: Tokens,
    modalities: Modalities,
    shape: Shape,
    settings: Settings,
    *,
    workdir: Path | None = None,
    start: Callable[[Any], Any] = lambda params: params,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Pretrained:
    """Trains from `start` of random parameters, or from workdir's newest checkpoint.

    AdamW with betas (.9, .95), weight decay .05, warm-up, cosine and gradients cut to
    norm 1, as the paper; the rate is this size's own.
    """
    key = jax.random.key(settings.seed)
    init = functools.partial(egom2p.init, modalities=modalities, shape=shape)
    where = None
    if mesh is not None:  # no device has to hold them whole
        like, rules = jax.eval_shape(init, key), mesh_layout(mesh)["rules"]
        where = sharding.tree_shardings(like, mesh, rules)
    return fit(
        loss_fn(modalities, shape, settings, mesh),
        start(jax.jit(init, out_shardings=where)(key)),
        batches(tokens, settings.batch, settings.seed, parts=batch_parts(mesh)),
        _judge(loss_fn(modalities, shape, settings), validation, settings.task),
        settings,
        about=_about(settings, shape, modalities, tokens, validation),
        workdir=workdir,
        mesh=mesh,
        progress=progress,
    )


def fit(
    loss: Callable[..., tuple[Array, Mapping[str, Array]]],
    params: Any,
    batch_at: Callable[[int], Any],
    judge: Callable[[Any], Mapping[str, Array]],
    settings: Settings,
    *,
    about: Mapping[str, Any],
    workdir: Path | None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Pretrained:
    """Trains by `pretrain`'s recipe, whatever the loss; the best by `judge`'s "score".

    Args:
      loss: (params, batch, key) -> (loss [], metrics).
      params: to start from.
      batch_at: step -> batch.
      judge: params -> scalars of validation.
      settings: steps, rate, seed and intervals count here.
      about: what a checkpoint must agree on.
      workdir: of checkpoints and metrics.jsonl; without it, neither.
      mesh: to train on.
      progress: a bar.
    """
    optimizer = training.adamw(
        settings.rate, steps=settings.steps, weight_decay=0.05, clip=1.0, b2=0.95
    )
    step = training.make_step(
        loss, optimizer, mesh=mesh, **({} if mesh is None else mesh_layout(mesh))
    )
    found = training.fit(
        step,
        training.init_state(params, optimizer, jax.random.key(settings.seed)),
        batch_at,
        steps=settings.steps,
        workdir=workdir,
        config=about,
        eval_fn=judge,
        eval_every=settings.evaluate_every,
        best_by="score",
        checkpoint_every=settings.evaluate_every if workdir else None,
        log_every=min(50, settings.evaluate_every),
        writer=None if workdir is None else writers.jsonl(workdir / "metrics.jsonl"),
        progress=progress,
    )
    if found.best is None:
        raise FloatingPointError("no validation loss was finite; lower --rate")
    return Pretrained(found.best.params, found.history, found.waiting)


def mesh_layout(mesh: Mesh) -> dict[str, Any]:
    """Rules and the batch's axes for whichever of data, fsdp and tensor a mesh has.

    Raises:
      ValueError: it has another axis, or none for the batch.
    """
    names = set(mesh.axis_names)
    batch = tuple(n for n in ("data", "fsdp") if n in names)
    if names - {"data", "fsdp", "tensor"} or not batch:
        raise ValueError(
            f"mesh: got axes {', '.join(mesh.axis_names)}; expected some of data, fsdp"
            " and tensor, the batch being cut over the first two"
        )
    rules = egom2p.sharding_rules(
        "fsdp" if "fsdp" in names else None, "tensor" if "tensor" in names else None
    )
    return {"batch_axis": batch, "rules": rules}


def batch_parts(mesh: Mesh | None) -> int:
    """What a mesh cuts a batch in; 1 without one."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape[name] for name in mesh_layout(mesh)["batch_axis"])


def spread(count: int, most: int) -> np.ndarray:
    """Rows of so many at most, evenly among `count`: clips of a map are neighbours."""
    n = min(count, most)
    return np.arange(n) * count // n


def _judge(
    loss: Any, validation: Tokens, task: tuple[str, str] | None
) -> Callable[[Any], dict[str, Any]]:
    """Validation losses by masks that never change; "score" is the loss's negative.

    With a task the loss is that of its target: others would only thin it.

    Raises:
      ValueError: nothing is known of the clips; or, by the judge, nothing was asked.
    """
    evaluate, count = jax.jit(loss), len(validation.ids)
    if not validation.known.any():
        raise ValueError("no validation clip has what the training needs; add some")
    size = min(64, count)
    some = spread(count, count // size * size).reshape(-1, size)

    def judge(params: Any) -> dict[str, Any]:
        rows = [
            evaluate(params, validation.at(part), jax.random.key(i))
            for i, part in enumerate(some)
        ]
        # A modality that no clip was asked for has no loss, here as in training.
        each = {
            name: np.array([x[name] for _, x in rows], float) for name in rows[0][1]
        }
        means = {
            name: np.nanmean(x) for name, x in each.items() if not np.isnan(x).all()
        }
        if not means:  # the loss is then 0, whatever the parameters
            raise ValueError("validation clips were asked for nothing; add some")
        if task and task[1] not in means:
            raise ValueError(f"no validation clip has anything known of its {task[1]}")
        total = means[task[1]] if task else np.mean([x for x, _ in rows])
        return {"score": -total, "loss": total, **means}

    return judge


def _about(
    settings: Settings,
    shape: Shape,
    modalities: Modalities,
    tokens: Tokens,
    validation: Tokens,
) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it."""
    return {
        **dataclasses.asdict(settings),
        **shape._asdict(),
        "modalities": repr(modalities),
        "tokens": [int(t.ids.sum(dtype=np.int64)) for t in (tokens, validation)],
        "clips": [len(tokens.ids), len(validation.ids)],
        **({"judged": "by the task"} if settings.task else {}),
    }
