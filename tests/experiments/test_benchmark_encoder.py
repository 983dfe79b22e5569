"""The benchmark's sides: ours takes steps, theirs says what it lacks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments import benchmark_encoder
from experiments.benchmark_encoder import Config
from multitask_jax import training
from multitask_jax.models import bert

TINY = bert.Shape(vocab_size=50, width=16, depth=1, heads=4, mlp_width=24, positions=8)
CONFIG = Config(batch=2, length=8, steps=2, repeats=3)


def test_rates_are_sentences_by_the_median_turn() -> None:
    turns = {"training": iter([9.0, 4.0, 1.0, 2.0]), "inference": iter([9.0] * 4)}
    got = benchmark_encoder.measure(CONFIG, {"a": lambda kind, _: next(turns[kind])})
    # The first is the warm-up; then 2 x 2 sentences in 4, 1 and 2 seconds.
    assert got == {("a", "training"): 2.0, ("a", "inference"): 4 / 9}


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_ours_takes_steps(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of training are this library's, traced once, on a batch they are given."""
    steps, make_step = [], training.make_step

    def made(*args: Any) -> training.Step:
        steps.append(make_step(*args))
        return steps[-1]

    monkeypatch.setattr(training, "make_step", made)
    config = dataclasses.replace(CONFIG, products=products)
    alone = benchmark_encoder.PRODUCTS
    got = benchmark_encoder.measure(
        config,
        {
            "ours": benchmark_encoder.ours(config, TINY),
            alone: benchmark_encoder.products(config, TINY),
        },
    )
    ours = {("ours", "training"), ("ours", "inference")}
    assert set(got) == ours | {(alone, "inference")}
    assert min(got.values()) > 0
    (step,) = steps
    assert step.traced == [{"ids": (2, 8), "mask": (2, 8), "labels": (2,)}]


def test_unknown_products_are_refused() -> None:
    with pytest.raises(ValueError, match="--products: got 'half', expected one of"):
        benchmark_encoder.run(dataclasses.replace(CONFIG, products="half"))


def test_an_interpreter_that_fails_is_named(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    config = dataclasses.replace(CONFIG, torch_python=str(program))
    seconds, process = benchmark_encoder.theirs(config, TINY)
    with pytest.raises(ValueError, match=r"python ended early.*torch and transf"):
        seconds("training", 1)
    process.communicate()
    assert process.returncode == 1
