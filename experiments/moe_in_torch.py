"""The other side of `benchmark_moe`: a plain PyTorch mixture of experts, on a CPU.

A loop over experts with index_select and index_add, as model code usually has it. It
needs torch and nothing of ours; see `torch_side` for how it is spoken to.
"""

import json
import sys
import time
from typing import Any

import torch
from torch import nn


class Layers:
    """The mixture and a dense feed-forward layer of the same active FLOPs."""

    def __init__(self, s: dict[str, Any]):
        torch.set_num_threads(s["threads"])
        torch.manual_seed(0)
        self.k = s["k"]
        self.x = torch.randn(s["tokens"], s["width"], requires_grad=True)
        self.gate = nn.Linear(s["width"], s["experts"], bias=False)
        self.experts = nn.ModuleList(
            self.mlp(s["width"], s["hidden"]) for _ in range(s["experts"])
        )
        self.ffn = self.mlp(s["width"], s["k"] * s["hidden"])

    @staticmethod
    def mlp(width: int, hidden: int) -> nn.Module:
        """Two dense layers around a GELU."""
        return nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(hidden, width),
        )

    def mixture(self) -> torch.Tensor:
        """Top-k of the softmax over all experts."""
        weights, chosen = torch.softmax(self.gate(self.x), -1).topk(self.k)
        out = torch.zeros_like(self.x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == e)
            y = expert(self.x.index_select(0, rows))
            out = out.index_add(0, rows, y * weights[rows, slots, None])
        return out

    def dense(self) -> torch.Tensor:
        """The feed-forward layer."""
        return self.ffn(self.x)

    def step(self, kind: str) -> None:
        """Forward and backward."""
        modules = [self.gate, self.experts, self.ffn]
        for p in (self.x, *(p for m in modules for p in m.parameters())):
            p.grad = None
        getattr(self, kind)().square().mean().backward()


def main() -> None:
    """Serves the requests of standard input until it ends."""
    layers = Layers(json.loads(sys.argv[1]))
    for line in sys.stdin:
        kind, steps = line.split()
        start = time.perf_counter()
        for _ in range(int(steps)):
            layers.step(kind)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
