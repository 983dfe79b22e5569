"""A pre-norm transformer block whose feed-forward layer can be replaced.

Legend: B batch, L tokens, D width.
"""

import flax.linen as nn
import jax

from multitask_jax.layers.attention import attend

Array = jax.Array


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); [B, L, D] -> [B, L, D].

    `mlp`: a module for the feed-forward layer, such as `layers.moe.MoE`; by default two
    dense layers around a GELU, of `mlp_width`.
    """

    width: int
    heads: int
    mlp_width: int
    epsilon: float = 1e-6
    mlp: nn.Module | None = None

    @nn.compact
    def __call__(self, x: Array, ids: Array | None = None) -> Array:
        """`ids`: of tasks or modalities, for an `mlp` that takes them."""
        b, l, _ = x.shape
        y = nn.LayerNorm(epsilon=self.epsilon, name="layernorm_before")(x)
        q, k, v = (
            nn.Dense(self.width, name=name)(y).reshape(b, l, self.heads, -1)
            for name in ("query", "key", "value")
        )
        y = attend(q, k, v).reshape(b, l, self.width)
        x = x + nn.Dense(self.width, name="attention_output")(y)
        y = nn.LayerNorm(epsilon=self.epsilon, name="layernorm_after")(x)
        if self.mlp is None and ids is not None:
            raise ValueError("ids are for an mlp that takes them; there is none")
        if self.mlp is not None:
            return x + (self.mlp(y) if ids is None else self.mlp(y, ids))
        y = nn.Dense(self.mlp_width, name="intermediate")(y)
        return x + nn.Dense(self.width, name="output")(nn.gelu(y, approximate=False))
