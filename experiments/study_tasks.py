"""Tasks of the merging study: an encoder under frozen linear heads, and its accuracy.

A row's features are its sentence's embedding, scaled to length 1, or, of two sentences
u and v, (u, v, |u - v|, u v) (Conneau et al. 2017, arXiv 1705.02364). The code knows no
task by name.

Legend: T tasks, N rows, S sentences a row, D width of the encoder, F features.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.data import text_tasks, tokens
from multitask_jax.data.text_tasks import Rows, Task
from multitask_jax.models import bert

# The same rows are embedded hundreds of times: a program for every four tokens pays.
POOL_LENGTHS = (*range(4, 64, 4), *tokens.BUCKETS[tokens.BUCKETS.index(64) :])
NEVER = -1e9  # the logit of a class that only pads a head


class Head(NamedTuple):
    """logits = features @ kernel + bias, padded to the classes of the largest task."""

    kernel: np.ndarray  # [4 D, classes]; rows beyond F are 0
    bias: np.ndarray  # [classes]


class Pool(NamedTuple):
    """All sentences of some rows of several tasks, in batches of like length."""

    batches: list[tokens.Batch]  # S = 1
    places: dict[str, np.ndarray]  # task -> [N, S], of each sentence in the pool
    labels: dict[str, np.ndarray]  # task -> [N]


class Score(NamedTuple):
    """Of a task's rows."""

    accuracy: float
    # Mean log probability of the labels in nats, of classes that the head knows.
    likelihood: float


def features(u: Any) -> Any:
    """Embeddings [..., S, D] of a row's sentences -> features [..., 4 D].

    One sentence fills the first D, the others are 0, so that heads have one size.
    """
    u = u / jnp.maximum(jnp.linalg.norm(u, axis=-1, keepdims=True), 1e-12)
    first = u[..., 0, :]
    if u.shape[-2] == 1:
        zeros = jnp.zeros((*first.shape[:-1], 3 * first.shape[-1]), first.dtype)
        return jnp.concatenate([first, zeros], axis=-1)
    second = u[..., 1, :]
    parts = [first, second, jnp.abs(first - second), first * second]
    return jnp.concatenate(parts, axis=-1)


def row_features(params: Any, batch: Mapping[str, Any], shape: bert.Shape) -> jax.Array:
    """Features [N, 4 D] of a batch: ids and mask [N, S, L]."""
    n, s, l = batch["ids"].shape
    flat = (batch[key].reshape(n * s, l) for key in ("ids", "mask"))
    return features(bert.embed(params, *flat, shape=shape).reshape(n, s, -1))


def logits(params: Any, batch: Mapping[str, Any], shape: bert.Shape) -> jax.Array:
    """Logits [N, classes] of a batch: ids, mask, and a head's kernel and bias."""
    return row_features(params, batch, shape) @ batch["kernel"] + batch["bias"][None]


def make_pool(
    encoded: Mapping[str, tokens.Encoded],
    rows: Mapping[str, Rows],
    *,
    batch_size: int = 64,
) -> Pool:
    """Sorts all sentences of `rows`, by task, by length; `encoded` are their tokens."""
    sentences = [(s,) for name in rows for row in encoded[name].ids for s in row]
    places, start = {}, 0
    for name, r in rows.items():
        shape = (len(r.labels), len(r.sentences[0]))
        size = shape[0] * shape[1]
        places[name] = np.arange(start, start + size).reshape(shape)
        start += size
    batches = tokens.in_order(
        tokens.Encoded(sentences), batch_size, buckets=POOL_LENGTHS
    )
    return Pool(batches, places, {name: r.labels for name, r in rows.items()})


def floats_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What a merge is about: the tensors of floats."""
    return {
        k: x
        for k, x in tensors.items()
        if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    }


class Evaluator:
    """Accuracies of encoders on pools; programs are compiled once a length."""

    def __init__(self, shape: bert.Shape):
        self.shape = shape
        self._embed = jax.jit(functools.partial(bert.embed, shape=shape))
        self._convert = jax.jit(
            lambda tensors: bert.from_hugging_face(tensors, shape=shape)[0]
        )
        self._rounded = jax.jit(functools.partial(bert.rounded, shape=shape))

    def params(self, tensors: Mapping[str, Any]) -> Any:
        """Parameters on the device from tensors by Hugging Face names."""
        return self._convert(floats_of(tensors))

    def embed(self, params: Any, pool: Pool) -> np.ndarray:
        """Embeddings [sentences, D] in the pool's own order."""
        params = self._rounded(params)
        # A list: all batches are under way before the first result is waited for.
        out = [self._embed(params, b.ids[:, 0], b.mask[:, 0]) for b in pool.batches]
        return tokens.by_row(pool.batches, out)

    def features(self, params: Any, pool: Pool) -> dict[str, np.ndarray]:
        """Features [N, 4 D] of each task's rows."""
        u = self.embed(params, pool)
        return {name: np.asarray(features(u[p])) for name, p in pool.places.items()}

    def scores(
        self, params: Any, heads: Mapping[str, Head], pool: Pool
    ) -> dict[str, Score]:
        """How each task's rows are classified through its own head."""
        out = {}
        for name, x in self.features(params, pool).items():
            z = x @ heads[name].kernel + heads[name].bias
            labels = pool.labels[name]
            z = z - z.max(axis=-1, keepdims=True)
            right = z[np.arange(len(z)), labels]
            each = right - np.log(np.exp(z).sum(axis=-1))
            # One that no training row had is wrong under every candidate.
            known = heads[name].bias[labels] > NEVER
            likelihood = np.mean(each[known]) if known.any() else 0.0
            accuracy = np.mean(np.argmax(z, axis=-1) == labels)
            out[name] = Score(float(accuracy), float(likelihood))
        return out

    def accuracies(
        self, params: Any, heads: Mapping[str, Head], pool: Pool
    ) -> dict[str, float]:
        """Share of each task's rows that are classified right, through its own head."""
        found = self.scores(params, heads, pool)
        return {name: score.accuracy for name, score in found.items()}

    def traces(self) -> int:
        """How many programs were compiled: one a length of batch."""
        return self._embed._cache_size()


def probe(
    x: np.ndarray,
    labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    *,
    classes: int,
) -> Head:
    """A logistic regression on frozen features [N, F]: the task's head.

    Its strength of regularisation is chosen on validation rows.
    """
    from sklearn.linear_model import LogisticRegression

    used = np.flatnonzero(np.any(x != 0, axis=0))
    fits = [
        LogisticRegression(C=c, max_iter=2000).fit(x[:, used], labels)
        for c in (0.3, 1.0, 3.0, 10.0)
    ]
    scores = [f.score(validation[:, used], validation_labels) for f in fits]
    best = fits[int(np.argmax(scores))]
    weight, bias = best.coef_.T, best.intercept_
    if weight.shape[1] == 1:  # two classes: the logit of the second one
        weight = np.concatenate([np.zeros_like(weight), weight], axis=1)
        bias = np.concatenate([np.zeros_like(bias), bias])
    kernel = np.zeros((x.shape[1], classes), np.float32)
    kernel[used[:, None], best.classes_[None]] = weight
    padded = np.full(classes, NEVER, np.float32)
    padded[best.classes_] = bias
    return Head(kernel, padded)


def sample(task: Task, count: dict[str, int], *, seed: int) -> dict[str, Rows]:
    """Rows of each part of a task; training rows depend on the seed, others do not."""
    return {
        name: text_tasks.take(
            getattr(task, name), count[name], seed=seed if name == "train" else 0
        )
        for name in text_tasks.PARTS
    }
