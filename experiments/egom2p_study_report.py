"""The tables of the study of EgoM2P's claims.

Legend: N clips, S seeds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import egom2p_pictures as pictures
from experiments import egom2p_report
from experiments.egom2p_evaluation import MEASURES, TASKS, bootstrap
from multitask_jax.merging.report import table

Measured = Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]

_NOTES = """\
Held-out maps. A number is a mean over clips with its 95 % bootstrap interval over them;
where there are several seeds, the mean over these and, behind +-, their standard
deviation. EgoM2P's numbers are those of the *mean* that it expects, unless a row says
sample (temperature 1, top-p .9) or *shown another clip* (their mean, had the model been
given another clip's tokens). *first held* is told the true first value. Gaze is a
*proxy*. At this size and with this data, not the paper's.
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
    curves(workdir)
    parts.append("## Learning curves\n\n![curves](curves.png)\n\n![regressors]"
                 "(regressors.png)")  # fmt: skip
    (workdir / "report.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    return verdicts


def curves(workdir: Path) -> None:
    """Every run's validation loss over its steps: curves.png and regressors.png."""
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
            if name.startswith("regressor") == special
        }
        if lines:
            pictures.curves(lines, y).savefig(workdir / f"{file}.png", dpi=110)


def compared(
    first: Sequence[Measured], second: Sequence[Measured], names: tuple[str, str]
) -> tuple[str, dict[str, int]]:
    """Two lists over seeds in one table, with intervals of the difference.

    Returns:
      The table, and how often the first is "better", "worse" or "undecided": whether
      the interval of the difference over clips, mean over seeds, excludes 0.
    """
    rows, count = [], {"better": 0, "worse": 0, "undecided": 0}
    for task in TASKS:
        if task.name not in first[0]:
            continue  # not asked for
        for measure, (unit, more) in MEASURES[task.wanted].items():
            values = [
                np.stack([next(iter(m[task.name].values()))[measure] for m in some])
                for some in (first, second)
            ]  # [S, N] each
            difference = np.mean(values[0] - values[1], axis=0)
            mean, low, high = bootstrap(difference if more else -difference)
            said = "better" if low > 0 else "worse" if high < 0 else "undecided"
            count[said] += 1
            label = f"{task.name}, {measure}{f', {unit}' if unit else ''}"
            rows.append(
                [
                    f"{label} {'up' if more else 'down'}",
                    *map(_over_seeds, values),
                    f"{mean:+.3g} ({low:+.3g} to {high:+.3g})",
                    said,
                ]
            )
    header = ["", *names, f"gain of {names[0]}", ""]
    return table(header, rows), count


def _over_seeds(values: np.ndarray) -> str:
    each = np.nanmean(values, axis=1)
    spread = f" +- {each.std(ddof=1):.2g}" if len(each) > 1 else ""
    return f"{each.mean():.3g}{spread}"


def _only(found: Measured, method: str) -> Measured:
    """What was measured of one method."""
    return {task: {method: methods[method]} for task, methods in found.items()}


def _said(count: Mapping[str, int]) -> str:
    return ", ".join(f"{k} in {v}" for k, v in count.items()) + " measures"


def _coverage(found: Mapping[str, list[Measured]]) -> tuple[str, str, str]:
    text, count = compared(
        found["all"], found["complete"], ("all clips", "complete clips")
    )
    title = "(a) Clips that lack modalities help"
    return title, text, f"All clips against the complete ones alone: {_said(count)}."


def _decoding(found: Mapping[str, Any]) -> tuple[str, str, str]:
    by_steps = {
        name: [_only(one, name) for one in found["measured"]]
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
            [task.name, str(task.steps)]
            + [f"{1e3 * seconds:.3g}" for seconds in clock.values()]
            + [f"{ratio:.3g}"]
        )
    header = ["ms a clip", "few", *by_steps, "token by token / few"]
    first, _ = compared(
        by_steps["1 step"], by_steps["few steps"], ("1 step", "few steps")
    )
    text = "\n\n".join([text, first, table(header, rows)])
    title = "(b) A few steps of parallel decoding are about as good as token by token"
    return title, text, f"Few steps against token by token: {_said(count)}."


def _specialists(found: Measured) -> tuple[str, str, str]:
    title = "(c) One model for all tasks, and specialists"
    model, special = (
        [_only(found, name)] for name in ("EgoM2P, mean", "specialist regressor")
    )
    _, count = compared(model, special, ("EgoM2P", "regressor"))
    said = f"EgoM2P's mean against the regressors: {_said(count)}."
    for name in ("constant", "first held"):
        _, count = compared(model, [_only(found, name)], ("", ""))
        said += f" Against {name}: {_said(count)}."
    return title, egom2p_report.results(found, {}), said


def _masking(found: Mapping[str, Measured]) -> tuple[str, str, str]:
    first, *others = found.items()
    said = " ".join(
        f"{first[0]} against {name}: {_said(compared([first[1]], [one], ('', ''))[1])}."
        for name, one in others
    )
    return "(d) How masks are drawn", _side_by_side(found), said


def _frames(found: Mapping[str, Any]) -> tuple[str, str, str]:
    first, second = found["measured"].values()
    _, count = compared([first], [second], ("", ""))
    said = f"Tokens of 4 frames against tokens of 1: {_said(count)}."
    names = {"rgb": "psnr", "depth": "abs_rel"}
    rows = [
        [tokens, *(f"{each[k][v]:.3g}" for k, v in names.items())]
        for tokens, each in found["quality"].items()
    ]
    lost = table(["what the tokens keep", "RGB, PSNR, dB", "depth, AbsRel"], rows)
    text = f"{_side_by_side(found['measured'])}\n\n{lost}"
    return "(e) Tokens of several frames", text, said


def _merging(found: Mapping[str, Any]) -> tuple[str, str, str]:
    scales = ", ".join(f"{k} {v:g}" for k, v in found["scales"].items())
    said = f"Scales of task vectors, chosen on validation clips: {scales}."
    return (
        "Merged by experiments.merge",
        egom2p_report.results(found["measured"], {}),
        said,
    )


def _side_by_side(found: Mapping[str, Measured]) -> str:
    merged: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        for task, methods in one.items():
            merged.setdefault(task, {})[name] = next(iter(methods.values()))
    return egom2p_report.results(merged, {})
