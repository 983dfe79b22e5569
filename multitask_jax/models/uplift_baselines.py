"""What MTMT is compared with: learners of outcomes under several arms.

All are `Learner`s: functions of parameters, for standardised outcomes. `MODELS` has
them by name, MTMT and its ablations among them; gradient boosting, which is no function
of parameters, is `boosting`. "shared bottom" is MTMT with one expert that has as many
weights as MTMT's have together, so that it tells of sharing, not of size (all are used
for each person by both, so that the compute is the same, too).

Legend: B people, F features, A arms (0 is the control), O outcomes, D width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax.models import mtmt

Array = jax.Array
WIDTH = 64


class Learner(NamedTuple):
    """Three functions."""

    init: Callable[[Array, int], Any]  # (key, F) -> params
    loss: Callable[[Any, Array, Array, Array], Array]  # (params, x, arm, y) -> []
    predict: Callable[[Any, Array], Array]  # (params, x) -> [B, A, O]


class Mlp(nn.Module):
    """Dense layers with ReLUs between them; the last one is linear."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.widths):
            x = nn.Dense(width)(x if i == 0 else nn.relu(x))
        return x


class SingleNet(nn.Module):
    """S-learner (Kuenzel et al. 2019, arXiv 1706.03461): the arm is a feature."""

    arms: int
    outcomes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        net = Mlp((WIDTH, WIDTH, self.outcomes))
        told = jnp.eye(self.arms)
        return jnp.stack(
            [
                net(jnp.concatenate([x, jnp.tile(row[None], (len(x), 1))], axis=1))
                for row in told
            ],
            axis=1,
        )


class NetPerArm(nn.Module):
    """T-learner (Kuenzel et al. 2019): a network of its own for each arm."""

    arms: int
    outcomes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        nets = [Mlp((WIDTH, WIDTH, self.outcomes)) for _ in range(self.arms)]
        return jnp.stack([net(x) for net in nets], axis=1)


