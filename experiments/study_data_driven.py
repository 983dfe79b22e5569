"""Merges that look at unlabelled rows: Fisher, RegMean, RegMean++, AdaMerging(++).

They are given `apply_fn(tensors, inputs) -> logits` on tensors by Hugging Face names,
so that statistics fit the checkpoints, and nothing about the architecture. Inputs bring
their task's head along: one function, and so one compiled program, serves all tasks
with as many sentences a row.

Legend: B rows, S sentences a row, L tokens, F features, T tasks.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.study_tasks import Head, row_features
from multitask_jax import merging, tree
from multitask_jax.data import tokens
from multitask_jax.models import bert

# Rows that have no streamed form.
IN_MEMORY = (
    "RegMean++",
    "AdaMerging, by task",
    "AdaMerging, by leaf",
    "AdaMerging++, by leaf",
)
OFF_DIAGONAL = 0.9  # of RegMean++, as the paper has it
Tensors = dict[str, Any]
Inputs = dict[str, Any]  # ids and mask [B, S, L], kernel [B, F, classes] and bias


@functools.cache
def apply_fn(shape: bert.Shape) -> Callable[[Tensors, Inputs], jax.Array]:
    """Logits [B, classes] of an encoder of that shape, by its tensors; compiled."""

    @jax.jit
    def apply(tensors: Tensors, inputs: Inputs) -> jax.Array:
        params, _ = bert.from_hugging_face(tensors, shape=shape)
        x = row_features(params, inputs, shape)
        return jnp.einsum("bf,bfc->bc", x, inputs["kernel"]) + inputs["bias"]

    return apply


def unlabelled(
    encoded: Mapping[str, tokens.Encoded],
    heads: Mapping[str, Head],
    *,
    rows: int,
    batch_size: int,
    length: int,
) -> dict[str, list[Inputs]]:
    """Batches of some rows of each task, all of one shape, of whole sixteens.

    Drawn, since rows may be sorted by label. Sentences are cut to `length` tokens (the
    last of them stays at the end).
    """
    out = {}
    for name, e in encoded.items():
        some = np.random.default_rng(0).permutation(len(e.ids))[:rows]
        cut = tokens.Encoded(
            [
                tuple(
                    s if len(s) <= length else np.append(s[: length - 1], s[-1])
                    for s in row
                )
                for row in (e.ids[i] for i in some)
            ]
        )
        count = len(cut.ids) // 16 * 16
        size = math.gcd(count, batch_size)
        padded = [
            tokens.pad(cut, np.arange(i, i + size), buckets=(length,))
            for i in range(0, count, size)
        ]
        head = {
            k: np.broadcast_to(x, (size, *x.shape))
            for k, x in heads[name]._asdict().items()
        }
        out[name] = [{"ids": p.ids, "mask": p.mask, **head} for p in padded]
    return out


def real_tokens(inputs: Inputs) -> jax.Array:
    """1 for a token, 0 for padding, which Gram matrices are not to count: [B S L]."""
    return inputs["mask"].reshape(-1)


def save_statistics(
    folder: Path,
    shape: bert.Shape,
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
    apply = apply_fn(shape)
    files: dict[str, list[str]] = {"gram": [], "fisher": []}
    for i, name in enumerate(batches):
        paths = {kind: folder / name / f"{kind}.safetensors" for kind in files}
        for kind, path in paths.items():
            files[kind].append(str(path))
        if all(path.exists() for path in paths.values()):
            continue
        params = load(name)
        if not paths["gram"].exists():
            found = merging.gram_matrices(
                apply, params, batches[name], rows=real_tokens
            )
            merging.save_statistics(
                paths["gram"], found, examples=sum(map(_rows, batches[name]))
            )
        if not paths["fisher"].exists():
            few = _first(batches[name], fisher_rows)
            keys = jax.random.split(jax.random.key(1000 * seed + i), len(few))
            pairs = [
                (b, jax.random.categorical(key, apply(params, b)))
                for b, key in zip(few, keys, strict=True)
            ]
            fisher = merging.fisher_diagonal(
                apply, params, pairs, labels="given", examples_at_once=4
            )
            merging.save_statistics(
                paths["fisher"], tree.flatten(fisher), examples=sum(map(_rows, few))
            )
    return {kind: ",".join(made) for kind, made in files.items()}


def _rows(inputs: Inputs) -> int:
    return len(inputs["ids"])


def _first(batches: Sequence[Inputs], rows: int) -> list[Inputs]:
    """The first rows of batches, so many in all."""
    out = []
    for b in batches:
        few = min(rows - sum(map(_rows, out)), _rows(b))
        if few > 0:
            out.append({k: v[:few] for k, v in b.items()})
    return out


def in_memory(
    shape: bert.Shape,
    base: Tensors,
    models: Mapping[str, Tensors],
    large: Mapping[str, Sequence[Inputs]],
    batches: Mapping[str, Sequence[Inputs]],
    *,
    steps: int,
) -> dict[str, Callable[[], Tensors]]:
    """`IN_MEMORY`, each a function that merges.

    RegMean++ is given the `large` batches, AdaMerging steps on `batches`.
    """
    names, f = list(models), apply_fn(shape)
    many = [models[n] for n in names]
    data = [list(batches[n]) for n in names]
    adam = optax.adam(1e-2)  # the paper's 1e-3 takes 500 steps and more

    def regmean_plus_plus() -> Tensors:
        return merging.regmean_plus_plus(
            f,
            many,
            [list(large[n]) for n in names],
            off_diagonal=OFF_DIAGONAL,
            rows=real_tokens,
        )

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

    by_task, by_leaf = (functools.partial(adamerging, x) for x in ("task", "leaf"))
    made = (regmean_plus_plus, by_task, by_leaf, adamerging_plus_plus)
    return dict(zip(IN_MEMORY, made, strict=True))
