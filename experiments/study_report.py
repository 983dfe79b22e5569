"""report.md and figures of the merging study, from its records alone.

Legend: S seeds, T tasks. "normalised" is a mean over tasks of accuracy / specialist's
accuracy (100 % is the specialists); "recovered" is how far the average has come from
the base's to the specialists'.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import report_file
from experiments.study_candidates import FIXED, LEFT_OUT, SLOW
from multitask_jax import merging
from multitask_jax.merging import report

Record = Mapping[str, Any]
EXPERTS = "specialists, own task"
table = functools.partial(report.table, rule="--:")
BARS, COUNTS = "methods.png", "tasks.png"
FRONT, DEPTH, TRIM = "forgetting.png", "conflicts.png", "redundancy.png"


class Records:
    """Records by part and row, and test accuracies [S, T]."""

    def __init__(
        self, names: Sequence[str], seeds: Sequence[int], records: Sequence[Record]
    ):
        self.names, self.seeds = list(names), list(seeds)
        self.by: dict[tuple[str, str, int], Record] = {
            (r["part"], r["row"], r["seed"]): r for r in records
        }

    def rows(self, part: str) -> list[str]:
        """Rows of a part that every seed has, in the order they were made."""
        found = dict.fromkeys(row for p, row, _ in self.by if p == part)
        return [r for r in found if all((part, r, s) in self.by for s in self.seeds)]

    def get(self, part: str, row: str) -> list[Record]:
        """A row's records, one a seed."""
        return [self.by[(part, row, s)] for s in self.seeds]

    def accuracy(self, part: str, row: str) -> np.ndarray:
        """[S, tasks of the row]."""
        return np.array([list(r["test"].values()) for r in self.get(part, row)])

    def references(self) -> dict[str, np.ndarray]:
        """[S, T] of the base, the specialists on their own tasks, the joint model."""
        own = np.stack(
            [
                self.accuracy("references", f"expert: {n}")[:, t]
                for t, n in enumerate(self.names)
            ],
            axis=1,
        )
        return {
            "base": self.accuracy("references", "base"),
            EXPERTS: own,
            "joint": self.accuracy("references", "joint"),
        }


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds, in %."""
    return report_file.over_seeds(100 * np.asarray(values))


def measures(accuracy: np.ndarray, reference: Mapping[str, np.ndarray]) -> list[str]:
    """Average, normalised, recovered, and accuracy by task, of [S, T]."""
    base, own = (reference[k].mean(axis=1) for k in ("base", EXPERTS))
    average = accuracy.mean(axis=1)
    # Where specialists learn nothing there is nothing to recover.
    learnt = bool((own > base).all())
    return [
        spread(average),
        spread((accuracy / reference[EXPERTS]).mean(axis=1)),
        spread((average - base) / (own - base)) if learnt else "",
        *(f"{100 * x:.1f}" for x in accuracy.mean(axis=0)),
    ]


def short(coefficients: Mapping[str, Any]) -> str:
    """Before/after: {"density": "0.2", "scale": 1.0} -> "density .2, scale 1"."""
    words = {"lines_alpha": "alpha", "lines_beta": "beta", "depth_mean": "mean"}
    words |= {"tall_lambda": "lambda", "off_diagonal": "off"}
    return ", ".join(f"{words.get(k, k)} {float(v):g}" for k, v in coefficients.items())


def main_table(records: Records) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """The table of methods, best first, and [S, T] of its rows."""
    reference = records.references()
    found = {row: records.accuracy("methods", row) for row in records.rows("methods")}
    order = sorted(found, key=lambda row: -found[row].mean())
    rows = [
        [f"*{name}*", *measures(accuracy, reference), "", "", "", ""]
        for name, accuracy in reference.items()
    ]
    for row in order:
        first = records.get("methods", row)[0]
        seconds, megabytes = first.get("merge_seconds"), first.get("merge_megabytes")
        gap = first.get("difference")
        rows.append(
            [
                row,
                *measures(found[row], reference),
                short(first["coefficients"]),
                "" if seconds is None else f"{seconds:.1f}",
                "" if megabytes is None else f"{megabytes:.0f}",
                "" if gap is None else "equal" if gap == 0 else f"{gap:.0e}",
            ]
        )
    header = ["model", "average", "normalised", "recovered", *records.names]
    header += ["chosen (first seed)", "s", "MB", "memory = disk"]
    return table(header, rows), [(row, found[row]) for row in order]


def write(
    workdir: Path, names: Sequence[str], seeds: Sequence[int], found: Sequence[Record]
) -> str:
    """Writes report.md and figures of what there is; returns the text."""
    records = Records(names, seeds, found)
    text, rows = main_table(records)
    paths = [f"![accuracy by method]({BARS})", ""]
    parts = ["# Merging study", "", *paths, text, "", *_notes(found)]
    _bars(workdir / BARS, records, rows)
    if gains := _lines(dict(rows)):
        parts += ["", "## What LiNeS adds", "", gains]
    if counted := records.rows("counts"):
        parts += ["", "## Number of tasks", "", f"![over tasks]({COUNTS})", ""]
        parts.append(_counts(workdir / COUNTS, records, counted))
    if ablated := records.rows("ablations"):
        parts += ["", "## What each step of TIES is worth", ""]
        parts.append(_ablations(records, ablated, dict(rows).get("ties")))
    first = Records(names, seeds[:1], found)
    if trimmed := first.rows("redundancy"):
        parts += ["", "## Trimmed specialists (test rows, first seed)", ""]
        parts += [f"![trimming]({TRIM})", ""]
        parts.append(_trim(workdir / TRIM, first, trimmed))
    if forgot := records.rows("forgetting"):
        parts += ["", "## LiNeS against forgetting", "", f"![front]({FRONT})", ""]
        parts.append(_forgetting(workdir / FRONT, records, forgot))
    if first.rows("conflicts"):
        depths = first.get("conflicts", "ties")[0]["depths"]
        parts += ["", "## Sign conflicts by depth", "", f"![conflicts]({DEPTH})"]
        _depth(workdir / DEPTH, depths)
    if first.rows("gradients"):
        record = first.get("gradients", "at the base")[0]
        body = [
            [n, *(f"{x:.2f}" for x in line)]
            for n, line in zip(record["tasks"], record["cosines"], strict=True)
        ]
        parts += ["", "## Cosines of the tasks' gradients at the base", ""]
        parts.append(table(["", *record["tasks"]], body))
    spent = sum(r["spent"] for r in found if r["part"] != "training")
    trained = sum(r["seconds"] for r in found if r["part"] == "training")
    parts += [
        "",
        f"{len(seeds)} seeds; mean ± standard deviation over seeds. Training took"
        f" {trained / 60:.1f} minutes, the rest {spent / 60:.1f}.",
        "",
    ]
    text = "\n".join(parts)
    (workdir / "report.md").write_text(text)
    return text


def _ablations(
    records: Records, ablated: Sequence[str], tuned: np.ndarray | None
) -> str:
    """Variants of TIES, and what each has over two forms of it, paired by seed.

    `tuned`: [S, T] of the main table's TIES, whose density is chosen, too.
    """
    reference = records.references()
    fixed = records.accuracy("ablations", "TIES") if "TIES" in ablated else None
    body = []
    for row in ablated:
        accuracy = records.accuracy("ablations", row)
        gains = [
            "" if x is None else spread((accuracy - x).mean(axis=1))
            for x in (fixed, tuned)
        ]
        chosen = short(records.get("ablations", row)[0]["coefficients"])
        body.append([row, *measures(accuracy, reference)[:3], *gains, chosen])
    head = ["TIES", "average", "normalised", "recovered", "over TIES at density .2"]
    head += ["over TIES, density chosen", "chosen (first seed)"]
    return table(head, body)


def _lines(found: Mapping[str, np.ndarray]) -> str:
    """Gains in average accuracy, paired by seed; "" without a pair."""
    body = []
    for row, accuracy in found.items():
        stem = row.removesuffix(" + LiNeS")
        others = [found.get(stem), found.get(f"{stem}, scaled")]
        if stem == row or all(x is None for x in others):
            continue
        gains = [
            "" if x is None else spread((accuracy - x).mean(axis=1)) for x in others
        ]
        body.append([stem, *gains])
    if not body:
        return ""
    return table(["LiNeS has over", "the method as it is", "scaled alike"], body)


def _notes(found: Sequence[Record]) -> list[str]:
    """What the table doesn't tell."""
    few = [f"{m} ({why})" for m, why in LEFT_OUT.items() if "a task" not in why]
    lines = [
        f"Left out: {', '.join(few)}; LiNeS on EMR and TALL masks, which keep a model"
        " a task: nothing of others is in them to be scaled down. Seconds and MB are of"
        " the command line as a process of its own (first seed; TALL masks: one task's"
        " model). Seconds without MB: of LiNeS' rows within this process, where"
        " programs are kept, and of what no command line has in memory, where the first"
        f" of alike rows compiles. LiNeS' rows of {', '.join(SLOW)} are not merged by"
        " the command line again."
    ]
    lines.append(
        "*scaled*: the task vector of a method without a scale, longer or shorter, by"
        " LiNeS' flags; *mean*: the scale, averaged over depth, in multiples of LiNeS'"
        " alpha."
    )
    for method, options in FIXED.items():
        said = ", ".join(f"{k} {v}" for k, v in options.items())
        lines.append(f"{method} has {said}.")
    spent = [r["spent"] for r in found if r["part"] == "statistics"]
    if spent:
        lines.append(
            f"Fisher's and RegMean's statistics took {spent[0]:.0f} s together, which"
            " is not in their seconds."
        )
    return lines


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


