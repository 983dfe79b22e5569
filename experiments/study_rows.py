"""The rows of the study's tables: what is merged, tuned, scored and recorded.

A `study` is experiments.merging_study.Study, a `seed` its Seed, `first` the number of
the seed that coefficients are chosen on if that is done once.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments import study_data_driven, study_merges
from experiments.study_merges import Entry, Merger
from experiments.study_tasks import Pool, floats_of
from experiments.study_training import JOINT
from multitask_jax import checkpoints

# Methods that are also merged for 2..T tasks.
COUNTED = ("linear", "task_arithmetic", "ties", "ties + LiNeS", "iso_c")
UNLABELLED_LENGTH = 32  # tokens that data-driven methods see of a sentence


def chosen_before(study: Any, part: str, row: str, seed: Any, first: int) -> Any:
    """Coefficients of the first seed, where they are chosen once; else None."""
    if study.config.tune_every_seed or seed.index == first:
        return None
    return study.store.records[(part, row, first)]["coefficients"]


def tune_and_score(
    study: Any, part: str, entry: Entry, seed: Any, first: int, merger: Merger
) -> dict[str, Any]:
    """Tunes a row and scores it; the main table's go through the command line."""
    names = [Path(m).name for m in merger.models]
    validation, test = (seed.pools[p][len(names)] for p in ("validation", "test"))

    def make() -> dict[str, Any]:
        known = chosen_before(study, part, entry.label, seed, first)
        on_disk = part == "methods"
        out: dict[str, Any] = {}
        if on_disk and (known is not None or entry.grid == ({},)):
            # Nothing to choose: the command line's merge is the only one.
            coefficients, scores, tensors = known or {}, [], None
        else:
            coefficients, scores, tensors = study_merges.tune(
                entry, merger, lambda x: study.accuracies(x, seed, validation), known
            )
        if on_disk:
            final = study_merges.merge_on_disk(
                dataclasses.replace(merger.config, **entry.flags),
                coefficients,
                seed.folder / "merged",
                measured=seed.index == first,
            )
            out = final.record()
            if tensors is not None:
                gap = study_merges.difference(tensors, final.tensors)
                out["difference"] = gap
            tensors = final.tensors
        return {
            "coefficients": coefficients,
            "validation": scores,
            **out,
            "test": study.accuracies(tensors, seed, test),
        }

    return study.store.once(part, entry.label, seed.index, make)


def methods(study: Any, seed: Any, first: int, entries: Sequence[Entry]) -> None:
    """The main table."""
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


def functions_and_batches(study: Any, seed: Any) -> Any:
    """What data-driven methods are given: a function and batches a task."""
    functions = study_data_driven.apply_fns(seed.heads, study.evaluator.shape)
    batches = study_data_driven.unlabelled(
        seed.data.encoded,
        rows=study.config.unlabelled_rows,
        batch_size=16,
        length=min(UNLABELLED_LENGTH, study.config.max_length),
    )
    return functions, batches


def floats(path: Any) -> dict[str, Any]:
    """Float tensors of a checkpoint, on the device."""
    return jax.device_put(floats_of(checkpoints.read_tensors(path)))


def statistics_files(study: Any, seed: Any) -> dict[str, str]:
    """Gram and Fisher files beside the specialists."""
    _, batches = functions_and_batches(study, seed)
    start = time.perf_counter()
    files = study_data_driven.save_statistics(
        seed.folder,
        study.evaluator.shape,
        seed.heads,
        lambda name: floats(seed.folder / name),
        batches,
        fisher_rows=study.config.fisher_rows,
        seed=seed.index,
    )
    spent = {"seconds": round(time.perf_counter() - start, 2)}
    study.store.once("statistics", "gram and fisher", seed.index, lambda: spent)
    return files


def a_model_a_task(study: Any, seed: Any, first: int) -> None:
    """EMR and TALL masks: each task is scored on its own model."""

    def score(models: Mapping[str, Any], pools: Mapping[str, Pool]) -> dict[str, float]:
        return {n: study.accuracies(models[n], seed, pools[n])[n] for n in study.names}

    def emr() -> dict[str, Any]:
        models, final = study_merges.emr_models(
            seed.merger.config, seed.folder / "merged", study.names, measured=True
        )
        test = score(models, seed.own_test)
        return {"coefficients": {}, **final.record(), "test": test}

    def tall_masks(tall_lambda: str) -> dict[str, Any]:
        flags = {"method": "tall_masks", "tall_lambda": tall_lambda}
        merger = seed.merger
        return {
            n: merger.at(merger.task_vector(task=t, **flags), {})
            for t, n in enumerate(study.names)
        }

    def tall() -> dict[str, Any]:
        known = chosen_before(study, "methods", "TALL masks", seed, first)
        scores = []
        if known is None:
            for value in study_merges.TALL_LAMBDAS[: study.config.budget]:
                own = score(tall_masks(value), seed.data.own)
                scores.append(float(np.mean(list(own.values()))))
            best = study_merges.TALL_LAMBDAS[int(np.argmax(scores))]
            known = {"tall_lambda": best}
        return {
            "coefficients": known,
            "validation": scores,
            "test": score(tall_masks(**known), seed.own_test),
        }

    study.store.once("methods", "EMR", seed.index, emr)
    study.store.once("methods", "TALL masks", seed.index, tall)


def data_driven(study: Any, seed: Any) -> None:
    """Rows without a streamed form."""
    functions, batches = functions_and_batches(study, seed)
    gram = study.store.records.get(("methods", "regmean", seed.index), {})
    found = gram.get("coefficients", {}).get("off_diagonal", 0.9)
    rows = study_data_driven.in_memory(
        functions,
        floats(study.config.model_dir),
        {n: floats(seed.folder / n) for n in study.names},
        batches,
        steps=study.config.adamerging_steps,
        off_diagonal=float(found),
    )
    for row, make in rows.items():
        study.store.once(
            "methods",
            row,
            seed.index,
            lambda make=make: {
                "coefficients": {},
                "test": study.accuracies(make(), seed, seed.test),
            },
        )


def counts(study: Any, seed: Any, first: int) -> None:
    """Merges of the first 2..T - 1 tasks, tuned anew (T are in the main table)."""
    for n in range(2, len(study.names)):
        models = ",".join(seed.merger.models[:n])
        config = dataclasses.replace(seed.merger.config, models=models)
        merger = Merger(config, seed.folder)
        for entry in study_merges.entries(study.config.budget):
            if entry.label in COUNTED:
                row = entry._replace(label=f"{entry.label}: {n}")
                tune_and_score(study, "counts", row, seed, first, merger)


def ablations(study: Any, seed: Any, first: int) -> None:
    """What each step of TIES is worth; scales are tuned for each."""
    joint = floats(seed.folder / JOINT)
    for entry in study_merges.ablations(study.config.budget, joint):
        tune_and_score(study, "ablations", entry, seed, first, seed.merger)
