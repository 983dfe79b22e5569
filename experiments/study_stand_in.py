"""Stand-ins for a base and tasks, to try the study anywhere: random and *synthetic*.

A BERT of two narrow layers with random weights and a tokenizer of made-up words, and
tasks whose label tells which half of the words a sentence is from. They show that all
parts run; their numbers mean nothing.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from multitask_jax.models import bert

WORDS = [f"w{i}" for i in range(40)]
SHAPE = bert.Shape(
    vocab_size=44, width=16, depth=2, heads=2, mlp_width=32, positions=64
)


def make_base(folder: Path) -> Path:
    """A Hugging Face directory: random weights, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    vocabulary |= {w: i + 4 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    source = folder.with_name("source")
    source.mkdir(parents=True)
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert",
                "vocab_size": SHAPE.vocab_size,
                "hidden_size": SHAPE.width,
                "num_hidden_layers": SHAPE.depth,
                "num_attention_heads": SHAPE.heads,
                "intermediate_size": SHAPE.mlp_width,
                "max_position_embeddings": SHAPE.positions,
                "type_vocab_size": SHAPE.types,
                "layer_norm_eps": SHAPE.epsilon,
            }
        )
    )
    params = jax.tree.map(np.asarray, bert.init(jax.random.key(0), SHAPE))
    rest = {
        "embeddings.position_ids": np.arange(64)[None],
        "pooler.dense.weight": np.ones((16, 16), np.float32),
    }
    tensors = bert.to_hugging_face(params, rest, shape=SHAPE)
    bert.save(folder, tensors, like=source)
    return folder


def make_tasks(
    folder: Path,
    names: Sequence[str] = ("first", "second", "third"),
    pairs: Sequence[str] = ("second",),
) -> Path:
    """A folder a task, of 80 training rows; `pairs` have two sentences a row."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        halves = np.split(rng.permutation(WORDS), 2)

        def sentence(label: int, halves: list[np.ndarray] = halves) -> str:
            return " ".join(rng.choice(halves[label], rng.integers(3, 9)))

        for part, rows in (("train", 80), ("validation", 24), ("test", 24)):
            lines = []
            for i in range(rows):
                sentences = [sentence(i % 2)]
                if name in pairs:
                    sentences.append(sentence(i % 2))
                lines.append("\t".join([str(i % 2), *sentences]))
            header = "label\tsentence" + ("1\tsentence2" if name in pairs else "")
            text = "\n".join([header, *lines]) + "\n"
            (folder / name / f"{part}.tsv").write_text(text)
    return folder
