"""The tables of the study of EgoM2P's claims.

Legend: N clips, S seeds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import egom2p_pictures as pictures
from experiments.egom2p_evaluation import TASKS, called
from experiments.egom2p_report import Measured, compared, counted, only, results
from multitask_jax.merging.report import table

_NOTES = """\
Held-out maps. A number is a mean over clips with its 95 % bootstrap interval (and the
number of clips); where there are several seeds, the mean over these and, behind +-,
their standard deviation. EgoM2P's numbers are those of the *mean* that it expects,
unless a row says sample (temperature 1, top-p .9) or *shown another clip* (their mean,
had the model been given another clip's tokens). *first held* is told the true first
value. Gaze is a *proxy*. Verdicts are about these runs on these maps: intervals
resample clips, neither seeds nor maps. At this size and with this data, not the
paper's.
"""


def write(
    workdir: Path, found: Mapping[str, Any], about: Sequence[str]
) -> dict[str, str]:
    """Writes report.md and curves.png; returns the verdicts by part."""
    parts, verdicts = ["# EgoM2P: what the paper claims, tested", *about, _NOTES], {}
    for name, part in (
        ("coverage", _coverage),
        ("decoding", _decoding),
        ("specialists", _specialists),
        ("masking", _masking),
        ("frames", _frames),
        ("merging", _merging),
    ):
        if name in found:
            title, text, verdict = part(found[name])
            parts += [f"## {title}", text, verdict]
            verdicts[name] = verdict
    drawn = [f"![{name}]({name}.png)" for name in curves(workdir)]
    parts += ["## Learning curves", *drawn]
    (workdir / "report.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    return verdicts


def curves(workdir: Path) -> list[str]:
    """Runs' validation losses over their steps: curves.png and regressors.png.

    Returns:
      Which of the two there are, without ".png".
    """
    drawn = []
    runs = {
        path.parent.name: json.loads(path.read_text())["history"]
        for path in sorted((workdir / "runs").glob("*/run.json"))
    }
    for file, y, special in (
        ("curves", "validation cross-entropy", False),
        ("regressors", "validation squared error", True),
    ):
        lines = {
            name: [
                {"step": r["step"], y: r["eval/loss"]}
                for r in history
                if "eval/loss" in r
            ]
            for name, history in runs.items()
            # What was tuned for one task has another loss than the mean over all.
            if name.startswith("regressor") == special and "tuned" not in name
        }
        if lines:
            pictures.curves(lines, y).savefig(workdir / f"{file}.png", dpi=110)
            drawn.append(file)
    return drawn


def _coverage(found: Mapping[str, list[Measured]]) -> tuple[str, str, str]:
    text, count = compared(
        found["all"], found["complete"], ("all clips", "complete clips")
    )
    title = "(a) Do clips that lack modalities help?"
    return title, text, f"All clips against the complete ones alone: {counted(count)}."


def _decoding(found: Mapping[str, Any]) -> tuple[str, str, str]:
    by_steps = {
        name: [only(one, name) for one in found["measured"]]
        for name in ("1 step", "few steps", "token by token")
    }
    text, count = compared(
        by_steps["few steps"],
        by_steps["token by token"],
        ("few steps", "token by token"),
    )
    rows = []
    for task in TASKS:
        if task.name not in found["measured"][0]:
            continue
        clock = {
            name: np.median([s[task.name][name] for s in found["seconds"]])
            for name in by_steps
        }
        ratio = clock["token by token"] / clock["few steps"]
        rows.append(
            [called(task.name), str(task.steps)]
            + [f"{1e3 * seconds:.3g}" for seconds in clock.values()]
            + [f"{ratio:.3g}"]
        )
    header = ["ms a clip", "few", *by_steps, "token by token / few"]
    first, _ = compared(
        by_steps["1 step"], by_steps["few steps"], ("1 step", "few steps")
    )
    text = "\n\n".join([text, first, table(header, rows)])
    title = "(b) Are a few steps of parallel decoding about as good as token by token?"
    return title, text, f"Few steps against token by token: {counted(count)}."


def _specialists(found: Measured) -> tuple[str, str, str]:
    title = "(c) One model for all tasks, or specialists?"
    model, special = (
        [only(found, name)] for name in ("EgoM2P, mean", "specialist regressor")
    )
    _, count = compared(model, special, ("EgoM2P", "regressor"))
    said = f"EgoM2P's mean against the regressors: {counted(count)}."
    for name in ("constant", "first held", "EgoM2P, shown another clip"):
        _, count = compared(model, [only(found, name)], ("", ""))
        said += f" Against {name}: {counted(count)}."
    return title, results(found, {}), said


def _masking(found: Mapping[str, Measured]) -> tuple[str, str, str]:
    first, *others = found.items()
    said = ""
    for name, one in others:
        _, count = compared([first[1]], [one], ("", ""))
        said += f"{first[0]} against {name}: {counted(count)}. "
    return "(d) How should masks be drawn?", _side_by_side(found), said


def _frames(found: Mapping[str, Any]) -> tuple[str, str, str]:
    first, second = found["measured"].values()
    _, count = compared([first], [second], ("", ""))
    said = f"Tokens of 4 frames against tokens of 1: {counted(count)}."
    names = {"rgb": "psnr", "depth": "abs_rel"}
    rows = [
        [tokens, *(f"{each[k][v]:.3g}" for k, v in names.items())]
        for tokens, each in found["quality"].items()
    ]
    lost = table(["what the tokens keep", "RGB, PSNR, dB", "depth, AbsRel"], rows)
    text = f"{_side_by_side(found['measured'])}\n\n{lost}"
    return "(e) Tokens of several frames, or of one?", text, said


def _merging(found: Mapping[str, Any]) -> tuple[str, str, str]:
    scales = ", ".join(f"{k} {v:g}" for k, v in found["scales"].items())
    said = f"Scales of task vectors, chosen on validation clips: {scales}."
    methods = list(next(iter(found["measured"].values())))
    one = {name: [only(found["measured"], name)] for name in methods}
    before, tuned = methods[:2]
    # All against the model before, merges against each task's own tuned one, too.
    pairs = [(name, before) for name in methods[1:]]
    pairs += [(name, tuned) for name in methods[2:]]
    for name, other in pairs:
        _, count = compared(one[name], one[other], ("", ""))
        said += f" {name[0].upper()}{name[1:]}, against {other}: {counted(count)}."
    return "Merged by experiments.merge", results(found["measured"], {}), said


def _side_by_side(found: Mapping[str, Measured]) -> str:
    merged: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        for task, methods in one.items():
            merged.setdefault(task, {})[name] = next(iter(methods.values()))
    return results(merged, {})
