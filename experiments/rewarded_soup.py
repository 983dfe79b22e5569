r"""Rewarded soups: one model for every preference between rewards.

    python -m experiments.rewarded_soup --base=BASE --models=A,B \
        --score=my_rewards:rewards --steps=10

Rame et al. (2023), arXiv 2306.04488: models tuned from one base, each for a reward of
its own, are merged with weights w on the simplex, and what no other merge beats in all
rewards is a Pareto front to choose from afterwards. my_rewards.py, found from the
current directory, has `def rewards(params) -> dict` (or a tuple) of two numbers or
more, one a model as a rule, higher is better; params is as in experiments.sweep_merge.

Weights are all multiples of 1 / steps that add up to 1: steps + 1 merges of two models,
(steps + 1)(steps + 2) / 2 of three. Inputs are read once and kept in memory, with one
merge at a time. All flags of experiments.merge hold but --weights: --lines_beta for
LiNeS, or another method that takes weights.

Every merge is a line of metrics.jsonl in --workdir. Stopped? The same command goes on.
Rewards that are NaN or infinite are no answer, and never on the front. Also writes
config.json, pareto.png and report.md, with the command of the merge that is best for
--preference; --output writes that merge.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments import candidates, flags, merge, parsing, search, sweep_log
from experiments.candidates import Candidates
from experiments.flags import flag
from experiments.sweep_merge import AROUND, load_score
from multitask_jax import checkpoints, merging
from multitask_jax.merging.report import table


@dataclasses.dataclass(frozen=True)
class Config(merge.Config):
    """What to merge and score: all of experiments.merge's flags, and these."""

    method: str = flag(
        "task_arithmetic, which is the paper's sum w tau, or one that takes weights.",
        "task_arithmetic",
    )
    score: str = flag("module:function, from parameters to rewards.", "")
    steps: int = flag("Parts that the unit of weight is cut into.", 10)
    preference: str | None = flag(
        "Importance of each reward, like 2,1; the merge that is best for it is told, or"
        " written to --output (1 each)."
    )
    workdir: str = flag("Where log, report and plot go.", ".cache/rewarded_soup")


class Result(NamedTuple):
    """All merges tried, which are on the front, and the one that is preferred."""

    weights: np.ndarray  # [N, T]
    rewards: np.ndarray  # [N, R], NaN where a reward was no number
    front: np.ndarray  # bool [N]
    names: list[str]  # R
    best: int
    command: str  # of experiments.merge


def run(config: Config) -> Result:
    """Merges and scores, or goes on; writes the report, and a merge to --output.

    Raises:
      ValueError (CheckpointError among them): a flag, an input or the rewards are not
        as they should be, or the work directory holds another sweep.
    """
    models = parsing.paths(config.models) or []
    if len(models) < 2:
        raise ValueError(f"--models: got {len(models)}, expected two or more: A,B")
    for name in ("weights", "dry_run", "mergekit_config"):
        if getattr(config, name):
            raise ValueError(f"--{name} is of experiments.merge, this has none")
    config = dataclasses.replace(config, models=",".join(models))
    method = merge.build_method(candidates.config_at(config, {}))
    if not method.weighted:
        raise ValueError(f"--method={config.method} takes no weights")
    preference = parsing.numbers("preference", config.preference)
    score, source = load_score(config.score)
    inputs = sorted({config.base or models[0], *models})
    inputs += parsing.paths(config.statistics) or []
    if config.output:
        checkpoints.check_output(
            config.output,
            format=config.output_format,
            overwrite=config.overwrite,
            inputs=[Path(p).expanduser() for p in inputs],
        )
    around = {*AROUND, "preference"}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in around}
    settings["inputs"] = {p: candidates.fingerprint(p, config.base) for p in inputs}
    settings["score_module"] = source
    workdir = Path(config.workdir)
    grid = merging.simplex_grid(len(models), config.steps)
    logged = sweep_log.open_log(workdir, settings)

    @functools.cache
    def merges() -> Candidates:  # only if something is left to do
        return Candidates(config, candidates.read_inputs(config, method), score)

    log: list[dict[str, Any]] = []
    for i, row in enumerate(
        tqdm(grid, unit="merge", disable=not config.progress, desc="soups")
    ):
        if i < len(logged):
            log.append(logged[i])
            continue
        weights = [search.tidy(w) for w in row]
        begin = time.perf_counter()
        rewards = rewards_at(merges(), score, weights)
        if log and list(rewards) != list(log[0]["rewards"]):
            raise ValueError(
                f"--score: got rewards {list(rewards)} at weights {weights}, but"
                f" {list(log[0]['rewards'])} before"
            )
        seconds = round(time.perf_counter() - begin, 4)
        log.append(
            {
                "evaluation": i,
                "weights": weights,
                "rewards": rewards,
                "seconds": seconds,
            }
        )
        sweep_log.append(workdir, log[-1])
    return _finish(config, log, preference, workdir)