class TarNet(nn.Module):
    """TARNet (Shalit et al. 2017, arXiv 1606.03976): one trunk, a head for each arm."""

    arms: int
    outcomes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.relu(Mlp((WIDTH, WIDTH), name="trunk")(x))
        heads = [Mlp((WIDTH // 2, self.outcomes)) for _ in range(self.arms)]
        return jnp.stack([head(h) for head in heads], axis=1)


class DragonNet(nn.Module):
    """DragonNet (Shi et al. 2019, arXiv 1906.02120), for several arms.

    -> outcomes [B, A, O], the arms' log-probabilities [B, A], epsilon [A, O].
    """

    arms: int
    outcomes: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        h = nn.relu(Mlp((WIDTH, WIDTH), name="trunk")(x))
        heads = [Mlp((WIDTH // 2, self.outcomes)) for _ in range(self.arms)]
        shape = (self.arms, self.outcomes)
        epsilon = self.param("epsilon", nn.initializers.zeros, shape)
        g = jax.nn.log_softmax(nn.Dense(self.arms, name="propensity")(h))
        return jnp.stack([head(h) for head in heads], axis=1), g, epsilon


class Interaction(nn.Module):
    """After EFIN (Liu et al. 2023, arXiv 2306.00315): treatments meet single features.

    Each feature has an embedding x_f e_f; a treatment's embedding attends to them, and
    the effect follows from what it found. *Reconstruction*, for several arms.
    """

    arms: int
    outcomes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normal, d = nn.initializers.normal(1.0), WIDTH // 4
        embedding = self.param("features", normal, (x.shape[1], d))
        treatment = self.param("treatments", normal, (self.arms - 1, d))
        tokens = nn.relu(nn.Dense(d, name="token")(x[..., None] * embedding[None]))
        scores = jnp.einsum("bfd,ad->baf", tokens, treatment) / d**0.5
        found = jnp.einsum("baf,bfd->bad", jax.nn.softmax(scores), tokens)
        told = jnp.broadcast_to(treatment[None], found.shape)
        effect = Mlp((WIDTH // 2, self.outcomes), name="effect")(
            jnp.concatenate([found, found * told, told], axis=-1)
        )
        natural = Mlp((WIDTH, WIDTH, self.outcomes), name="natural")(x)[:, None]
        return jnp.concatenate([natural, natural + effect], axis=1)


def observed(outcomes: Array, arm: Array) -> Array:
    """Of the arm that each person had: [B, A, O] -> [B, O]."""
    one_hot = jax.nn.one_hot(arm, outcomes.shape[1])
    return jnp.einsum("bao,ba->bo", outcomes, one_hot)


def _squared(found: Array, y: Array) -> Array:
    return jnp.mean(jnp.sum((found - y) ** 2, axis=1))


def _plain(net: nn.Module) -> Learner:
    """A network of outcomes, by the squared error of the observed arm."""

    def predict(params: Any, x: Array) -> Array:
        return net.apply({"params": params}, x)

    def loss(params: Any, x: Array, arm: Array, y: Array) -> Array:
        return _squared(observed(predict(params, x), arm), y)

    return Learner(lambda k, f: net.init(k, jnp.zeros((1, f)))["params"], loss, predict)


def _dragonnet(arms: int, outcomes: int) -> Learner:
    net = DragonNet(arms, outcomes)

    def loss(params: Any, x: Array, arm: Array, y: Array) -> Array:
        q, g, epsilon = net.apply({"params": params}, x)
        one_hot = jax.nn.one_hot(arm, arms)
        log_g = jnp.sum(g * one_hot, axis=1)
        fit = observed(q, arm)
        # Targeted regularisation, their equation 3.2, for the observed arm.
        push = (one_hot @ epsilon) / jnp.maximum(jnp.exp(log_g), 0.01)[:, None]
        return _squared(fit, y) - jnp.mean(log_g) + _squared(fit + push, y)

    def predict(params: Any, x: Array) -> Array:
        return net.apply({"params": params}, x)[0]

    return Learner(lambda k, f: net.init(k, jnp.zeros((1, f)))["params"], loss, predict)


def _mtmt(arms: int, outcomes: int, *, flat: bool = False, **options: Any) -> Learner:
    tiers = (mtmt.flat if flat else mtmt.tiered)(arms)
    sizes = mtmt.Sizes(arms, outcomes, tiers, **options)
    return Learner(
        functools.partial(mtmt.init, sizes=sizes),
        functools.partial(mtmt.loss, sizes=sizes),
        functools.partial(mtmt.predict, sizes=sizes),
    )


# The authors' sizes: experts are ResNets, attention is 256 wide. Many times as slow.
FULL_SIZE = "MTMT-ResNet"
_FULL = {"expert": "resnet", "channels": 128, "queries": 16, "width": 256}
_MTMT = mtmt.Sizes._field_defaults
# As many weights as MTMT's experts have; but for biases and gates, equal in size.
_SHARED = {"experts": 1, "hidden": _MTMT["experts"] * _MTMT["hidden"]}
# Name -> (arms, outcomes) -> Learner.
MODELS: dict[str, Callable[[int, int], Learner]] = {
    "MTMT": _mtmt,
    "flat effects": functools.partial(_mtmt, flat=True),
    "MMoE without attention": functools.partial(_mtmt, attention=False),
    "shared bottom": functools.partial(_mtmt, **_SHARED),
    "S-learner": lambda a, o: _plain(SingleNet(a, o)),
    "T-learner": lambda a, o: _plain(NetPerArm(a, o)),
    "TARNet": lambda a, o: _plain(TarNet(a, o)),
    "DragonNet": _dragonnet,
    "interaction (EFIN-like)": lambda a, o: _plain(Interaction(a, o)),
    FULL_SIZE: functools.partial(_mtmt, **_FULL),
}
BOOSTED = ("GBM S-learner", "GBM T-learner")


def mtmt_sizes(name: str, arms: int, outcomes: int) -> mtmt.Sizes:
    """Of "MTMT" or `FULL_SIZE`, as `MODELS` has them."""
    options = {"MTMT": {}, FULL_SIZE: _FULL}[name]
    return mtmt.Sizes(arms, outcomes, mtmt.tiered(arms), **options)


def boosting(
    name: str,
    train: tuple[np.ndarray, np.ndarray, np.ndarray],
    x: np.ndarray,
    *,
    arms: int,
    binary: tuple[bool, ...],
    seed: int,
) -> np.ndarray:
    """scikit-learn's histogram gradient boosting: expected outcomes [N, A, O].

    Args:
      name: of `BOOSTED`: one model with the arm as a feature, or one a arm.
      train: x [M, F], arm [M], y [M, O].
      x: [N, F], of whom to predict.
      arms: A.
      binary: [O], outcomes that a classifier is for.
      seed: of its own validation part, where it stops early.
    """
    from sklearn.ensemble import (
        HistGradientBoostingClassifier,
        HistGradientBoostingRegressor,
    )

    xs, arm, ys = train
    options = {"max_leaf_nodes": 15, "learning_rate": 0.05, "max_iter": 100}
    options |= {"early_stopping": True, "random_state": seed}

    def fitted(x: np.ndarray, y: np.ndarray, is_binary: bool) -> Any:
        if not is_binary:
            return HistGradientBoostingRegressor(**options).fit(x, y).predict
        if min(y.sum(), len(y) - y.sum()) < 2:  # nobody had it, or all but one
            return lambda z: np.full(len(z), y.mean())
        model = HistGradientBoostingClassifier(**options).fit(x, y.astype(int))
        return lambda z: model.predict_proba(z)[:, 1]

    def told(x: np.ndarray, arm: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.eye(arms, dtype=x.dtype)[arm]], axis=1)

    out = np.zeros((len(x), arms, ys.shape[1]), np.float32)
    for o, is_binary in enumerate(binary):
        if name == "GBM S-learner":
            model = fitted(told(xs, arm), ys[:, o], is_binary)
            for a in range(arms):
                out[:, a, o] = model(told(x, np.full(len(x), a)))
            continue
        for a in range(arms):
            rows = arm == a
            out[:, a, o] = fitted(xs[rows], ys[rows, o], is_binary)(x)
    return out
