"""MTMT on a real experiment: what each e-mail adds to each outcome, for whom.

    python -m experiments.mtmt --flagfile=experiments/flagfiles/mtmt/full.flags
    python -m experiments.mtmt --flagfile=experiments/flagfiles/mtmt/simulator.flags
    python -m experiments.mtmt --predict --checkpoint=WORKDIR/model \
        --input=customers.csv --output=uplift.csv

    python -m experiments.mtmt --workdir=.cache/trial --data=table \
        --data_path=trial.csv --arm_column=group --control=none \
        --outcomes=visit,profit --features=age,history:log,channel

Data: the MineThatData e-mail experiment (Hillstrom 2008: 64,000 customers, men's or
women's merchandise or no e-mail; visit, conversion, spend), any randomised experiment
of yours, or a *synthetic* one with known individual effects. MTMT, its ablations, the
networks of the field and gradient boosting predict each person's outcomes under each
arm from folds that have not seen that person. Measures, intervals and the policy are in
report.md.

Writes to --workdir: config.json, metrics.jsonl, predictions/ (a run goes on from
there), report.md, qini.png, deciles.png and model/, MTMT trained on everyone but the
share that chooses the epoch.

Legend: N people, F features, A arms, O outcomes, S seeds, K folds.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import (
    flags,
    json_files,
    mtmt_data,
    mtmt_model,
    mtmt_policy,
    mtmt_predict,
    mtmt_report,
    parsing,
    study_store,
    sweep_log,
)
from experiments import mtmt_training as training
from experiments.flags import flag
from multitask_jax.data.trial_table import KINDS
from multitask_jax.data.uplift import Trial
from multitask_jax.models.uplift_baselines import (
    BOOSTED,
    FULL_SIZE,
    MODELS,
    mtmt_sizes,
)
from multitask_jax.training import writers

ALL = (*MODELS, *BOOSTED)
_SCORING = ("checkpoint", "input", "output")
NETWORKS = 2  # raised when the same config makes other networks
# What predictions do not depend on.
_AROUND = ("workdir", "models", "seeds", "policy_outcome", "bootstrap", "progress")
_AROUND += ("predict", *_SCORING)
_AROUND += ("data_path", "download", "effect", "population_seed")  # the people tell


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on."""

    workdir: str = flag("Where everything is written and cached.", ".cache/mtmt")
    data: Literal["hillstrom", "table", "simulator"] = flag(
        "Which experiment; table: one of yours.", "hillstrom"
    )
    data_path: str | None = flag(
        "hillstrom.csv (by default data/uplift/hillstrom.csv in $MULTITASK_DATA, or in"
        " ../shared), or with --data=table a CSV, a person a row."
    )
    arm_column: str | None = flag("Of a table: the column of what people were given.")
    control: str | None = flag("Of a table: that column's value for the untreated.")
    arms: str | None = flag(
        "Of a table: comma list of all values of --arm_column in the order of arms: the"
        " control (not if --control tells it), the base arm, the others, whose effects"
        " are learned as increments over the base arm's. By default the others are"
        " sorted, and the first of them is the base arm."
    )
    features: str | None = flag(
        "Of a table: comma list of columns to learn from, known before the treatment."
        " Their kinds follow from their values, or are told, as in history:log:"
        f" {', '.join(KINDS)}."
    )
    outcomes: str | None = flag(
        "Of a table: comma list of columns that the treatment may change; 0 and 1, or"
        " numbers."
    )
    download: bool = flag(
        "Get Hillstrom's data (64,000 people) from the internet, once, in place of"
        " --data_path.",
        False,
    )
    rows: int | None = flag("People, drawn by chance; everyone if not given.")
    models: str | None = flag(
        f"Comma list of {', '.join(ALL)}; all but {FULL_SIZE} if not given."
    )
    folds: int = flag("Of cross-validation.", 5)
    seeds: str = flag("Comma list: folds and networks of each.", "0,1,2")
    epochs: int = flag("Passes over the training rows.", 10)
    batch_size: int = flag("People a step.", 1024)
    rate: float = flag("Peak learning rate.", 1e-3)
    validation: float = flag("Share of training rows that choose the epoch.", 0.1)
    effect: float | None = flag("Size of the simulator's effects; 1 if not given.")
    population_seed: int | None = flag(
        "Of the simulator: which population and people; 0 if not given."
    )
    policy_outcome: str | None = flag(
        "What a best arm is best for; by default the last outcome. More is better,"
        " unless it begins with a -: --policy_outcome=-churned."
    )
    bootstrap: int = flag("Replicates of the intervals.", 500)
    progress: bool = flag("Show a progress bar.", True)
    predict: bool = flag("Only score --input by --checkpoint.", False)
    checkpoint: str = flag("With --predict: WORKDIR/model.", "")
    input: str = flag("With --predict: a CSV of customers.", "")
    output: str = flag("With --predict: the CSV to write.", "")


