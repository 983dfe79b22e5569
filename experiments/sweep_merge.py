r"""Searches the coefficients of a merge against a score of your own.

    python -m experiments.sweep_merge --base=BASE --models=A,B,C --method=ties \
        --score=my_scores:accuracy --ranges='scale=0.2:2:10,density=0.1|0.2|0.5'

my_scores.py, found from the current directory, has `def accuracy(params) -> float`.
params is a dict from tensor names to arrays in the base's dtypes, tied names included;
"/" in names nests: "encoder/layer_0/kernel" is params["encoder"]["layer_0"]["kernel"],
"model.norm.weight" is a key as it is. Higher is better, unless --minimise.

Coefficients are the method's options (scale, density, t, ...), lines_alpha and
lines_beta, weights (the same range for each model; weights[0] for the first alone). All
flags of experiments.merge hold, for what isn't searched. Three searches:

  grid      --ranges='scale=0.2:2:10,density=0.1|0.2'   start:stop:count, or a|b|c
  cmaes     --ranges=scale=0.2:2,lines_beta=0:1.5       low:high; any score
  gradient  the same; the score must be JAX, and the coefficients among scale, t,
            lines_alpha, lines_beta, weights

The inputs are read once and kept in memory: base and models, and one merge at a time.
Coefficients that JAX can trace share one compiled program; others (density, words) are
compiled for each value, which takes longer than merging a small model.

Every score is a line of metrics.jsonl in --workdir. Stopped? The same command goes on
and tries nothing twice; other flags, inputs or a changed scoring module are refused.
A score that is NaN or infinite is a failure: never the best, and as bad as the worst so
far to cmaes; gradient stops there with an error. Also writes config.json, sweep.png and
report.md, with the best as a command of experiments.merge; --output writes that merge.
"""

import dataclasses
import functools
import hashlib
import importlib
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from experiments import candidates, flags, merge, parsing, search, sweep_log
from experiments.candidates import Candidates
from experiments.flags import flag
from multitask_jax import checkpoints


@dataclasses.dataclass(frozen=True)
class Config(merge.Config):
    """What to search, how, and what is fixed: all of experiments.merge's flags."""

    score: str = flag("module:function, from parameters to a number.", "")
    search: Literal["grid", "cmaes", "gradient"] = flag("How to search.", "grid")
    ranges: str = flag(
        "Coefficients, comma-separated: scale=0.2:2:10 or density=0.1|0.2 (grid),"
        " scale=0.2:2 (cmaes, gradient).",
        "",
    )
    budget: int | None = flag(
        "Candidates at most (grid: all; cmaes, gradient: 100).", None
    )
    search_seed: int = flag("Of cmaes.", 0)
    learning_rate: float = flag("Of gradient: Adam's, as a share of the range.", 0.05)
    minimise: bool = flag("Lower scores are better.", False)
    workdir: str = flag("Where the log and the report go.", ".cache/sweep_merge")


# What may change between two runs of one sweep: nothing that scores depend on.
AROUND = {"workdir", "output", "overwrite", "progress", "threads", "report"}
AROUND |= {"max_memory", "max_shard_size", "output_format", "out_dtype"}


class Result(NamedTuple):
    """The best candidate, and the log."""

    coefficients: dict[str, Any]
    score: float
    log: list[dict[str, Any]]  # as in metrics.jsonl
    command: str  # of experiments.merge


