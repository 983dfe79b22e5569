import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags
from safetensors.numpy import load_file

from experiments import digits, flags, merge
from multitask_jax.models import digits_transformer as vit
from tests.experiments.common import from_flagfile

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"base", digits.EXPERTS, *digits.MERGES}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> digits.Config:
    folder = tmp_path_factory.mktemp("digits")
    return from_flagfile(digits.Config, "digits/smoke", workdir=str(folder))


@pytest.fixture(scope="module")
def result(config: digits.Config) -> digits.Result:
    return digits.run(config)


def test_demo_is_the_default() -> None:
    """`make merge` and `run(Config())` in a notebook show one and the same table."""
    assert from_flagfile(digits.Config, "digits/demo") == digits.Config()


def test_result(result: digits.Result) -> None:
    experts = {f"expert: {task}" for task in digits.TASKS}
    assert set(result.accuracy) == set(result.validation) == ROWS | experts
    for x in result.accuracy.values():
        assert x.shape == (1, len(digits.TASKS))
        assert np.all((x > 0) & (x <= 1))
    for t, task in enumerate(digits.TASKS):
        own = result.accuracy[f"expert: {task}"][:, t]
        np.testing.assert_array_equal(result.accuracy[digits.EXPERTS][:, t], own)
    best = max(x.mean() for m, x in result.validation.items() if m in digits.MERGES)
    assert result.validation[result.chosen].mean() == best


def test_even_a_brief_training_teaches(result: digits.Result) -> None:
    own, base = result.accuracy[digits.EXPERTS], result.accuracy["base"]
    assert own.mean() > base.mean()


def test_losses_fall(config: digits.Config, result: digits.Result) -> None:
    lines = (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {r["model"]: r["losses"] for r in records if "losses" in r}
    assert set(losses) == {"base", *digits.TASKS}
    for model, x in losses.items():
        assert np.mean(x[-3:]) < 0.8 * np.mean(x[:3]), model
    assert sum(r.get("split") == "test" for r in records) == len(result.accuracy)


def test_files(config: digits.Config, result: digits.Result) -> None:
    folder = Path(config.workdir)
    stored = json.loads((folder / "config.json").read_text())
    assert stored == dataclasses.asdict(config)
    report = (folder / "report.md").read_text()
    assert result.report in report
    for row in ROWS:
        assert f"| {row} |" in report or f"| **{row}** |" in report
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    heads = load_file(folder / "checkpoints" / "seed_0" / "heads.safetensors")
    assert heads["parity.weight"].shape == (2, digits.SHAPE.width)


def test_table_is_of_the_checkpoints_on_disk(
    config: digits.Config, result: digits.Result
) -> None:
    folder = Path(config.workdir)
    data = digits.all_tasks(digits.digits.load(seed=config.split_seed).test)
    heads = digits.read_heads(folder / "checkpoints" / "seed_0" / "heads.safetensors")
    merged = vit.load(folder / "merged" / "seed_0" / "ties_lines")
    got = digits.accuracies(merged, heads, data)
    np.testing.assert_array_equal(got, result.accuracy["TIES + LiNeS"][0])


def test_command_of_the_report_makes_the_same_checkpoint(
    config: digits.Config, result: digits.Result, tmp_path: Path
) -> None:
    command = result.report[result.report.index("python -m experiments.merge") :]
    argv = shlex.split(command)[3:]
    values = absl_flags.FlagValues()
    flags.define(merge.Config, values)
    values(["merge", *argv])
    made = flags.read(merge.Config, values)
    again = dataclasses.replace(made, output=str(tmp_path / "again"), progress=False)
    merge.run(again)
    first = Path(made.output) / "model.safetensors"
    second = tmp_path / "again" / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_second_run_trains_nothing(
    config: digits.Config,
    result: digits.Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(digits, "pretrain", refuse)
    monkeypatch.setattr(digits, "finetune", refuse)
    shutil.copytree(config.workdir, tmp_path / "copy")
    copy = dataclasses.replace(config, workdir=str(tmp_path / "copy"))
    again = digits.run(copy)
    for name, x in result.accuracy.items():
        np.testing.assert_array_equal(again.accuracy[name], x)
    # A config that trains otherwise must not find the old checkpoints.
    with pytest.raises(AssertionError, match="trained again"):
        digits.run(dataclasses.replace(copy, finetune_steps=41))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seeds", "0,0", "different numbers"),
        ("seeds", "0,00", "different numbers"),
        ("seeds", "one", "different numbers"),
        ("finetune_steps", 0, "finetune_steps: got 0, expected at least 20"),
        ("candidates", 0, "candidates: got 0, expected at least 1"),
    ],
)
def test_wrong_fields_are_refused_before_work(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    config = digits.Config(workdir=str(tmp_path / "new"))
    with pytest.raises(ValueError, match=message):
        digits.run(dataclasses.replace(config, **{field: value}))
    assert not (tmp_path / "new").exists()