class Result(NamedTuple):
    """What was found."""

    trial: Trial
    predictions: dict[str, np.ndarray]  # [S, N, A, O] by model
    traced: dict[str, list[str]]  # what was traced for each network that was trained
    report: str


def run(config: Config) -> Result | None:
    """Trains what is not there yet, measures all and writes the report.

    Raises:
      ValueError: a flag is out of range, or --workdir holds another run.
      FileNotFoundError: there is no such data.
    """
    config = parsing.expanded(config, "workdir", "data_path", *_SCORING)
    _check_mode(config)
    if config.predict:
        mtmt_predict.run(
            config.checkpoint, config.input, config.output, config.policy_outcome
        )
        return None
    names = parsing.paths(config.models) or [n for n in ALL if n != FULL_SIZE]
    for name in names:
        parsing.one_of("models", name, ALL)
        if names.count(name) > 1:
            raise ValueError(f"--models: got {name} twice, expected each once")
    seeds = parsing.seeds(config.seeds)
    if config.folds < 2 or config.epochs < 1 or not 0 < config.validation < 1:
        raise ValueError(
            f"got --folds={config.folds}, --epochs={config.epochs},"
            f" --validation={config.validation}; expected two folds or more, an epoch"
            " or more, and a share between 0 and 1"
        )
    parsing.at_least(config, batch_size=1, bootstrap=1, rows=1, population_seed=0)
    if not 0 < config.rate < math.inf:
        raise ValueError(f"--rate: got {config.rate}, expected more than 0")
    trial, encoder = mtmt_data.load(config)
    outcome = config.policy_outcome or trial.outcomes[-1]
    mtmt_policy.direction(trial.outcomes, outcome)
    mtmt_data.check_people(trial, config.folds)
    workdir = Path(config.workdir)
    _same_run(workdir, config, trial)
    with contextlib.suppress(ValueError):  # damaged further up: only a note needs it
        sweep_log.read_lines(workdir)  # cuts a line off that a kill cut short
    writer = writers.jsonl(workdir / "metrics.jsonl")
    predictions: dict[str, list[np.ndarray]] = {name: [] for name in names}
    traced: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}  # of an epoch
    folds_of = {
        seed: training.make_folds(trial.arm, config.folds, seed, config.validation)
        for seed in seeds
    }
    total = len(names) * len(seeds)
    with tqdm(total=total, disable=None if config.progress else True) as bar:
        for name in names:
            bar.set_description(name)
            trainer = None
            for seed in seeds:
                file = workdir / "predictions" / f"{_file_name(name)}-{seed}.npy"
                if not file.exists():
                    folds = folds_of[seed]
                    if name in BOOSTED:
                        found = training.boosted_out_of_fold(
                            name, trial, folds, seed=seed
                        )
                    else:
                        trainer = trainer or _trainer(config, name, trial, folds)
                        found, seconds[name] = _trained(
                            config, name, trainer, trial, folds, seed, writer
                        )
                        traced[name] = trainer.traced
                    _save_array(file, found)
                predictions[name].append(np.load(file, allow_pickle=False))
                bar.update()
    arrays = {name: np.stack(p) for name, p in predictions.items()}
    kept = next((n for n in ("MTMT", FULL_SIZE) if n in names), None)
    about = {
        "policy_outcome": outcome,
        "encoder": None if encoder is None else encoder.to_json(),
    }
    if kept and not _has_final(workdir, kept, seeds[0]):
        _save_final(config, kept, trial, seeds[0], about)
    if (workdir / "model").exists():
        # Columns in another unit give the same features: the newest encoder counts.
        mtmt_model.amend(workdir / "model", **about)
    report = mtmt_report.write(
        workdir,
        trial,
        arrays,
        policy_outcome=outcome,
        bootstrap=config.bootstrap,
        seed=0,
        progress=config.progress,
        folds=np.stack(
            [training.fold_of(f, len(trial.arm)) for f in folds_of.values()]
        ),
        notes=_notes(
            config, trial, seconds, still_learning(workdir, config.epochs, names, seeds)
        ),
    )
    print(report)
    return Result(trial, arrays, traced, report)