def _bars(path: Path, records: Records, rows: Sequence[tuple[str, np.ndarray]]) -> None:
    """What each method, without LiNeS and with it, has over the base."""
    reference = {k: 100 * v.mean() for k, v in records.references().items()}
    found = {row: 100 * accuracy.mean(axis=1) for row, accuracy in rows}
    stems = dict.fromkeys(row.removesuffix(" + LiNeS") for row in found)
    plain = list(stems)[::-1]
    figure = Figure((7, 0.27 * len(plain) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for suffix, colour, shift in (("", "C0", 0.2), (" + LiNeS", "C1", -0.2)):
        shown = {y + shift: found.get(r + suffix) for y, r in enumerate(plain)}
        shown = {y: values for y, values in shown.items() if values is not None}
        axes.barh(
            list(shown),
            [v.mean() - reference["base"] for v in shown.values()],
            0.4,
            left=reference["base"],
            xerr=[v.std(ddof=1) if len(v) > 1 else 0 for v in shown.values()],
            error_kw={"linewidth": 0.8},
            color=colour,
            label=suffix.strip() or "as it is",
        )
    for (name, value), style in zip(reference.items(), ("-", "--", ":"), strict=True):
        axes.axvline(value, color="0.2", linestyle=style, linewidth=1, label=name)
    axes.set_yticks(range(len(plain)), plain, fontsize=8)
    axes.set_ylim(-0.6, len(plain) - 0.4)
    axes.set_xlabel("accuracy on all tasks, % (test); bars begin at the base's")
    figure.legend(fontsize=7, loc="outside upper center", ncols=5)
    _save(figure, path)


def _counts(path: Path, records: Records, counted: Sequence[str]) -> str:
    """Normalised accuracy over the number of tasks merged."""
    own = records.references()[EXPERTS]
    lines: dict[str, dict[int, np.ndarray]] = {}
    for row in counted:
        label, n = row.rsplit(": ", 1)
        accuracy = records.accuracy("counts", row)
        lines.setdefault(label, {})[int(n)] = (accuracy / own[:, : int(n)]).mean(axis=1)
    for label, line in lines.items():
        if label in records.rows("methods"):
            accuracy = records.accuracy("methods", label)
            line[len(records.names)] = (accuracy / own).mean(axis=1)
    figure = Figure((5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for label, line in lines.items():
        mean = [100 * v.mean() for v in line.values()]
        axes.plot(list(line), mean, "o-", markersize=4, label=label)
    axes.set_xlabel("tasks merged")
    axes.set_ylabel("normalised accuracy, % (test)")
    axes.set_xticks(sorted({n for line in lines.values() for n in line}))
    axes.legend(fontsize=8)
    _save(figure, path)
    numbers = sorted({n for line in lines.values() for n in line})
    body = [
        [label, *(spread(line[n]) if n in line else "" for n in numbers)]
        for label, line in lines.items()
    ]
    return table(["normalised", *(f"{n} tasks" for n in numbers)], body)


def _trim(path: Path, records: Records, trimmed: Sequence[str]) -> str:
    figure = Figure((5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    body, densities = [], []
    for name in trimmed:
        record = records.get("redundancy", name)[0]
        densities = record["densities"]
        accuracy = [100 * v for v in record["test"]]
        (line,) = axes.plot(
            [100 * d for d in densities], accuracy, "o-", markersize=4, label=name
        )
        base = 100 * record["base"]
        axes.axhline(base, color=line.get_color(), linestyle=":", linewidth=1)
        body.append([name, *(f"{a:.1f}" for a in (*accuracy, base))])
    axes.set_xscale("log")
    axes.set_xlabel("largest changes kept, %")
    axes.set_ylabel("own accuracy, % (test; dotted: the base)")
    axes.legend(fontsize=8)
    _save(figure, path)
    return table(["kept", *(f"{100 * d:g} %" for d in densities), "base"], body)


def _forgetting(path: Path, records: Records, forgot: Sequence[str]) -> str:
    """Fronts of target against controls (first seed), and what alpha gives on test."""
    columns = min(3, len(forgot))
    rows = -(-len(forgot) // columns)
    figure = Figure((3.1 * columns, 2.6 * rows), layout="constrained")
    base = records.accuracy("references", "base")  # [S, T]
    body = []
    for i, name in enumerate(forgot):
        others = [n for n in records.names if n != name]
        axes = figure.add_subplot(rows, columns, i + 1)
        t = records.names.index(name)
        rest = [j for j in range(len(records.names)) if j != t]

        def both(accuracy: np.ndarray, t: int = t, rest: Any = rest) -> str:
            return f"{spread(accuracy[:, t])} / {spread(accuracy[:, rest].mean(1))}"

        line = [
            name,
            both(base),
            both(records.accuracy("references", f"expert: {name}")),
        ]
        points = []
        for way, style in (("LiNeS", "o-"), ("WiSE-FT", "s--")):
            every = [r[way] for r in records.get("forgetting", name)]
            found = [
                (100 * f[name], 100 * np.mean([f[n] for n in others]))
                for f in every[0]["validation"]
            ]
            points += found
            axes.plot(*np.transpose(found), style, markersize=3, label=way)
            test = np.array([[r["test"][n] for n in records.names] for r in every])
            alphas = ", ".join(f"{r['alpha']:g}" for r in every)
            line.append(f"{both(test)} ({alphas})")
        points = np.array(points)
        axes.plot(
            *points[merging.pareto_front(points)].T,
            "o",
            markersize=8,
            markerfacecolor="none",
            color="0.3",
            label="Pareto front",
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("target, %", fontsize=8)
        axes.set_ylabel("controls, %", fontsize=8)
        axes.tick_params(labelsize=7)
        if i == 0:
            axes.legend(fontsize=7)
        body.append(line)
    _save(figure, path)
    header = ["target / controls, test", "base", "specialist"]
    header += ["LiNeS (alphas)", "WiSE-FT (alphas)"]
    return table(header, body)


def _depth(path: Path, depths: Mapping[str, Any]) -> None:
    figure = Figure((5, 3), layout="constrained")
    axes = figure.add_subplot()
    conflicts = [100 * d["conflict_rate"] for d in depths.values()]
    axes.bar(range(len(depths)), conflicts)
    axes.set_xticks(range(len(depths)), list(depths), rotation=30, fontsize=7)
    axes.set_ylabel("sign conflicts, % of shared entries")
    _save(figure, path)
