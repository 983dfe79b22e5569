"""MTMT: multi-treatment multi-task uplift.

What does each of several treatments add to each of several outcomes, for whom? Experts
read the features, a gate an outcome mixes them (MMoE) into u_k, from which the natural
response y0_k follows. Treatments ask: a treatment's embedding attends to the features'
representation, and gives its effect. Effects come in tiers: one of any treatment at
all, and increments of single arms,

    y_k(arm) = y0_k + sum_j tiers[arm, j] tau_jk

    loss = sum_k ((control ? y0_k : stop_gradient(y0_k)) + sum_j ... - y_k)^2

so that y0 is learned from the control arm alone, effects from the others. Outcomes are
standardised, binary ones as well: the squared error of 0 and 1 is a proper score, and
differences of probabilities add up, which those of logits would not.

Of the authors' code two things are not copied: treatments' tokens, which there are
normalised over an axis of length 1 (which leaves only a sign), are not normalised at
all, only the representations that they attend to, over their channels; and each outcome
has its own effect. Experts are small MLPs; "resnet" is the authors' ResNet-18 over the
vector of features, with LayerNorm in place of batch statistics (*reconstruction*) and
fewer strides where features are few. Their dropout of attention is left out.

Legend: B people, F features, A arms, J effects, O outcomes, E experts, L tokens of an
expert, C channels, M tokens of a treatment.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax import moe
from multitask_jax.data.uplift import tiers

Array = jax.Array
Tiers = tuple[tuple[float, ...], ...]
LEAST = 2  # tokens of a ResNet


class Sizes(NamedTuple):
    """All that is needed to rebuild a model."""

    arms: int
    outcomes: int
    tiers: Tiers  # [A, J]
    experts: int = 4
    expert: Literal["mlp", "resnet"] = "mlp"
    hidden: int = 64  # of an MLP expert
    tokens: int = 4  # L, of an MLP expert
    channels: int = 16  # C; of a ResNet, after its last stage
    queries: int = 4  # M
    width: int = 32  # of attention
    heads: int = 4
    attention: bool = True  # without it, effects follow from the mean of u_k


def tiered(arms: int) -> Tiers:
    """One effect of any treatment, and increments of all treated arms but the first.

    Before/after: 3 -> ((0, 0), (1, 0), (1, 1)).
    """
    return tuple(map(tuple, tiers(arms).tolist()))


def flat(arms: int) -> Tiers:
    """An effect of its own for each treated arm: 3 -> ((0, 0), (1, 0), (0, 1))."""
    return tuple(map(tuple, np.eye(arms, arms - 1, -1).tolist()))


class ResNet(nn.Module):
    """ResNet-18 along the features: [B, F] -> [B, L, C].

    L is ceil(F / 32) of many features; of few, halvings that would leave fewer than
    `LEAST` tokens are left out, for attention to one token is none (ours).
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def halving(x: Array) -> int:
            return 2 if -(-x.shape[1] // 2) >= LEAST else 1

        x = x[..., None]
        x = nn.Conv(self.channels // 8, (7,), (halving(x),), use_bias=False)(x)
        x = nn.relu(nn.LayerNorm()(x))
        x = nn.max_pool(x, (3,), (halving(x),), "SAME")
        for stage in range(4):
            for block in range(2):
                width = self.channels * 2**stage // 8
                stride = halving(x) if stage and not block else 1
                y = nn.Conv(width, (3,), (stride,), use_bias=False)(x)
                y = nn.relu(nn.LayerNorm()(y))
                y = nn.LayerNorm()(nn.Conv(width, (3,), use_bias=False)(y))
                if x.shape != y.shape:
                    x = nn.Conv(width, (1,), (stride,), use_bias=False)(x)
                x = nn.relu(x + y)
        return x


class Experts(nn.Module):
    """E experts of one kind: [B, F] -> [E, B, L, C]."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.sizes
        if s.expert == "resnet":
            each = nn.vmap(
                ResNet,
                in_axes=None,
                axis_size=s.experts,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            return each(s.channels, name="resnets")(x)
        out = s.tokens * s.channels
        up = self._layer("up", x.shape[1], s.hidden)
        down = self._layer("down", s.hidden, out)
        h = nn.relu(jnp.einsum("bf,efh->ebh", x, up["kernel"]) + up["bias"][:, None])
        y = jnp.einsum("ebh,eho->ebo", h, down["kernel"]) + down["bias"][:, None]
        return nn.relu(y).reshape(s.experts, len(x), s.tokens, s.channels)

    def _layer(self, name: str, rows: int, columns: int) -> dict[str, Array]:
        shape = (self.sizes.experts, rows, columns)
        init = nn.initializers.lecun_normal(batch_axis=0)
        return {
            "kernel": self.param(f"{name}_kernel", init, shape),
            "bias": self.param(
                f"{name}_bias", nn.initializers.zeros, (shape[0], columns)
            ),
        }


class Effect(nn.Module):
    """A treatment's effect on each outcome: keys [B, L, O C] -> [B, O]."""

    sizes: Sizes

    @nn.compact
    def __call__(self, keys: Array) -> Array:
        s = self.sizes
        if not s.attention:
            y = nn.relu(nn.Dense(s.width, name="hidden")(jnp.mean(keys, axis=1)))
            return nn.Dense(s.outcomes, name="out")(y)
        init = nn.initializers.normal(1.0)
        query = self.param("treatment", init, (s.queries, s.width))
        query = jnp.broadcast_to(query[None], (len(keys), *query.shape))
        y = nn.MultiHeadDotProductAttention(s.heads, qkv_features=s.width, name="look")(
            query, keys
        )
        y = nn.relu(nn.Dense(s.width // 2, name="narrow")(y))
        y = nn.relu(nn.Dense(s.width, name="wide")(y))
        return nn.Dense(s.outcomes, name="out")(jnp.mean(y, axis=1))


class Mtmt(nn.Module):
    """[B, F] -> natural responses [B, O] and effects [B, J, O], standardised."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        s = self.sizes
        experts = Experts(s, name="experts")(x)
        gates = {
            "kernel": self.param(
                "gates",
                nn.initializers.lecun_normal(batch_axis=0),
                (s.outcomes, x.shape[1], s.experts),
            ),
            "bias": self.param(
                "gates_bias", nn.initializers.zeros, (s.outcomes, s.experts)
            ),
        }
        weights = jax.vmap(
            lambda gate: moe.route(moe.gate_logits(gate, x), kind="soft").weights
        )(gates)
        u = jnp.einsum("kbe,eblc->kblc", weights, experts)
        natural = [
            nn.Dense(1, name=f"natural_{k}")(jnp.mean(u[k], axis=1))
            for k in range(s.outcomes)
        ]
        keys = jnp.concatenate(list(u), axis=-1)  # [B, L, O C]
        norm = jnp.linalg.norm(keys + 1e-12, axis=-1, keepdims=True)
        keys = keys / jnp.maximum(norm, 1e-6)
        effects = [Effect(s, name=f"effect_{j}")(keys) for j in range(len(s.tiers[0]))]
        return jnp.concatenate(natural, axis=1), jnp.stack(effects, axis=1)


def init(key: Array, features: int, sizes: Sizes) -> dict:
    """Random parameters."""
    return Mtmt(sizes).init(key, jnp.zeros((1, features)))["params"]


def loss(params: dict, x: Array, arm: Array, y: Array, *, sizes: Sizes) -> Array:
    """The squared error, summed over outcomes: [].

    Args:
      params: from `init`.
      x: [B, F].
      arm: [B] int, 0 is the control.
      y: [B, O], standardised.
      sizes: of the model.
    """
    natural, effects = Mtmt(sizes).apply({"params": params}, x)
    control = (arm == 0)[:, None]
    natural = jnp.where(control, natural, jax.lax.stop_gradient(natural))
    effect = jnp.einsum("bj,bjo->bo", jnp.array(sizes.tiers)[arm], effects)
    return jnp.mean(jnp.sum((natural + effect - y) ** 2, axis=1))


def predict(params: dict, x: Array, *, sizes: Sizes) -> Array:
    """Expected outcomes under each arm, standardised: [B, F] -> [B, A, O]."""
    natural, effects = Mtmt(sizes).apply({"params": params}, x)
    return natural[:, None] + jnp.einsum("aj,bjo->bao", jnp.array(sizes.tiers), effects)