def _check_mode(config: Config) -> None:
    """Refuses flags that would go unused: those of training or those of --predict."""
    other = [
        f"--{field.name}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
        and (field.name in _SCORING) != config.predict
        and field.name not in ("predict", "policy_outcome", "progress")
    ]
    if other:
        raise ValueError(
            f"{', '.join(other)}: {'not' if config.predict else 'only'} read with"
            " --predict; leave out one or the other"
        )
    missing = [f"--{name}" for name in _SCORING if not getattr(config, name)]
    if config.predict and missing:
        raise ValueError(f"--predict needs {', '.join(missing)}; see --help")


def _trainer(
    config: Config, name: str, trial: Trial, folds: training.Folds
) -> training.Trainer:
    return training.make_trainer(
        MODELS[name](len(trial.arms), len(trial.outcomes)),
        trial.x.shape[1],
        rate=config.rate,
        epochs=config.epochs,
        rows=folds.train.shape[1],
        batch=config.batch_size,
    )


def _trained(
    config: Config,
    name: str,
    trainer: training.Trainer,
    trial: Trial,
    folds: training.Folds,
    seed: int,
    writer: writers.Writer,
) -> tuple[np.ndarray, float]:
    """Out-of-fold predictions, and the median seconds of an epoch of all folds."""
    stamps = [time.perf_counter()]

    def each(i: int, losses: Mapping[str, float]) -> None:
        stamps.append(time.perf_counter())
        writer.write(i + 1, {"model": name, "seed": seed, **losses})

    state, scale = training.fit(
        trainer, trial, folds, epochs=config.epochs, seed=seed, each=each
    )
    found = training.out_of_fold(trainer, state, scale, trial, folds)
    return found, float(np.median(np.diff(stamps)))


def _save_final(
    config: Config, name: str, trial: Trial, seed: int, about: Mapping[str, object]
) -> None:
    """MTMT, trained on everyone but the rows that choose the epoch."""
    folds = training.make_folds(trial.arm, 1, seed, config.validation)
    trainer = _trainer(config, name, trial, folds)
    state, scale = training.fit(
        trainer,
        trial,
        folds,
        epochs=config.epochs,
        seed=seed,
        each=lambda i, losses: None,
    )
    mtmt_model.save(
        Path(config.workdir) / "model",
        jax.tree.map(lambda p: p[0], state.best),  # of the only fold
        sizes=mtmt_sizes(name, len(trial.arms), len(trial.outcomes)),
        features=trial.x.shape[1],
        mean=np.asarray(scale.mean[0]),
        spread=np.asarray(scale.spread[0]),
        about={
            **about,
            "model": name,
            "arms": list(trial.arms),
            "outcomes": list(trial.outcomes),
            "seed": seed,
        },
    )


