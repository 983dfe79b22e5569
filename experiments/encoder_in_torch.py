"""The other side of `benchmark_encoder`: the same model in transformers, on a CPU.

A program for an interpreter with torch and transformers; it needs nothing of ours. Its
argument is a JSON object of sizes; for every line "training 5" or "inference 5" on
standard input it takes so many steps and prints their seconds.
"""

import json
import sys
import time
from typing import Any

import torch
from transformers import BertConfig, BertModel


class Encoder:
    """A BERT with random weights, a batch of full length, AdamW; no dropout."""

    def __init__(self, settings: dict[str, Any]):
        torch.set_num_threads(settings["threads"])
        torch.manual_seed(0)
        config = BertConfig(
            **settings["config"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = torch.nn.Linear(config.hidden_size, 2)
        self.low = settings["products"] == "bfloat16"
        size = (settings["batch"], settings["length"])
        self.ids = torch.randint(0, config.vocab_size, size)
        self.mask = torch.ones(size, dtype=torch.long)
        self.labels = torch.arange(settings["batch"]) % 2
        self.parameters = [*self.bert.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-5, weight_decay=0.01)

    def embed(self) -> torch.Tensor:
        """Means of the last layer's tokens [B, D]."""
        out = self.bert(input_ids=self.ids, attention_mask=self.mask)
        x = out.last_hidden_state.float()
        kept = self.mask[..., None].to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1)

    def _low(self) -> torch.autocast:
        """Products in bfloat16, if asked for; weights are rounded once within it."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.low)

    def training(self, steps: int) -> None:
        """Forward, backward, clip, AdamW."""
        self.bert.train()
        for _ in range(steps):
            self.optimizer.zero_grad()
            with self._low():
                x = self.embed()
            logits = self.head(x)
            torch.nn.functional.cross_entropy(logits, self.labels).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()

    def inference(self, steps: int) -> None:
        """Batches of embeddings."""
        self.bert.eval()
        with torch.inference_mode(), self._low():
            for _ in range(steps):
                self.embed()


def main() -> None:
    """Serves the requests of standard input until it ends."""
    encoder = Encoder(json.loads(sys.argv[1]))
    for line in sys.stdin:
        kind, steps = line.split()
        start = time.perf_counter()
        getattr(encoder, kind)(int(steps))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