def rewards_at(
    merges: Candidates, score: Callable[[Any], Any], weights: Sequence[float]
) -> dict[str, float | None]:
    """Rewards by name; None is NaN or infinite.

    Raises:
      ValueError: the function returned something else than two numbers or more.
    """
    at = {f"weights[{t}]": w for t, w in enumerate(weights)}
    out = candidates.call_score(score, merges.params(at))
    if isinstance(out, tuple | list):
        out = {f"reward {i + 1}": x for i, x in enumerate(out)}
    if not isinstance(out, Mapping) or len(out) < 2:
        raise ValueError(
            f"--score returned {type(out).__name__} {str(out)[:80]}, expected a dict or"
            " a tuple of two numbers or more (one number: experiments.sweep_merge)"
        )
    if any(np.shape(x) for x in out.values()):
        shapes = {k: np.shape(x) for k, x in out.items()}
        raise ValueError(f"--score: got rewards of shapes {shapes}, expected numbers")
    values = {str(k): float(x) for k, x in out.items()}
    return {k: x if math.isfinite(x) else None for k, x in values.items()}


def _finish(
    config: Config,
    log: Sequence[Mapping[str, Any]],
    preference: Sequence[float] | None,
    workdir: Path,
) -> Result:
    """Front, choice, report and plot of a complete log."""
    names = list(log[0]["rewards"])
    weights = np.array([e["weights"] for e in log])
    rewards = np.array([list(e["rewards"].values()) for e in log], np.float64)
    good = np.isfinite(rewards).all(axis=1)
    if not good.any():
        raise ValueError(f"no merge has finite rewards; see {workdir}/metrics.jsonl")
    front = np.zeros(len(log), bool)
    front[good] = merging.pareto_front(rewards[good])
    importance = np.ones(len(names)) if preference is None else np.array(preference)
    if len(importance) != len(names):
        raise ValueError(
            f"--preference: got {len(importance)} numbers for {len(names)} rewards:"
            f" {', '.join(names)}"
        )
    best = int(np.where(front, rewards @ importance, -np.inf).argmax())
    listed = ",".join(map(str, weights[best]))
    chosen = dataclasses.replace(candidates.config_at(config, {}), weights=listed)
    result = Result(weights, rewards, front, names, best, sweep_log.command_of(chosen))
    labels = [Path(m).name for m in parsing.paths(config.models) or ()]
    (workdir / "report.md").write_text(write_report(config, result, labels, importance))
    draw(result, labels).savefig(workdir / "pareto.png", dpi=150)
    print(f"{front.sum()} of {len(log)} merges are on the front; {workdir}/report.md")
    if config.output:
        merge.run(chosen)
    else:
        print(result.command)
    return result


def corners(result: Result) -> np.ndarray:
    """Rewards [T, R] of the models alone: the merges of weight 1."""
    return np.stack(
        [result.rewards[w.argmax()] for w in result.weights.T], dtype=np.float64
    )


def write_report(
    config: Config, result: Result, labels: Sequence[str], importance: np.ndarray
) -> str:
    """Markdown: the front, the choice, and whether mixing pays."""
    weights, rewards, front, names, _, command = result
    order = [i for i in np.argsort(-rewards[:, 0], kind="stable") if front[i]]
    rows = [
        [f"{w:g}" for w in weights[i]] + [f"{r:.6g}" for r in rewards[i]] for i in order
    ]
    mixed = (weights.max(axis=1) < 1) & np.isfinite(rewards).all(axis=1)
    mean = weights @ corners(result)
    above = (rewards >= mean).all(axis=1) & mixed
    listed = ", ".join(f"{x:g} {n}" for x, n in zip(importance, names, strict=True))
    failed = int((~np.isfinite(rewards)).any(axis=1).sum())
    lines = [
        f"# Rewarded soups of {', '.join(labels)}: {len(rewards)} merges",
        "",
        f"`{config.method}`, rewards by `{config.score}`. {front.sum()} merges are on"
        " the Pareto front: no other one is as good in every reward and better in one.",
        "",
        table([*(f"weight of {m}" for m in labels), *names], rows),
        "",
        f"{above.sum()} of {mixed.sum()} mixtures reach, in every reward, the weighted"
        " mean of what the models alone have (if all do, the models are linearly"
        " connected in the paper's sense).",
        "",
        f"Best for {listed}:",
        "",
        f"    {command}",
        "",
        *([f"- Rewards of {failed} merges were NaN or infinite."] if failed else []),
        "- These rewards chose: report the merge's on data that they did not see.",
        "",
        "![Pareto front](pareto.png)",
        "",
    ]
    return "\n".join(lines)


def draw(result: Result, labels: Sequence[str]) -> Figure:
    """Rewards of all merges in pairs, with the front and the models alone."""
    pairs = list(itertools.combinations(range(len(result.names)), 2))[:6]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    alone = corners(result)
    two = len(result.names) == 2
    for axes, (i, j) in zip(panels, pairs, strict=False):
        x, y = result.rewards[:, i], result.rewards[:, j]
        axes.scatter(x, y, s=14, color="#b0b8c0", label="merges")
        front = sorted(zip(x[result.front], y[result.front], strict=True))
        line = ".-" if two else "."  # more rewards: their front is no line here
        axes.plot(*zip(*front, strict=True), line, color="#1170aa", label="front")
        axes.scatter(alone[:, i], alone[:, j], marker="s", color="#c85200", zorder=3)
        for label, a, b in zip(labels, alone[:, i], alone[:, j], strict=True):
            axes.annotate(label, (a, b), textcoords="offset points", xytext=(5, 5))
        if two and len(labels) == 2:
            axes.plot(alone[:, i], alone[:, j], ":", color="#c85200", label="mean")
        axes.set(xlabel=result.names[i], ylabel=result.names[j])
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    for axes in panels[len(pairs) :]:
        axes.remove()
    return figure


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run, "the same command goes on from here"))