def _has_final(workdir: Path, name: str, seed: int) -> bool:
    """Whether the saved model is that of this run."""
    file = workdir / "model" / "about.json"
    about = json_files.read(file) if file.is_file() else {}
    return (about.get("model"), about.get("seed")) == (name, seed)


def _same_run(workdir: Path, config: Config, trial: Trial) -> None:
    """Writes config.json; refuses a folder of another run, or of other people."""
    people = hashlib.sha256()  # in their order, for predictions are by row
    for a in (trial.x, trial.arm, trial.y):
        people.update(np.ascontiguousarray(a).tobytes())
    told: dict[str, object] = {"people": [len(trial.arm), people.hexdigest()]}
    told["networks"] = NETWORKS
    # A table's names are the user's: a model kept of others would be told wrongly.
    known = (trial.arms, trial.outcomes, trial.features)
    told["names"] = repr(known) if config.data == "table" else None
    about = dataclasses.asdict(config) | told
    file = workdir / "config.json"
    changed = study_store.changed(file, about, _AROUND)
    if changed and (workdir / "predictions").exists():
        said = ", ".join(
            f"other {k}" if k in told else f"{k}: {old!r}, now {new!r}"
            for k, (old, new) in changed.items()
        )
        raise ValueError(
            f"--workdir={workdir} holds predictions of another run ({said}); choose"
            " another folder, or remove this one"
        )
    if changed:  # what is of the other run goes, as its predictions did
        if (workdir / "model").exists():
            shutil.rmtree(workdir / "model")
        (workdir / "metrics.jsonl").unlink(missing_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    json_files.write(file, about, indent=2)


def _save_array(file: Path, x: np.ndarray) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, x, allow_pickle=False)
    os.replace(partial, file)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _notes(
    config: Config,
    trial: Trial,
    seconds: Mapping[str, float],
    learning: Sequence[str],
) -> tuple[str, ...]:
    about = {
        "hillstrom": "Hillstrom's e-mail experiment",
        "table": Path(config.data_path or "").name,
        "simulator": "*Synthetic*",
    }
    notes = [
        f"{about[config.data]}: {len(trial.arm):,} people, {trial.x.shape[1]} features;"
        f" {config.folds}-fold cross-validation, seeds {config.seeds}."
    ]
    if seconds:
        each = ", ".join(f"{n} {s:.1f}" for n, s in seconds.items())
        notes.append(f"Seconds of an epoch, all {config.folds} folds at once: {each}.")
    if learning:
        notes.append(
            f"Best on validation rows at the last of {config.epochs} epochs, with every"
            f" seed: {', '.join(learning)}. More epochs may change their places."
        )
    return tuple(notes)


def still_learning(
    workdir: Path, epochs: int, names: Collection[str], seeds: Collection[int]
) -> list[str]:
    """Networks whose validation error was least after the last epoch, of all seeds.

    Of these names and seeds, and not of epochs after the last one: the log may hold
    others. None if the log is damaged.
    """
    errors: dict[str, dict[int, dict[int, float]]] = {}
    try:
        for record in sweep_log.read_lines(workdir):
            name, seed, step = record["model"], record["seed"], record["step"]
            if name in names and seed in seeds and step <= epochs:
                of_seed = errors.setdefault(name, {}).setdefault(seed, {})
                of_seed[step] = float(record["validation"])
    except (ValueError, KeyError, TypeError):
        return []
    return [
        model
        for model, by_seed in errors.items()
        if all(min(e, key=lambda step: e[step]) == epochs for e in by_seed.values())
    ]


if __name__ == "__main__":
    flags.main(
        Config,
        flags.plain_errors(
            run,
            lambda config: (
                "nothing was written"
                if config.predict
                else "the same command goes on from there"
            ),
        ),
    )
