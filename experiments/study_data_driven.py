"""Merges that look at unlabelled rows: Fisher, RegMean, RegMean++, AdaMerging(++).

They are given `apply_fn(tensors, inputs) -> logits` on tensors by Hugging Face names,
so that statistics fit the checkpoints, and nothing about the architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments.study_tasks import NEVER, Head, logits
from multitask_jax import merging, tree
from multitask_jax.data import tokens
from multitask_jax.models import bert

Tensors = dict[str, Any]
Inputs = dict[str, Any]  # ids and mask [B, S, L]


def apply_fns(
    heads: Mapping[str, Head], shape: bert.Shape
) -> dict[str, Callable[[Tensors, Inputs], jax.Array]]:
    """Logits of each task, of its own classes only."""

    def one(head: Head) -> Callable[[Tensors, Inputs], jax.Array]:
        classes = int(np.sum(head.bias > NEVER / 2))
        own = Head(head.kernel[:, :classes], head.bias[:classes])._asdict()

        def apply(tensors: Tensors, inputs: Inputs) -> jax.Array:
            params, _ = bert.from_hugging_face(tensors, shape=shape)
            return logits(params, inputs | own, shape)

        return apply

    return {name: one(head) for name, head in heads.items()}


def unlabelled(
    encoded: Mapping[str, tokens.Encoded], *, rows: int, batch_size: int, length: int
) -> dict[str, list[Inputs]]:
    """Batches of each task's first rows, all of one shape: one program a task.

    Sentences are cut to `length` tokens (the last of them stays at the end).
    """
    out = {}
    for name, e in encoded.items():
        cut = tokens.Encoded(
            [
                tuple(
                    s if len(s) <= length else np.append(s[: length - 1], s[-1])
                    for s in row
                )
                for row in e.ids[:rows]
            ]
        )
        starts = range(0, len(cut.ids) - batch_size + 1, batch_size)
        padded = [
            tokens.pad(cut, np.arange(i, i + batch_size), buckets=(length,))
            for i in starts
        ]
        out[name] = [{"ids": p.ids, "mask": p.mask} for p in padded]
    return out


def save_statistics(
    folder: Path,
    shape: bert.Shape,
    heads: Mapping[str, Head],
    load: Callable[[str], Tensors],
    batches: Mapping[str, Sequence[Inputs]],
    *,
    fisher_rows: int,
    seed: int,
) -> dict[str, str]:
    """Files of Gram matrices and Fisher diagonals beside each model, made once.

    `load` reads a task's model; it is not called where both files are there.

    Fisher's labels are drawn from the model's own predictions, one a row: an unbiased
    estimate of the expectation, at the price of one gradient a row.

    Returns:
      {"gram", "fisher"}: what --statistics takes.
    """

    # Heads are among the parameters, so that one program serves all tasks.
    def apply(params: Any, inputs: Inputs) -> jax.Array:
        encoder, _ = bert.from_hugging_face(params["encoder"], shape=shape)
        return logits(encoder, inputs | params["head"], shape)

    predict = jax.jit(apply)

    def save(path: Path, found: Any, examples: int) -> None:
        prefix = "encoder/"
        own = {
            k.removeprefix(prefix): x for k, x in found.items() if k.startswith(prefix)
        }
        merging.save_statistics(path, own, examples=examples)

    files: dict[str, list[str]] = {"gram": [], "fisher": []}
    for i, name in enumerate(batches):
        paths = {kind: folder / name / f"{kind}.safetensors" for kind in files}
        for kind, path in paths.items():
            files[kind].append(str(path))
        if all(path.exists() for path in paths.values()):
            continue
        params = {"encoder": load(name), "head": heads[name]._asdict()}
        size = len(batches[name][0]["ids"])
        if not paths["gram"].exists():
            found = merging.gram_matrices(apply, params, batches[name])
            save(paths["gram"], found, size * len(batches[name]))
        if not paths["fisher"].exists():
            few = batches[name][: max(1, fisher_rows // size)]
            keys = jax.random.split(jax.random.key(1000 * seed + i), len(few))
            pairs = [
                (b, jax.random.categorical(key, predict(params, b)))
                for b, key in zip(few, keys, strict=True)
            ]
            fisher = merging.fisher_diagonal(
                apply, params, pairs, labels="given", examples_at_once=4
            )
            save(paths["fisher"], tree.flatten(fisher), size * len(few))
    return {kind: ",".join(made) for kind, made in files.items()}


def in_memory(
    functions: Mapping[str, Callable[..., Any]],
    base: Tensors,
    models: Mapping[str, Tensors],
    batches: Mapping[str, Sequence[Inputs]],
    *,
    steps: int,
    off_diagonal: float,
) -> dict[str, Callable[[], Tensors]]:
    """Rows that have no streamed form, each a function that merges."""
    names = list(models)
    f = [functions[n] for n in names]
    many = [models[n] for n in names]
    data = [list(batches[n]) for n in names]
    adam = optax.adam(1e-2)  # the paper's 1e-3 takes 500 steps and more

    def regmean_plus_plus() -> Tensors:
        return merging.regmean_plus_plus(f, many, data, off_diagonal=off_diagonal)

    def adamerging(level: str) -> Tensors:
        found = merging.adamerging(
            f, base, many, data, level=level, steps=steps, optimiser=adam
        )
        return found.params

    def adamerging_plus_plus() -> Tensors:
        found = merging.adamerging_plus_plus(
            f, base, many, data, level="leaf", steps=steps, optimiser=adam
        )
        return found.params

    return {
        "RegMean++": regmean_plus_plus,
        "AdaMerging, by task": lambda: adamerging("task"),
        "AdaMerging, by leaf": lambda: adamerging("leaf"),
        "AdaMerging++, by leaf": adamerging_plus_plus,
    }
