"""The rows of the study's tables: what is merged, tuned, scored and recorded.

A `study` is experiments.study_state.Study, a `seed` its Seed, `first` the number of
the seed that coefficients are chosen on if that is done once.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments import study_candidates, study_data_driven, study_merges
from experiments.study_data_driven import IN_MEMORY
from experiments.study_merges import Entry, Merger, Tensors
from experiments.study_tasks import Pool, Score, floats_of
from experiments.study_training import JOINT
from multitask_jax import checkpoints

A_MODEL_A_TASK = ("EMR", "TALL masks")
# Methods that are also merged for 2..T tasks.
COUNTED = ("linear", "task_arithmetic", "ties", "ties + LiNeS", "iso_c")
ADAMERGING_BATCH = 16  # rows of each task a step
STATISTICS_BATCH = 64  # at most: means over rows are the same, larger products faster
UNLABELLED_LENGTH = 32  # tokens that data-driven methods see of a sentence


def chosen_before(study: Any, part: str, row: str, seed: Any, first: int) -> Any:
    """Coefficients of the first seed, where they are chosen once; else None."""
    if study.config.tune_every_seed or seed.index == first:
        return None
    return study.store.records[(part, row, first)]["coefficients"]


def recorded(scores: Sequence[Score]) -> dict[str, list[float]]:
    """Of all candidates on validation rows: accuracies, and what they are chosen by."""
    return {
        "validation": [s.accuracy for s in scores],
        "likelihood": [round(s.likelihood, 6) for s in scores],
    }


def tune_and_score(
    study: Any, part: str, entry: Entry, seed: Any, first: int, merger: Merger
) -> dict[str, Any]:
    """Tunes a row and scores it.

    Where coefficients of the main table are chosen its final merges go through the
    command line, but for those whose task vector no flag makes. Coefficients of another
    seed are merged in memory, with the same result: there it was compared.
    """
    names = [Path(m).name for m in merger.models]
    validation, test = (seed.pools[p][len(names)] for p in ("validation", "test"))

    def make() -> dict[str, Any]:
        known = chosen_before(study, part, entry.label, seed, first)
        with_lines = entry.label.endswith("+ LiNeS")
        on_disk = part == "methods" and entry.tau is None and known is None
        if on_disk and with_lines and entry.flags["method"] in study_candidates.SLOW:
            on_disk = False
        out: dict[str, Any] = {}
        if on_disk and entry.grid == ({},):
            # Nothing to choose: the command line's merge is the only one.
            coefficients, scores, tensors = {}, [], None
        else:
            coefficients, scores, tensors = study_merges.tune(
                entry, merger, lambda x: study.score(x, seed, validation), known
            )
        if on_disk:
            final = study_merges.merge_on_disk(
                dataclasses.replace(merger.config, **entry.flags),
                coefficients,
                seed.folder / "merged",
                measured=seed.index == first and not with_lines,
            )
            out = final.record()
            if tensors is not None:
                gap = study_merges.difference(tensors, final.tensors)
                out["difference"] = gap
            tensors = final.tensors
        return {
            "coefficients": coefficients,
            **recorded(scores),
            **out,
            "test": study.accuracies(tensors, seed, test),
        }

    return study.store.once(part, entry.label, seed.index, make)


def labels(budget: int) -> list[str]:
    """All rows of the main table."""
    fitted = [f"{row}{more}" for row in IN_MEMORY for more in ("", " + LiNeS")]
    return [
        *(e.label for e in study_candidates.entries(budget)),
        *A_MODEL_A_TASK,
        *fitted,
    ]


def part_of(row: str) -> str:
    """Which of merging_study.PARTS makes a row of the main table."""
    return "data_driven" if row.startswith(IN_MEMORY) else "methods"


def methods(study: Any, seed: Any, first: int) -> None:
    """The main table, but for what looks at data in memory."""
    every = study_candidates.entries(study.config.budget)
    entries = [e for e in every if e.label in study.rows]
    kind = {"fisher": "fisher", "regmean": "gram"}
    needed = {kind[m] for m in (e.flags["method"] for e in entries) if m in kind}
    files = statistics_files(study, seed) if needed else {}
    bar = tqdm(entries, disable=None if study.config.progress else True)
    for entry in bar:
        bar.set_description(f"seed {seed.index}: {entry.label}")
        method = entry.flags["method"]
        if method in kind:
            flags = entry.flags | {"statistics": files[kind[method]]}
            entry = entry._replace(flags=flags)
        tune_and_score(study, "methods", entry, seed, first, seed.merger)


def unlabelled(study: Any, seed: Any, batch_size: int) -> dict[str, list[Any]]:
    """Batches a task that data-driven methods are given."""
    return study_data_driven.unlabelled(
        seed.data.encoded,
        seed.heads,
        rows=study.config.unlabelled_rows,
        batch_size=batch_size,
        length=min(UNLABELLED_LENGTH, study.config.max_length),
    )


def floats(path: Any) -> dict[str, Any]:
    """Float tensors of a checkpoint, on the device."""
    return jax.device_put(floats_of(checkpoints.read_tensors(path)))


def statistics_files(study: Any, seed: Any) -> dict[str, str]:
    """Gram and Fisher files beside the specialists."""
    save = functools.partial(
        study_data_driven.save_statistics,
        seed.folder,
        study.evaluator.shape,
        lambda name: floats(seed.folder / name),
        unlabelled(study, seed, STATISTICS_BATCH),
        fisher_rows=study.config.fisher_rows or study.config.unlabelled_rows,
        seed=seed.index,
    )
    study.store.once("statistics", "gram and fisher", seed.index, lambda: save() and {})
    return save()  # what is there is not made again


def a_model_a_task(study: Any, seed: Any, first: int) -> None:
    """EMR and TALL masks: each task is scored on its own model."""

    def scores(
        models: Mapping[str, Any], pools: Mapping[str, Pool]
    ) -> dict[str, Score]:
        return {n: study.scores(models[n], seed, pools[n])[n] for n in study.names}

    def accuracies(models: Mapping[str, Any]) -> dict[str, float]:
        found = scores(models, seed.own_test)
        return {name: score.accuracy for name, score in found.items()}

    def emr() -> dict[str, Any]:
        models, final = study_merges.emr_models(
            seed.merger.config,
            seed.folder / "merged",
            study.names,
            measured=seed.index == first,
        )
        return {"coefficients": {}, **final.record(), "test": accuracies(models)}

    def tall_masks(tall_lambda: str) -> dict[str, Any]:
        value = float(tall_lambda)
        return {n: seed.merger.tall(t, value) for t, n in enumerate(study.names)}

    def tall() -> dict[str, Any]:
        known = chosen_before(study, "methods", "TALL masks", seed, first)
        found, out, choose = [], {}, known is None
        if choose:
            values = study_candidates.spread(
                study_candidates.TALL_LAMBDAS, study.config.budget
            )
            for value in values:
                own = scores(tall_masks(value), seed.data.own)
                found.append(study_merges.mean(own))
            best = int(np.argmax([score.likelihood for score in found]))
            known = {"tall_lambda": values[best]}
        models = tall_masks(**known)
        if choose:
            # One task's model by the command line: the others differ in --task alone.
            final = study_merges.merge_on_disk(
                dataclasses.replace(seed.merger.config, method="tall_masks", task=0),
                known,
                seed.folder / "merged",
                measured=seed.index == first,
            )
            gap = study_merges.difference(models[study.names[0]], final.tensors)
            out = {**final.record(), "difference": gap}
        return {
            "coefficients": known,
            **recorded(found),
            **out,
            "test": accuracies(models),
        }

    for row, make in zip(A_MODEL_A_TASK, (emr, tall), strict=True):
        if row in study.rows:
            study.store.once("methods", row, seed.index, make)


def data_driven(study: Any, seed: Any, first: int) -> None:
    """Rows without a streamed form; LiNeS scales their change of the base."""
    if not any(part_of(row) == "data_driven" for row in study.rows):
        return
    rows = study_data_driven.in_memory(
        study.evaluator.shape,
        floats(study.config.model_dir),
        {n: floats(seed.folder / n) for n in study.names},
        unlabelled(study, seed, STATISTICS_BATCH),
        unlabelled(study, seed, ADAMERGING_BATCH),
        steps=study.config.adamerging_steps,
    )
    for row, make in rows.items():
        rows_in_memory(study, row, make, seed, first)


def rows_in_memory(
    study: Any, row: str, make: Callable[[], Tensors], seed: Any, first: int
) -> None:
    """Two rows of a merge that no flag makes: as it is, and scaled by LiNeS."""

    @functools.cache
    def made() -> tuple[Tensors, float]:
        start = time.perf_counter()
        tensors = {k: np.asarray(x) for k, x in make().items()}
        return tensors, time.perf_counter() - start

    def score() -> dict[str, Any]:
        tensors, seconds = made()
        return {
            "coefficients": {},
            "merge_seconds": round(seconds, 2),
            "test": study.accuracies(tensors, seed, seed.test),
        }

    def tau(merger: Merger) -> dict[str, np.ndarray]:
        return {k: made()[0][k] - x for k, x in merger.base.items()}

    if row in study.rows:
        study.store.once("methods", row, seed.index, score)
    with_lines = study_candidates.with_lines(row, study.config.budget, tau)
    if with_lines.label in study.rows:
        tune_and_score(study, "methods", with_lines, seed, first, seed.merger)


def counts(study: Any, seed: Any, first: int) -> None:
    """Merges of the first 2..T - 1 tasks, tuned anew (T are in the main table)."""
    for n in range(2, len(study.names)):
        models = ",".join(seed.merger.models[:n])
        config = dataclasses.replace(seed.merger.config, models=models)
        merger = Merger(config, seed.folder)
        for entry in study_candidates.entries(study.config.budget):
            if entry.label in COUNTED:
                row = entry._replace(label=f"{entry.label}: {n}")
                tune_and_score(study, "counts", row, seed, first, merger)


def ablations(study: Any, seed: Any, first: int) -> None:
    """What each step of TIES is worth; scales are tuned for each."""
    joint = floats(seed.folder / JOINT)
    for entry in study_candidates.ablations(study.config.budget, joint):
        tune_and_score(study, "ablations", entry, seed, first, seed.merger)
