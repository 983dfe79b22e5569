"""The other side of `benchmark_egom2p`: the same model in plain PyTorch, on a CPU.

Scaled dot-product attention and fused projections; the loss picks each modality's
targets by a boolean mask, as 4M's code does, so that no logits are spent on other
vocabularies. It needs torch and nothing of ours; see `torch_side` for how it is spoken
to.
"""

import json
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Queries from x, keys and values from x or a context; no biases."""

    def __init__(self, width: int, heads: int, cross: bool = False):
        super().__init__()
        self.heads, self.cross = heads, cross
        if cross:
            self.query = nn.Linear(width, width, bias=False)
            self.key_value = nn.Linear(width, 2 * width, bias=False)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Any, mask: Any, context: Any = None) -> Any:
        """[B, N, D] -> [B, N, D]."""
        if self.cross:
            parts = [self.query(x), *self.key_value(context).chunk(2, dim=-1)]
        else:
            parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Any) -> Any:
        """[B, N, D] -> [B, N, D]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Of the encoder; with `cross`, of the decoder."""

    def __init__(self, s: dict[str, Any], cross: bool):
        super().__init__()

        def norm() -> nn.Module:
            return nn.LayerNorm(s["width"], eps=1e-6, bias=False)

        self.norm_own, self.own = norm(), Attention(s["width"], s["heads"])
        self.cross = Attention(s["width"], s["heads"], cross=True) if cross else None
        self.norm_query, self.norm_context = (norm(), norm()) if cross else (None, None)
        self.norm_mlp, self.mlp = norm(), SwiGLU(s["width"], s["hidden"])

    def forward(self, x: Any, mask: Any, context: Any = None, seen: Any = None) -> Any:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.own(self.norm_own(x), mask)
        if self.cross is not None:
            x = x + self.cross(self.norm_query(x), seen, self.norm_context(context))
        return x + self.mlp(self.norm_mlp(x))


class EgoM2P(nn.Module):
    """The loss of a batch."""

    def __init__(self, s: dict[str, Any]):
        super().__init__()
        width, self.sizes = s["width"], s["vocabularies"]
        self.token = nn.Embedding(sum(self.sizes), width)
        self.modality = nn.Embedding(len(self.sizes), width)
        self.register_buffer("position", torch.randn(sum(s["lengths"]), width))
        of = [torch.full((n,), i) for i, n in enumerate(s["lengths"])]
        self.register_buffer("of", torch.cat(of))
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.encoder = nn.ModuleList(Block(s, False) for _ in range(s["encoder_depth"]))
        self.decoder = nn.ModuleList(Block(s, True) for _ in range(s["decoder_depth"]))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
        self.context = nn.Linear(width, width, bias=False)
        self.heads = nn.ModuleList(nn.Linear(width, v, bias=False) for v in self.sizes)

    def forward(
        self, ids: Any, inputs: Any, seen: Any, targets: Any, asked: Any
    ) -> Any:
        """Ids [B, L], positions [B, I] and [B, O], which of them are tokens."""
        place = self.position[inputs] + self.modality(self.of[inputs])
        x = (self.token(ids.gather(1, inputs)) + place) * seen[..., None]
        keys = seen[:, None, None, :]
        for block in self.encoder:
            x = block(x, keys)
        context = (self.context(self.encoder_norm(x)) + place) * seen[..., None]
        of = self.of[targets]
        y = self.mask_token + self.position[targets] + self.modality(of)
        own = (of[:, :, None] == of[:, None, :]) & asked[:, None, :]
        own = (own | torch.eye(own.shape[1], dtype=torch.bool))[:, None]  # no empty row
        for block in self.decoder:
            y = block(y, own, context, keys)
        y, right, losses, first = self.decoder_norm(y), ids.gather(1, targets), [], 0
        for i, (head, size) in enumerate(zip(self.heads, self.sizes, strict=True)):
            mine = asked & (of == i)
            if mine.any():
                losses.append(F.cross_entropy(head(y[mine]), right[mine] - first))
            first += size
        return sum(losses) / len(self.sizes)


class Trainer:
    """Steps on one batch, again and again."""

    def __init__(self, s: dict[str, Any]):
        torch.set_num_threads(s["threads"])
        torch.manual_seed(0)
        self.model = EgoM2P(s)
        self.low = s["dtype"] == "bfloat16"
        batch = [s["ids"], s["inputs"], s["seen"], s["targets"], s["asked"]]
        self.batch = [torch.tensor(x) for x in batch]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
        )

    def step(self) -> None:
        """Forward, backward, clip, AdamW."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            loss = self.model(*self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def main() -> None:
    """Serves the requests of standard input until it ends."""
    with open(json.loads(sys.argv[1])["file"], encoding="utf-8") as file:
        trainers = {name: Trainer(s) for name, s in json.load(file).items()}
    for line in sys.stdin:
        kind, steps = line.split()
        start = time.perf_counter()
        for _ in range(int(steps)):
            trainers[kind].step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
