"""The MineThatData e-mail experiment (Hillstrom 2008).

    table = read("hillstrom.csv")               # 64,000 people, 3 arms, 3 outcomes
    encoder = trial_features.fit_encoder(SCHEMA.features, table.columns)
    trial = trial_features.trial_of(SCHEMA, table, encoder)

A third of the customers got an e-mail with men's merchandise, a third one with
women's, a third none; in the two weeks after: did they visit, did they buy, for how
many dollars.
"""

import os

from multitask_jax.data import trial_table
from multitask_jax.data.trial_table import Schema, Table

SCHEMA = Schema(
    features={
        "recency": "amount",
        "history": "log",
        "mens": "flag",
        "womens": "flag",
        "newbie": "flag",
        "history_segment": "category",
        "zip_code": "category",
        "channel": "category",
    },
    arm="segment",
    arms=("No E-Mail", "Mens E-Mail", "Womens E-Mail"),
    outcomes={"visit": "flag", "conversion": "flag", "spend": "amount"},
)


def read(path: str | os.PathLike[str]) -> Table:
    """The experiment's file, the public one or a sample of its rows.

    Raises:
      FileNotFoundError: no such file.
      ValueError: columns are missing or unexpected, or a value is not what it must be.
    """
    text, where = trial_table.read_text(path)
    table = trial_table.table_of(SCHEMA, text, where)
    expected = [*SCHEMA.features, SCHEMA.arm, *SCHEMA.outcomes]
    extra = sorted(set(text) - set(expected))
    if extra:
        raise ValueError(
            f"{where}: got the columns {extra}, expected only {expected}; is it another"
            " file? Remove them, for they may tell the outcome"
        )
    return table
