"""Where `mtmt` gets people from: Hillstrom's file, a table of yours, or a simulator.

Legend: N people, A arms (arm 0 is the control), O outcomes.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments import parsing
from experiments.mtmt_predict import check_names
from multitask_jax.data import hillstrom, trial_features, trial_table, uplift_simulator
from multitask_jax.data.trial_features import Encoder
from multitask_jax.data.trial_table import Schema, Table
from multitask_jax.data.uplift import Trial

# People of an arm that are left to train on: boosting keeps a tenth to stop early by,
# which must have room for both classes of an outcome.
LEAST = 11
# Flags that each source reads; a flag of another one would go unused.
_READ = {
    "hillstrom": ("data_path", "download"),
    "table": ("data_path", "arm_column", "control", "arms", "features", "outcomes"),
    "simulator": ("effect", "population_seed"),
}


def load(config: Any) -> tuple[Trial, Encoder | None]:
    """The experiment, and how its people became features.

    Raises:
      ValueError: flags of another source, a flag that is missing, or the file is not
        as `trial_table` wants it.
      FileNotFoundError: there is no such file.
    """
    _check_flags(config)
    if config.data == "simulator":
        rows = config.rows or 20_000
        effect = 1.0 if config.effect is None else config.effect
        seed = config.population_seed or 0
        return uplift_simulator.simulate(rows, seed=seed, effect=effect), None
    schema, table = _hillstrom(config) if config.data == "hillstrom" else _own(config)
    if config.rows is not None and config.rows < len(table.arm):
        rng = np.random.default_rng(0)
        kept = np.sort(rng.permutation(len(table.arm))[: config.rows])
        columns = {name: column[kept] for name, column in table.columns.items()}
        table = Table(columns, table.arm[kept], table.y[kept])
    # Of those who are kept alone: what never varies among them can't be learned from.
    encoder = trial_features.fit_encoder(schema.features, table.columns)
    return trial_features.trial_of(schema, table, encoder), encoder


def _check_flags(config: Any) -> None:
    parsing.one_of("data", config.data, tuple(_READ))
    given = {
        name
        for names in _READ.values()
        for name in names
        if (value := getattr(config, name)) is not None and value is not False
    }
    if unused := sorted(given - set(_READ[config.data])):
        raise ValueError(
            f"{', '.join(f'--{n}' for n in unused)}: --data={config.data} does not"
            " read it; leave it out"
        )
    if config.download and config.data_path:
        raise ValueError("--download and --data_path: expected one of the two")
    free = "control" if config.arms else "arms"  # either tells the control
    missing = [n for n in _READ["table"] if n != free and getattr(config, n) is None]
    if config.data == "table" and missing:
        raise ValueError(
            f"--data=table needs {', '.join(f'--{n}' for n in missing)} too; see --help"
        )


def _hillstrom(config: Any) -> tuple[Schema, Table]:
    if config.download:
        from multitask_jax.data import hillstrom_builder  # tensorflow-datasets

        made = hillstrom_builder.builder()
        return hillstrom.SCHEMA, hillstrom_builder.read(made)
    root = os.environ.get("MULTITASK_DATA", "../shared")
    path = Path(config.data_path or f"{root}/data/uplift/hillstrom.csv")
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; give --data_path, the CSV of the MineThatData e-mail"
            " experiment, --download to get it from the internet, --data=table with a"
            " file of yours, or --data=simulator"
        )
    return hillstrom.SCHEMA, hillstrom.read(path)


def _own(config: Any) -> tuple[Schema, Table]:
    text, where = trial_table.read_text(config.data_path)
    control, treated = _arms(config)
    schema = trial_table.infer(
        text,
        where,
        features=parsing.paths(config.features) or [],
        arm=config.arm_column,
        control=control,
        outcomes=parsing.paths(config.outcomes) or [],
        treated=treated,
    )
    check_names(schema.arms, tuple(schema.outcomes))
    table = trial_table.table_of(schema, text, where)
    print(f"{where}: {', '.join(map(' '.join, _as_read(schema, table)))}")
    return schema, table


def _arms(config: Any) -> tuple[str, list[str] | None]:
    """The control, and the order of the others if it is told."""
    arms = parsing.paths(config.arms)
    if not arms:
        return config.control, None
    control = arms[0] if config.control is None else config.control
    return control, arms[1:] if arms[0] == control else arms


def _as_read(schema: Schema, table: Table) -> Iterator[list[str]]:
    """Of each column the name, the kind and how many are missing."""
    for name, kind in schema.features.items():
        gaps = trial_table.missing(kind, table.columns[name])
        yield [name, f"({kind}{f', {gaps.sum():,} missing' if gaps.any() else ''})"]
    control, base, *others = schema.arms
    roles = [f"{control} is the control", f"{base} the base", *others]
    yield [schema.arm, f"(arms: {', '.join(roles)})"]
    for name, kind in schema.outcomes.items():
        yield [name, f"(outcome, {kind})"]


def check_people(trial: Trial, folds: int) -> None:
    """Refuses so few people that boosting or the report would fail after training."""
    counts = np.bincount(trial.arm, minlength=len(trial.arms))
    left = counts - -(-counts // folds)  # outside the largest fold
    if left.min() < LEAST or counts.min() < folds:
        few = int(left.argmin())
        raise ValueError(
            f"got {counts[few]} people of {trial.arms[few]!r}, {left[few]} of them"
            f" outside a fold of --folds={folds}; expected at least {LEAST}, and one in"
            " each fold: give more --rows, or other folds"
        )
