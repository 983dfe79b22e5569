"""What all parts of the merging study share: tasks, evaluator, results; seeds' models.

Legend: S seeds, T tasks.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import merge, study_merges
from experiments.study_merges import Merger
from experiments.study_store import Store
from experiments.study_tasks import (
    Evaluator,
    Head,
    Pool,
    Score,
    make_pool,
    sample,
)
from experiments.study_training import (
    JOINT,
    TRAINING_LENGTHS,
    Data,
    Recipe,
    make_heads,
    train,
)
from multitask_jax import checkpoints
from multitask_jax.data import text_tasks, tokens
from multitask_jax.data.text_tasks import Rows
from multitask_jax.models import bert

GLUE = "glue/"  # before a task's name: tensorflow-datasets has it


def read_task(data_dir: str, name: str) -> text_tasks.Task:
    """A task's folder, or a task of GLUE."""
    if name.startswith(GLUE):
        from multitask_jax.data import text_builder  # tensorflow-datasets

        return text_builder.glue(name.removeprefix(GLUE))
    return text_tasks.read(Path(data_dir) / name)


def digest(
    tasks: Sequence[text_tasks.Task],
    tensors: Mapping[str, Any],
    shape: bert.Shape,
    tokenizer: bytes,
) -> str:
    """A short name of what was read of the tasks and the base."""
    # How it multiplies is the config's own.
    sizes = shape._replace(products="float32")
    found = hashlib.sha256(tokenizer + repr(sizes).encode())
    for task in tasks:
        for rows in (task.train, task.validation, task.test):
            found.update(rows.labels.tobytes() + repr(rows.sentences).encode())
    for name, x in sorted(tensors.items()):
        found.update(name.encode() + np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:12]


class Seed(NamedTuple):
    """One seed's models and data."""

    index: int
    folder: Path
    data: Data
    heads: dict[str, Head]
    pools: dict[str, dict[int, Pool]]  # part -> of the first n tasks
    own_test: dict[str, Pool]  # of each task alone
    merger: Merger  # of base and models

    @property
    def test(self) -> Pool:
        """Test rows of all tasks."""
        return self.pools["test"][len(self.own_test)]


