"""The uplift study on a table of one's own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments import mtmt, mtmt_data
from multitask_jax.data import trial_table
from tests.experiments.mtmt_common import one_thread


def table_of(ages: np.ndarray) -> str:
    """Two arms and one outcome of as many people as ages."""
    rng = np.random.default_rng(0)
    rows = [
        f"p{i},{age},{'ab'[i % 2]},{('none', 'call')[i % 3 == 0]},{rng.normal():.3f}"
        for i, age in enumerate(ages.tolist())
    ]
    return "\n".join(["id,age,plan,group,profit", *rows]) + "\n"


AGES = np.random.default_rng(0).integers(20, 80, 150)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A finished run on a table, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / "trial.csv").write_text(table_of(AGES))
    config = mtmt.Config(
        workdir="~/run", data="table", data_path="~/trial.csv", arm_column="group",
        control="none", features="age,plan", outcomes="profit",
        models="MTMT,GBM T-learner", folds=2, seeds="0", epochs=1, batch_size=32,
        bootstrap=20, progress=False,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as m, one_thread():
        m.setenv("HOME", str(home))
        yield config, home, mtmt.run(config)


def score(home: Path, people: str) -> dict[str, list[str]]:
    (home / "people.csv").write_text(people)
    mtmt.run(
        mtmt.Config(
            predict=True,
            checkpoint="~/run/model",
            input="~/people.csv",
            output="~/scored.csv",
        )
    )
    return trial_table.read_text(home / "scored.csv")[0]


def test_an_experiment_of_ones_own_is_learned_and_scored(own):
    """Columns that are not named are not looked at; ~ is the home in each path."""
    _, home, result = own
    assert result.trial.arms == ("none", "call")
    assert result.trial.features == ("age", "plan=a", "plan=b")
    assert result.predictions["MTMT"].shape == (1, 150, 2, 1)
    assert "trial.csv: 150 people, 3 features" in result.report
    assert "Only 20 bootstrap replicates" in result.report
    table = score(home, "age,plan,name\n40,a,x\n,c,y\n")
    assert list(table) == [
        *("age", "plan", "name", "expected_profit_none", "expected_profit_call"),
        *("uplift_profit_call", "best_arm"),
    ]


@pytest.mark.parametrize("models", ["MTMT", "GBM T-learner"])
def test_columns_in_another_unit_are_scored_in_it(own, models):
    """Nothing is trained anew, since features are the same; the encoder is not."""
    config, home, result = own
    people = "plan,age\na,40\nb,70\n"
    names = ("expected_profit_none", "uplift_profit_call")
    before = score(home, people)
    weights = (home / "run/model/model.safetensors").read_bytes()
    try:
        (home / "trial.csv").write_text(table_of(4 * AGES))
        again = mtmt.run(dataclasses.replace(config, models=models))
        assert not again.traced
        np.testing.assert_array_equal(again.trial.x, result.trial.x)
        assert (home / "run/model/model.safetensors").read_bytes() == weights
        after = score(home, people.replace("40", "160").replace("70", "280"))
        assert [after[n] for n in names] == [before[n] for n in names]
    finally:
        (home / "trial.csv").write_text(table_of(AGES))
        mtmt.run(config)


def test_other_people_are_said_in_words(own):
    """Not as hashes, nor as lists of features."""
    config, home, _ = own
    for other, said in (
        (table_of(AGES).replace(",b,", ",c,"), "other names"),
        (table_of(AGES[::-1]), "other people"),
        (table_of(AGES)[:-1] + "1\n", "other people"),
    ):
        (home / "other.csv").write_text(other)
        with pytest.raises(ValueError, match=rf"another run \({said}\); choose"):
            mtmt.run(dataclasses.replace(config, data_path="~/other.csv"))


@pytest.mark.parametrize(
    ("control", "arms", "expected"),
    [
        ("none", None, ("none", "call", "mail")),
        (None, "none,mail,call", ("none", "mail", "call")),
        ("none", "none, mail,call", ("none", "mail", "call")),
        ("none", "mail,call", ("none", "mail", "call")),
        ("mail", "none,call", ("mail", "none", "call")),
    ],
)
def test_arms_are_in_the_order_they_are_told(tmp_path, capsys, control, arms, expected):
    text = table_of(AGES).splitlines()
    text[1:40] = [line.replace("call", "mail") for line in text[1:40]]
    (tmp_path / "trial.csv").write_text("\n".join(text))
    config = mtmt.Config(
        data="table", data_path=str(tmp_path / "trial.csv"), arm_column="group",
        features="age", outcomes="profit", control=control, arms=arms,
    )  # fmt: skip
    trial = mtmt_data.load(config)[0]
    assert trial.arms == expected
    given = [line.split(",")[3] for line in text[1:]]
    assert [trial.arms[a] for a in trial.arm] == given
    told = f"arms: {expected[0]} is the control, {expected[1]} the base, {expected[2]}"
    assert told in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"treated arms \['call'\], expected each of"):
        mtmt_data.load(dataclasses.replace(config, control="none", arms="call"))
    with pytest.raises(ValueError, match="needs --control"):
        mtmt_data.load(dataclasses.replace(config, control=None, arms=None))


def test_a_column_is_seen_by_those_who_are_drawn(tmp_path):
    """What varies among others only can't be learned from."""
    ages = np.full(150, 30)
    config = mtmt.Config(
        data="table", data_path=str(tmp_path / "trial.csv"), arm_column="group",
        features="age,plan", outcomes="profit", control="none", rows=100,
    )  # fmt: skip
    ages[np.random.default_rng(0).permutation(150)[120]] = 70  # not drawn
    (tmp_path / "trial.csv").write_text(table_of(ages))
    trial, encoder = mtmt_data.load(config)
    assert len(trial.arm) == len(trial.segments["plan"]) == 100
    assert encoder.constant == ("age",)