def run(config: Config) -> Result:
    """Searches, or goes on; writes the report, and the best merge to --output.

    Raises:
      ValueError (CheckpointError among them): a flag, an input or the score is not as
        it should be, or the work directory holds another sweep.
    """
    models = parsing.paths(config.models)
    if not models:
        raise ValueError("--models: got none; pass --models=A,B,C")
    for name in ("dry_run", "mergekit_config"):
        if getattr(config, name):
            raise ValueError(f"--{name} is of experiments.merge: a sweep has none")
    if config.dtype not in (None, "float32"):
        raise ValueError(
            f"--dtype={config.dtype}: candidates are scored in float32, so the best may"
            " not be the best there; leave it, or pass float32"
        )
    config = dataclasses.replace(config, models=",".join(models))
    space = read_space(config, len(models))
    first = {k: v[0] for k, v in space.items()}
    method = merge.build_method(candidates.config_at(config, first))
    score, source = load_score(config.score)
    statistics = parsing.paths(config.statistics) or []
    inputs = sorted({config.base or models[0], *models, *statistics})
    if config.output:
        paths = [Path(p).expanduser() for p in inputs]
        checkpoints.check_output(
            config.output,
            format=config.output_format,
            overwrite=config.overwrite,
            inputs=paths,
        )
    walk, most = start(config, space)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in AROUND}
    if config.search != "gradient":  # whose steps depend on their number
        del settings["budget"]
    settings["inputs"] = {p: candidates.fingerprint(p, config.base) for p in inputs}
    settings["score_module"] = source
    workdir = Path(config.workdir)
    logged = sweep_log.open_log(workdir, settings)

    @functools.cache
    def merges() -> Candidates:  # only if something is left to do
        return Candidates(config, candidates.read_inputs(config, method), score)

    sign = -1.0 if config.minimise else 1.0
    tried: list[dict[str, Any]] = []
    with tqdm(total=most, unit="merge", disable=not config.progress) as bar:
        for entry in follow(
            walk, logged, lambda c: evaluate(config, merges(), c), sign
        ):
            if len(tried) >= len(logged):
                sweep_log.append(workdir, entry)
            tried.append(entry)
            score_so_far = sweep_log.best_of(tried, sign)["score"]
            bar.set_postfix_str(f"best {score_so_far}", refresh=False)
            bar.update()

    best = sweep_log.best_of(tried, sign)
    if best["score"] is None:
        raise ValueError(
            f"all {len(tried)} scores are NaN or infinite; see {workdir}/metrics.jsonl"
        )
    chosen = candidates.config_at(config, best["coefficients"])
    command = sweep_log.command_of(chosen)
    report = sweep_log.write_report(
        f"{config.method}: {config.search} search",
        config.score,
        space,
        tried,
        sign,
        command,
    )
    (workdir / "report.md").write_text(report)
    sweep_log.draw(space, tried, sign, grid=config.search == "grid").savefig(
        workdir / "sweep.png", dpi=150
    )
    found = ", ".join(f"{k}={v}" for k, v in best["coefficients"].items())
    print(f"best of {len(tried)}: {best['score']:.6g} at {found}; {workdir}/report.md")
    if config.output:
        merge.run(chosen)
    else:
        print(command)
    return Result(best["coefficients"], best["score"], tried, command)


# What is searched, and how.


def read_space(config: Config, models: int) -> dict[str, tuple[Any, ...]]:
    """Values or ranges by coefficient; what needs a program of its own comes first.

    Raises:
      ValueError: unreadable, or a coefficient that the method or the search can't take.
    """
    parse = search.parse_grid if config.search == "grid" else search.parse_ranges
    space: dict[str, tuple[Any, ...]] = {}
    for name, values in parse(config.ranges).items():
        candidates.check_known([name], config, models)
        every = [f"weights[{t}]" for t in range(models)]
        for key in every if name == "weights" else [name]:
            if key in space:
                raise ValueError(f"--ranges: {key} is there twice")
            space[key] = values
    fixed = [k for k in space if not candidates.is_traced(k, config.method)]
    if config.search == "gradient" and fixed:
        raise ValueError(
            f"--search=gradient: {', '.join(fixed)} can't be differentiated; search"
            " them by grid or cmaes"
        )
    words = {k: v for k, v in space.items() if any(isinstance(x, str) for x in v)}
    for name in words:
        if name not in fixed:
            raise ValueError(
                f"--ranges: got {name}={'|'.join(map(str, space[name]))}, expected"
                " numbers"
            )
    return {k: space[k] for k in sorted(space, key=lambda k: k not in fixed)}


