"""Rewarded soups of a problem whose rewards and front are known."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import merge, rewarded_soup
from experiments.candidates import Candidates
from multitask_jax import merging, tree
from tests.merging.common import assert_same_bits, load, save

# Models are unit steps from the base in directions of their own; reward t is how near
# a merge comes to model t. At weights w: -(|w|^2 - 2 w_t + 1).
REWARDS = """
import numpy as np
calls = 0

def at(params):
    global calls
    calls += 1
    return np.array([params[f"layers_{i}"]["w"][0] for i in range(3)])

def two(params):
    w = at(params)
    return {t: -np.sum((w - np.eye(3)[i]) ** 2) for i, t in enumerate(["help", "safe"])}

def as_tuple(params):
    return tuple(two(params).values())

def broken_in_the_middle(params):
    w = at(params)
    return two(params) if w[0] in (0, 1) else (float("nan"), 1.0)

def sometimes_nan(params):
    found = two(params)
    return found if at(params)[1] > 0.3 else found | {"help": float("inf")}

def one(params):
    return 3.0

def vectors(params):
    return {"a": at(params), "b": 1.0}
"""


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    base = {f"layers_{i}": {"w": np.zeros(2, np.float32)} for i in range(3)}
    save(tmp_path / "base", base)
    models = []
    for t in range(3):
        step = {k: {"w": np.zeros(2, np.float32)} for k in base}
        step[f"layers_{t}"]["w"][:] = 1, 3
        models.append(step)
        save(tmp_path / f"m{t}", step)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return base, models


def config(score="two", **fields):
    given = {"base": "base", "models": "m0,m1", "workdir": "work", "progress": False}
    given |= {"report": False, "steps": 4}
    return rewarded_soup.Config(score=f"my_rewards:{score}", **given | fields)


def known(weights):
    """[N, 2]"""
    squares = np.sum(weights**2, axis=1)[:, None]
    return -(squares - 2 * weights[:, :2] + 1)


def test_two_models_make_the_whole_front(inputs, capsys):
    result = rewarded_soup.run(config(output="out"))
    np.testing.assert_allclose(result.weights[:, 0], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(result.rewards, known(result.weights), atol=1e-6)
    assert result.front.all()
    assert result.names == ["help", "safe"]
    # Equal importance: halfway. The merge written is what the command writes.
    assert result.weights[result.best].tolist() == [0.5, 0.5]
    np.testing.assert_allclose(load(Path("out"))["layers_0/w"], [0.5, 1.5])
    words = shlex.split(result.command)
    options = dict(w[2:].split("=", 1) for w in words[3:])
    assert options.pop("output") == "out"
    merge.run(merge.Config(**options, output="again", progress=False, report=False))
    assert_same_bits(load(Path("again")), load(Path("out")))
    report = Path("work/report.md").read_text()
    assert "3 of 3 mixtures reach, in every reward, the weighted mean" in report
    assert "| 0.25 | 0.75 | -1.125 | -0.125 |" in report
    assert result.command in report
    assert Path("work/pareto.png").stat().st_size > 1000
    assert "5 of 5 merges are on the front" in capsys.readouterr().out


def test_what_serves_no_reward_is_off_the_front(inputs):
    result = rewarded_soup.run(config(models="m0,m1,m2", steps=10))
    want = known(result.weights)
    np.testing.assert_allclose(result.rewards, want, atol=1e-5)
    better = (want[None] >= want[:, None] - 1e-6).all(-1)
    better &= (want[None] > want[:, None] + 1e-6).any(-1)
    np.testing.assert_array_equal(result.front, ~better.any(axis=1))
    assert result.front[result.weights[:, 2] == 0].all()
    assert not result.front[result.weights[:, 2] > 0.35].any()
    assert len(result.front) == 66


def test_preference_moves_the_choice_and_merges_nothing_again(inputs):
    rewarded_soup.run(config("as_tuple"))
    before = sys.modules["my_rewards"].calls
    result = rewarded_soup.run(config("as_tuple", preference="3,1"))
    assert result.weights[result.best].tolist() == [0.75, 0.25]
    assert "--weights=0.75,0.25" in result.command
    assert result.names == ["reward 1", "reward 2"]
    assert sys.modules["my_rewards"].calls == before
    with pytest.raises(ValueError, match=r"--preference: got 3 numbers for 2 rewards"):
        rewarded_soup.run(config("as_tuple", preference="3,1,1"))


def test_lines_and_other_methods(inputs):
    """As `merging.rewarded_soup` has it, in memory."""
    base, models = inputs
    fields = {"lines_alpha": "0.2", "lines_beta": 0.8}
    result = rewarded_soup.run(config(output="out", preference="3,1", **fields))
    weights = result.weights[result.best][None]
    soups = merging.rewarded_soup(base, models[:2], weights, lines=(0.2, 0.8))
    want = {k: np.asarray(v)[0] for k, v in tree.flatten(soups).items()}
    assert_same_bits(load(Path("out")), want)
    assert "--lines_beta=0.8" in result.command
    linear = rewarded_soup.run(config(method="linear", workdir="linear"))
    np.testing.assert_allclose(linear.rewards, known(linear.weights), atol=1e-6)


def test_a_stopped_run_goes_on(inputs, monkeypatch):
    whole = rewarded_soup.run(config(workdir="whole"))
    params, seen = Candidates.params, []

    def stops(self, coefficients):
        seen.append(coefficients)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return params(self, coefficients)

    monkeypatch.setattr(Candidates, "params", stops)
    with pytest.raises(KeyboardInterrupt):
        rewarded_soup.run(config())
    log = Path("work/metrics.jsonl")
    assert len(log.read_text().splitlines()) == 2
    log.write_text(log.read_text() + '{"evaluation": 2, "wei')  # cut short
    result = rewarded_soup.run(config())
    assert len(seen) == 3 + 3
    np.testing.assert_array_equal(result.rewards, whole.rewards)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [x["evaluation"] for x in lines] == list(range(5))
    with pytest.raises(ValueError, match=r"holds another sweep, with other steps \(4"):
        rewarded_soup.run(config(steps=5))


def test_rewards_that_are_no_numbers_are_off_the_front(inputs):
    result = rewarded_soup.run(config("sometimes_nan"))
    assert result.front.tolist() == [True, True, True, False, False]
    assert np.isnan(result.rewards[3:, 0]).all()
    assert "Rewards of 2 merges were NaN" in Path("work/report.md").read_text()


@pytest.mark.parametrize(
    ("score", "fields", "message"),
    [
        ("one", {}, r"--score returned float 3\.0, expected a dict.*sweep_merge"),
        ("vectors", {}, r"got rewards of shapes \{'a': \(3,\), 'b': \(\)\}"),
        ("broken_in_the_middle", {}, r"got rewards \['reward 1', .*\['help', 'safe'\]"),
        ("two", {"models": "m0"}, "--models: got 1, expected two or more"),
        ("two", {"weights": "1,2"}, "--weights is of experiments.merge"),
        ("two", {"method": "slerp"}, "--method=slerp takes no weights"),
        ("two", {"steps": 0}, "steps: got 0"),
        ("two", {"output": "m0"}, "overlap"),
        ("three", {}, "no function 'three'; it has at, two"),
    ],
)
def test_errors(inputs, score, fields, message):
    with pytest.raises(ValueError, match=message):
        rewarded_soup.run(config(score, **fields))
    assert not Path("out").exists()
