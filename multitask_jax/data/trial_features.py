"""Features of people: columns of a `trial_table` as numbers that a model learns from.

    encoder = fit_encoder(schema.features, table.columns)
    x, *counts = encode(encoder, features_of(schema.features, text, where))
    t = trial_of(schema, table, encoder)

Numbers are standardised, categories one-hot. A category that the encoder has not seen
is all zeros there; what is missing becomes the median, or the most frequent value, of
the rows that the encoder was fitted on. A column that never varied there is 0, whatever
it holds elsewhere: weights of it would be untrained. All three are counted.

Legend: N people, F features.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from multitask_jax.data.trial_table import (
    KINDS,
    Kind,
    Schema,
    Table,
    missing,
    segments_of,
)
from multitask_jax.data.uplift import Trial


class Encoded(NamedTuple):
    """Features of people, and what was wrong with them."""

    x: np.ndarray  # [N, F] float32
    unknown: dict[str, int]  # values by column that the encoder has not seen
    missing: dict[str, int]  # values by column that were not there
    untrained: dict[str, int]  # values by constant column that are not the known one


class Encoder(NamedTuple):
    """How columns become features. JSON holds all of it."""

    kinds: Mapping[str, Kind]  # by column, in the order of features
    fill: Mapping[str, float | str]  # by column: what stands for a missing value
    scale: Mapping[str, tuple[float, float]]  # by column of numbers: mean, deviation
    categories: Mapping[str, tuple[str, ...]]  # by column of categories
    constant: tuple[str, ...] = ()  # columns with one value, which `fill` holds

    @property
    def features(self) -> tuple[str, ...]:
        """F names, in the order of x."""
        names: list[str] = []
        for name, kind in self.kinds.items():
            if kind == "category":
                names += [f"{name}={v}" for v in self.categories[name]]
            else:
                names.append(f"log1p({name})" if kind == "log" else name)
        return tuple(names)

    def to_json(self) -> str:
        """The text that `from_json` takes."""
        return json.dumps(self._asdict())

    @staticmethod
    def from_json(text: str) -> "Encoder":
        """The encoder that `to_json` wrote.

        Raises:
          ValueError: the text is not one.
        """
        try:
            found = json.loads(text)
            kinds = dict(found["kinds"])
            if wrong := set(kinds.values()) - set(KINDS):
                raise ValueError(f"kinds {wrong}")
            return Encoder(
                kinds,
                {name: found["fill"][name] for name in kinds},
                {
                    name: tuple(map(float, found["scale"][name]))
                    for name, kind in kinds.items()
                    if kind not in ("flag", "category")
                },
                {
                    name: tuple(found["categories"][name])
                    for name, kind in kinds.items()
                    if kind == "category"
                },
                tuple(name for name in kinds if name in found["constant"]),
            )
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"the encoder can't be read ({type(e).__name__}: {e}); expected what"
                " Encoder.to_json wrote: train the model again"
            ) from e


def fit_encoder(
    kinds: Mapping[str, Kind], columns: Mapping[str, np.ndarray]
) -> Encoder:
    """What `encode` needs to know.

    Args:
      kinds: of features, by column.
      columns: of `trial_table.features_of` or a Table.

    Raises:
      ValueError: a column has no value at all.
    """
    fill: dict[str, float | str] = {}
    scale, categories, constant = {}, {}, []
    for name, kind in kinds.items():
        column = columns[name]
        gaps = missing(kind, column)
        there = column[~gaps]
        if not len(there):
            raise ValueError(
                f"column {name}: got no value in {len(column)} rows, expected some to"
                " fit the encoder on"
            )
        values, counts = np.unique(there, return_counts=True)
        if len(values) == 1:  # the deviation need not tell: 48,000 times 0.1 has one
            constant.append(name)
        if kind in ("category", "flag"):
            fill[name] = values[counts.argmax()].item()
            if kind == "category":
                categories[name] = tuple(map(str, values))
            continue
        fill[name] = float(np.median(there))
        filled = _curve(kind, np.where(gaps, fill[name], column))
        # Of values so close that their squares vanish, 0 is no divisor.
        scale[name] = float(filled.mean()), float(filled.std()) or 1.0
    return Encoder(dict(kinds), fill, scale, categories, tuple(constant))


def encode(encoder: Encoder, columns: Mapping[str, np.ndarray]) -> Encoded:
    """Columns as features, and counts of what was unknown or missing.

    Args:
      encoder: of `fit_encoder`.
      columns: of `trial_table.features_of` or a Table.
    """
    parts, unknown, lacking, untrained = [], {}, {}, {}
    for name, kind in encoder.kinds.items():
        column = columns[name]
        gaps = missing(kind, column)
        lacking[name] = int(gaps.sum())
        filled = np.where(gaps, encoder.fill[name], column)
        if name in encoder.constant:
            untrained[name] = int((filled != encoder.fill[name]).sum())
            parts.append(np.zeros((len(column), 1)))
            continue
        if kind == "category":
            known = np.array(encoder.categories[name])
            hot = filled[:, None] == known[None]
            unknown[name] = int((~hot.any(axis=1)).sum())
            parts.append(hot)
            continue
        if kind != "flag":
            mean, deviation = encoder.scale[name]
            filled = (_curve(kind, filled) - mean) / deviation
        parts.append(filled[:, None])
    x = np.concatenate(parts, axis=1, dtype=np.float32)
    return Encoded(x, unknown, lacking, untrained)


def trial_of(schema: Schema, table: Table, encoder: Encoder) -> Trial:
    """The experiment, its features encoded.

    Args:
      schema: of the table.
      table: of `trial_table.table_of`.
      encoder: of `fit_encoder`, which sees features, no arm and no outcome.
    """
    return Trial(
        encode(encoder, table.columns).x,
        table.arm,
        table.y,
        encoder.features,
        schema.arms,
        tuple(schema.outcomes),
        tuple(kind == "flag" for kind in schema.outcomes.values()),
        segments_of(schema.features, table.columns),
    )


def _curve(kind: Kind, x: np.ndarray) -> np.ndarray:
    return np.log1p(x) if kind == "log" else x