def start(config: Config, space: Mapping[str, Any]) -> tuple[search.Search, int]:
    """The search, and the number of candidates that it tries at most."""
    parsing.at_least(config, budget=1)
    if config.search == "grid":
        count = math.prod(len(v) for v in space.values())
        if config.budget is not None and count > config.budget:
            raise ValueError(
                f"--ranges: {count} candidates, more than --budget={config.budget};"
                " fewer values, or --search=cmaes"
            )
        return search.grid(space), count
    budget = config.budget or 100
    if config.search == "cmaes":
        return search.cma_es(space, budget=budget, seed=config.search_seed), budget
    if not config.learning_rate > 0:
        raise ValueError(f"--learning_rate: got {config.learning_rate}, expected > 0")
    rate = config.learning_rate
    return search.gradient_ascent(space, steps=budget, rate=rate), budget


def load_score(name: str) -> tuple[Callable[[Any], Any], str]:
    """A function by "module:function", and a hash of the module's source.

    Raises:
      ValueError: no such module or function.
    """
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(
            f"--score: got {name!r}, expected module:function, like my_scores:accuracy"
        )
    module_name, function = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise  # something that the module imports
        raise ValueError(
            f"--score: no module {module_name!r} in {os.getcwd()} or among installed"
            " packages"
        ) from None
    score = getattr(module, function, None)
    if not callable(score):
        own = {k: v for k, v in vars(module).items() if k[0] != "_" and callable(v)}
        known = [k for k, v in own.items() if v.__module__ == module_name]
        raise ValueError(
            f"--score: {module_name} has no function {function!r}; it has"
            f" {', '.join(known) or 'none'}"
        )
    source = getattr(module, "__file__", None)
    code = Path(source).read_bytes() if source else b""
    return score, hashlib.sha256(code).hexdigest()


def follow(
    walk: search.Search,
    logged: Sequence[dict[str, Any]],
    evaluated: Callable[[Mapping[str, Any]], dict[str, Any]],
    sign: float,
) -> Iterator[dict[str, Any]]:
    """Log entries of a search, the first ones from the log.

    Raises:
      ValueError: the search asks for something else than the log answers.
    """
    outcome = None
    for i in itertools.count():
        try:
            coefficients = walk.send(outcome)
        except StopIteration:
            return
        if i >= len(logged):
            entry = {"evaluation": i, **evaluated(coefficients)}
        elif (entry := logged[i])["coefficients"] != coefficients:
            raise ValueError(
                f"metrics.jsonl: line {i + 1} is about {entry['coefficients']}, the"
                f" search now tries {coefficients} there; choose another --workdir"
            )
        yield entry
        value = math.nan if entry["score"] is None else sign * entry["score"]
        slopes = entry.get("gradient", {})
        outcome = search.Outcome(value, {k: sign * v for k, v in slopes.items()})


def evaluate(
    config: Config, merges: Candidates, coefficients: Mapping[str, Any]
) -> dict[str, Any]:
    """What the log says of a candidate; a score of None is NaN or infinite."""
    begin = time.perf_counter()
    entry: dict[str, Any] = {"coefficients": dict(coefficients)}
    if config.search == "gradient":
        value, slopes = merges.value_and_gradient(coefficients)
        if not all(map(math.isfinite, (value, *slopes.values()))):
            raise ValueError(
                f"--search=gradient: the score at {coefficients} is {value}, its"
                f" gradient {slopes}: no way to go on from there; narrow --ranges"
            )
        entry |= {"score": value, "gradient": slopes}
    else:
        value = merges.value(coefficients)
        entry["score"] = value if math.isfinite(value) else None
    return entry | {"seconds": round(time.perf_counter() - begin, 4)}


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run, "the same command goes on from here"))