class Study:
    """What all parts share: tasks, evaluator, results."""

    def __init__(self, config: Any, tasks: Sequence[str], rows: Sequence[str]):
        self.config, self.rows = config, rows
        self.workdir = Path(config.workdir)
        self.tasks = [read_task(config.data_dir, t) for t in tasks]
        self.names = [t.name for t in self.tasks]
        for task in self.tasks:
            few = min(config.train_rows, len(task.train.labels))
            if few < config.batch_size or few < 16:
                raise ValueError(
                    f"{task.name}: got {few} training rows, expected a batch"
                    f" ({max(16, config.batch_size)}) at least"
                )
        self.classes = max(len(t.labels) for t in self.tasks)
        tensors = checkpoints.read_tensors(config.model_dir)
        shape = bert.read_shape(config.model_dir)._replace(products=config.products)
        self.evaluator = Evaluator(shape)
        other = {str(x.dtype) for x in tensors.values() if x.dtype.kind not in "iub"}
        if other != {"float32"}:
            raise ValueError(
                f"--model_dir: got weights of {', '.join(sorted(other))} in"
                f" {config.model_dir}, expected float32, which fine-tuning needs: cast"
                " them first"
            )
        tokenizer = tokens.tokenizer_file(config.model_dir).read_bytes()
        self.files = digest(self.tasks, tensors, shape, tokenizer)
        params, rest = bert.from_hugging_face(tensors, shape=shape)
        self.base = (jax.tree.map(np.ascontiguousarray, params), rest)
        self.store = Store(self.workdir)

    def check(self, seeds: Sequence[int]) -> None:
        """Raises ValueError for sentences or samples that training will not take."""
        config, positions = self.config, self.evaluator.shape.positions
        lengths = TRAINING_LENGTHS
        longest = max((x for x in lengths if x <= positions), default=0)
        padded = next((x for x in lengths if x >= config.max_length), config.max_length)
        if padded > positions:
            raise ValueError(
                f"--max_length: got {config.max_length}, expected at most {longest}:"
                f" the base has {positions} positions"
            )
        for task in self.tasks:
            for seed in seeds:
                rows = text_tasks.take(task.train, config.train_rows, seed=seed)
                if len(np.unique(rows.labels)) < 2:
                    raise ValueError(
                        f"{task.name}: the {len(rows.labels)} training rows of seed"
                        f" {seed} have one label only; raise --train_rows, or leave"
                        " the task out"
                    )

    def scores(
        self, tensors: Mapping[str, Any], seed: Seed, pool: Pool
    ) -> dict[str, Score]:
        """By task, of a model by Hugging Face names."""
        params = self.evaluator.params(tensors)
        return self.evaluator.scores(params, seed.heads, pool)

    def score(self, tensors: Mapping[str, Any], seed: Seed, pool: Pool) -> Score:
        """Over all tasks: what candidates are chosen by."""
        return study_merges.mean(self.scores(tensors, seed, pool))

    def accuracies(
        self, tensors: Mapping[str, Any], seed: Seed, pool: Pool
    ) -> dict[str, float]:
        """By task."""
        params = self.evaluator.params(tensors)
        return self.evaluator.accuracies(params, seed.heads, pool)

    def prepare(self, index: int) -> Seed:
        """Trains what a seed needs, or finds it done."""
        config = self.config
        count = {
            "train": config.train_rows,
            "validation": config.validation_rows,
            "test": config.test_rows or max(len(t.test.labels) for t in self.tasks),
        }
        rows: dict[str, dict[str, Rows]] = {p: {} for p in text_tasks.PARTS}
        encoded: dict[str, dict[str, tokens.Encoded]] = {p: {} for p in rows}
        for task in self.tasks:
            for part, sampled in sample(task, count, seed=index).items():
                rows[part][task.name] = sampled
                encoded[part][task.name] = tokens.encode(
                    config.model_dir, sampled.sentences, max_length=config.max_length
                )

        def pool(part: str, names: Sequence[str]) -> Pool:
            return make_pool(encoded[part], {n: rows[part][n] for n in names})

        used = ("validation", "test")
        own = {part: {n: pool(part, [n]) for n in self.names} for part in used}
        counts = range(2, len(self.names) + 1)
        pools = {part: {n: pool(part, self.names[:n]) for n in counts} for part in used}
        every = pools["validation"][len(self.names)]
        data = Data(rows["train"], encoded["train"], every, own["validation"])
        folder = self.workdir / f"seed_{index}"
        params = jax.device_put(self.base[0])
        heads = make_heads(folder, data, params, self.evaluator, self.classes)
        recipe = Recipe(
            config.epochs, config.batch_size, config.rate, config.max_length
        )
        bar = tqdm([*self.names, JOINT], disable=None if config.progress else True)
        for name in bar:
            bar.set_description(f"seed {index}: training {name}")
            made = train(
                folder,
                name,
                data,
                heads,
                self.base,
                self.evaluator,
                model_dir=config.model_dir,
                recipe=recipe,
                seed=index,
            )
            self.store.once("training", name, index, lambda made=made: made)
        models = ",".join(str(folder / n) for n in self.names)
        flags = merge.Config(base=config.model_dir, models=models)
        return Seed(
            index, folder, data, heads, pools, own["test"], Merger(flags, folder)
        )

    def references(self, seed: Seed) -> None:
        """Base, specialists and the joint model, on every task."""
        rows = {"base": self.config.model_dir, JOINT: seed.folder / JOINT}
        rows |= {f"expert: {n}": seed.folder / n for n in self.names}
        for row, path in rows.items():
            self.store.once(
                "references",
                row,
                seed.index,
                lambda path=path: {
                    "test": self.accuracies(
                        checkpoints.read_tensors(path), seed, seed.test
                    )
                },
            )
