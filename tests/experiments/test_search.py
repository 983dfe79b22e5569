"""Spaces and searches, on functions whose optimum is known."""

import contextlib
import math
import sys

import numpy as np
import pytest

from experiments import candidates, search, sweep_merge
from experiments.search import Outcome
from multitask_jax import checkpoints, tree
from tests.merging.common import save


def walk(steps, outcome):
    """All coefficients that a search yields, answered by `outcome`."""
    seen, answer = [], None
    while True:
        try:
            coefficients = steps.send(answer)
        except StopIteration:
            return seen
        seen.append(coefficients)
        answer = outcome(coefficients)


def bowl(coefficients):
    """Highest, 0, where a = .7 and b = -1."""
    a, b = coefficients["a"] - 0.7, coefficients["b"] + 1
    return Outcome(-(a**2) - 3 * b**2, {"a": -2 * a, "b": -6 * b})


RANGES = {"a": (0.0, 2.0), "b": (-3.0, 0.0)}


def test_parse_grid():
    assert search.parse_grid("scale=0:1:3, density=0.1|0.2 ,scope=model|tensor") == {
        "scale": (0.0, 0.5, 1.0),
        "density": (0.1, 0.2),
        "scope": ("model", "tensor"),
    }
    assert search.parse_grid("t=0.1:0.7:7")["t"][2] == 0.3  # short to write
    assert search.parse_grid("t=1|1|2")["t"] == (1.0, 2.0)
    assert search.parse_grid("weights[0]=0.5") == {"weights[0]": (0.5,)}
    assert search.parse_grid("t=0:1:1")["t"] == (0.0,)


def test_parse_ranges():
    assert search.parse_ranges("a=0:2,b=-3:0") == RANGES


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        ("grid", "", "got nothing to search"),
        ("grid", "scale", "can't read 'scale', expected name=values"),
        ("grid", "scale=", "can't read 'scale=', expected name=values"),
        ("grid", "scale=0:1", "expected start:stop:count"),
        ("grid", "scale=0:1:0", "expected start:stop:count"),
        ("grid", "scale=0:1:2.5", "expected start:stop:count"),
        ("grid", "scale=0:inf:3", "expected start:stop:count"),
        ("grid", "scale=1||2", "expected values like"),
        ("grid", "scale=1|nan", "expected values like"),
        ("grid", "scale=1|2,scale=3", "scale is there twice"),
        ("ranges", "scale=0:1:3", "expected low:high.*for --search=grid"),
        ("ranges", "scale=0.1|0.2", "expected low:high"),
        ("ranges", "scale=2:1", "expected low:high"),
    ],
)
def test_unreadable_spaces(parse, text, message):
    parse = {"grid": search.parse_grid, "ranges": search.parse_ranges}[parse]
    with pytest.raises(ValueError, match=f"--ranges: .*{message}"):
        parse(text)


def test_grid_goes_through_all():
    got = walk(search.grid({"a": (1.0, 2.0), "b": ("x", "y")}), lambda c: Outcome(0))
    assert [tuple(c.values()) for c in got] == [
        (1.0, "x"),
        (1.0, "y"),
        (2.0, "x"),
        (2.0, "y"),
    ]


def test_gradient_finds_the_top_and_keeps_within_the_ranges():
    got = walk(search.gradient_ascent(RANGES, steps=100, rate=0.05), bowl)
    assert len(got) == 100
    np.testing.assert_allclose(list(got[-1].values()), [0.7, -1], atol=1e-2)

    def hill(c):
        return Outcome(c["a"], {"a": 1.0, "b": -1.0})

    got = walk(search.gradient_ascent(RANGES, steps=60, rate=0.1), hill)
    assert got[-1] == {"a": 2.0, "b": -3.0}
    assert all(0 <= c["a"] <= 2 and -3 <= c["b"] <= 0 for c in got)
    flat = walk(
        search.gradient_ascent(RANGES, steps=60, rate=0.1),
        lambda c: Outcome(1.0, {"a": 0.0, "b": 0.0}),
    )
    assert flat == [{"a": 1.0, "b": -1.5}]


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_cma_es_finds_the_top(names):
    pytest.importorskip("cmaes")
    ranges = {k: RANGES[k] for k in names}
    value = lambda c: bowl({"a": 0.7, "b": -1.0} | c)  # noqa: E731
    seen = walk(search.cma_es(ranges, budget=150, seed=0), value)
    best = max(seen, key=lambda c: value(c).value)
    want = {"a": 0.7, "b": -1.0}
    np.testing.assert_allclose(list(best.values()), [want[k] for k in names], atol=2e-2)
    # The same seed and answers, the same way; a longer one begins like a shorter one.
    again = walk(search.cma_es(ranges, budget=40, seed=0), value)
    assert again == seen[:40]
    assert walk(search.cma_es(ranges, budget=40, seed=1), value) != again


def test_cma_es_lives_with_failures():
    pytest.importorskip("cmaes")

    def half(c):
        return Outcome(math.nan) if c["a"] < 1 else bowl(c)

    seen = walk(search.cma_es(RANGES, budget=200, seed=0), half)
    finite = [c for c in seen if c["a"] >= 1]
    best = max(finite, key=lambda c: bowl(c).value)
    np.testing.assert_allclose(list(best.values()), [1.0, -1.0], atol=0.05)
    nothing = walk(
        search.cma_es(RANGES, budget=20, seed=0), lambda c: Outcome(math.nan)
    )
    assert len(nothing) == 20


def test_cma_es_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ValueError, match=r"pip install 'multitask-jax\[search\]'"):
        next(search.cma_es(RANGES, budget=10, seed=0))


def test_names_nest_at_slashes():
    flat = {"a/b": 1, "a/c/0": 2, "model.norm.weight": 3}
    assert tree.nest(flat) == {
        "a": {"b": 1, "c": {"0": 2}},
        "model.norm.weight": 3,
    }
    for names in (("a", "a/b"), ("a/b", "a")):
        with pytest.raises(ValueError, match="a"):
            tree.nest(dict.fromkeys(names, 0))


def test_changes_of_a_base_are_inputs_too(tmp_path):
    """A delta is a model with its base alone."""
    base = save(tmp_path / "base", {"w": np.ones((4, 4), np.float32)})
    infos = [checkpoints.TensorInfo("w", (4, 4), np.dtype(np.float32))]
    with (
        contextlib.closing(checkpoints.open(base)) as reader,
        checkpoints.create(
            tmp_path / "delta", infos, format="delta", base=reader
        ) as writer,
    ):
        writer.write("w", 0, np.full(16, 0.5, np.float32))
    found = candidates.fingerprint(str(tmp_path / "delta"), str(base))
    assert found
    assert all(size > 0 for _, size, _ in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mergekit_config": "r.yml"}, "--mergekit_config is of experiments.merge"),
        ({"dtype": "float64"}, "--dtype=float64: candidates are scored in float32"),
    ],
)
def test_flags_that_a_sweep_would_not_follow(changes, message):
    with pytest.raises(ValueError, match=message):
        sweep_merge.run(sweep_merge.Config(models="a,b", **changes))
