"""merge_report.md, .json and figures, and the model card: what a merge did."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import multitask_jax
from multitask_jax.checkpoints.json_file import read_json
from multitask_jax.merging import interference
from multitask_jax.merging.census import SAMPLE_DENSITY, Census
from multitask_jax.merging.interference import Interference
from multitask_jax.merging.plan import Plan, human

_MAX_CARD = 1 << 20  # bytes of a model card that are looked at
_DEPTH_FIGURE, _COSINE_FIGURE = "merge_report_depth.png", "merge_report_cosines.png"


class Facts(NamedTuple):
    """What the files are about, besides the census."""

    base: Path | None  # None: the first model stands for it
    models: Sequence[Path]
    weights: Sequence[float | None]  # None: differs between tensors
    recipe: Mapping[str, Any]
    plan: Plan
    notes: Sequence[str]
    seconds: float
    yaml: str = ""  # of a mergekit recipe


def write(
    directory: Path, census: Census, facts: Facts, block_pattern: str | None
) -> list[str]:
    """Writes the report and the model card; returns the warnings in words."""
    total = interference.summarise(interference.add(list(census.leaves.values())))
    paths = [t.name for t in facts.plan.outputs]
    depths = interference.by_depth(census.leaves, paths, block_pattern)
    names = unique_names(facts.models)
    resolved = [m.resolve() for m in facts.models]
    repeated = [t for t, m in enumerate(resolved) if m in resolved[:t]]
    warnings = interference.warnings_in_words(
        total, names, repeated, base_is_first=facts.base is None
    )
    text = _markdown(census, facts, names, total, depths, warnings)
    (directory / "merge_report.md").write_text(text)
    data = {
        "version": multitask_jax.__version__,
        "recipe": dict(facts.recipe) | ({"yaml": facts.yaml} if facts.yaml else {}),
        "base": facts.base and str(facts.base),
        "models": [str(m) for m in facts.models],
        "weights": [w if w is None else float(w) for w in facts.weights],
        "warnings": warnings,
        "notes": list(facts.notes),
        "sampled": not census.exact,
        "total": _plain(total),
        "depths": {label: _plain(d) for label, d in depths.items()},
        "passes": len(facts.plan.passes),
        "seconds": round(facts.seconds, 2),
    }
    (directory / "merge_report.json").write_text(json.dumps(data, indent=1) + "\n")
    _figures(directory, names, total, depths, sampled=not census.exact)
    (directory / "README.md").write_text(card(facts, warnings))
    return warnings


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, with as many parents as tell them apart."""
    for parts in range(1, 5):
        names = ["/".join(p.parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{p.name} ({i + 1})" for i, p in enumerate(paths)]


def _plain(x: Interference) -> dict[str, Any]:
    """JSON has no NaN: None."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(v) for v in value]
        if isinstance(value, float):
            return round(value, 8) if np.isfinite(value) else None
        return value

    return {k: clean(np.asarray(v).tolist()) for k, v in vars(x).items()}


def _percent(x: float) -> str:
    return "-" if np.isnan(x) else f"{100 * x:.1f}%"


def _number(x: float) -> str:
    return "-" if np.isnan(x) else f"{x:.3g}"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, rule: str = "---"
) -> str:
    """A Markdown table; `rule` aligns all columns but the first: "--:" to the right."""
    lines = [header, ["---", *[rule] * (len(header) - 1)], *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _command(facts: Facts) -> str:
    """The flags that make this merge again."""
    flags = {k: v for k, v in facts.recipe.items() if v not in (None, "")}
    if facts.yaml:
        flags.pop("method")  # the recipe has it
    if not flags:
        return "(merged from Python with a chain of its own)"
    lines = ["python -m experiments.merge"]
    for k, v in flags.items():
        flag = f"--{'' if v else 'no'}{k}" if isinstance(v, bool) else f"--{k}={v}"
        lines.append(shlex.quote(flag))
    return " \\\n  ".join(lines)


def commands(facts: Facts) -> str:
    """The command, and the mergekit recipe if there is one, as Markdown."""
    recipe = f"\n\n```yaml\n{facts.yaml.rstrip()}\n```" if facts.yaml else ""
    return f"```\n{_command(facts)}\n```{recipe}"


def _weight(w: float | None) -> str:
    return "varies" if w is None else f"{float(w):.3g}"


def _markdown(
    census: Census,
    facts: Facts,
    names: Sequence[str],
    total: Interference,
    depths: Mapping[str, Interference],
    warnings: Sequence[str],
) -> str:
    how = (
        "counted over all entries"
        if census.exact
        else f"*estimated from a sample*, as if trimmed to density {SAMPLE_DENSITY}"
        " over the whole model"
    )
    rows = [
        [
            name,
            _weight(facts.weights[t]),
            _number(total.norms[t]),
            _number(total.relative_norms[t]),
            f"{total.base_cosines[t]:.4f}",
            _percent(total.redundant[t]),
            _percent(total.trimmed_mass[t]),
        ]
        for t, name in enumerate(names)
    ]
    header = ["model", "weight", "norm of tau", "relative", "cosine to base"]
    tasks = table([*header, "redundant", "trimmed mass"], rows)
    cosines = table(
        ["", *names],
        [[n, *map(_number, total.cosines[t])] for t, n in enumerate(names)],
    )
    each = " / ".join
    by_depth = table(
        ["depth", "parameters", "sign conflicts", "redundant", "trimmed mass", "norm"],
        [
            [
                label,
                f"{d.size:,}",
                _percent(d.conflict_rate),
                each(map(_percent, d.redundant)),
                each(map(_percent, d.trimmed_mass)),
                each(map(_number, d.norms)),
            ]
            for label, d in depths.items()
        ],
    )
    said = "\n".join(f"- **{w}**" for w in warnings) or "None."
    notes = "\n".join(f"- {n}" for n in facts.notes) or "None."
    merged, copied = len(facts.plan.merged), len(facts.plan.copied)
    read = human(facts.plan.read_bytes)
    return f"""# Merge report

{len(names)} models on the base `{facts.base or "(none)"}`. To make it again:

{commands(facts)}

## Warnings

{said}

## Interference

tau is a task vector, model - base. *Redundant*: share of parameters that trimming
removes; *trimmed mass*: share of |tau|^2 that goes with them; *sign conflicts*: of
the entries that two or more models keep, share where they pull in opposite directions.
Shares are {how}; norms and cosines are of all entries.

{tasks}

Sign conflicts: {_percent(total.conflict_rate)}. Cosines of task vectors:

{cosines}

![cosines of task vectors]({_COSINE_FIGURE})

## By depth

![interference by depth]({_DEPTH_FIGURE})

Columns with several numbers: {" / ".join(names)}.

{by_depth}

## Notes

{notes}

{merged} tensors merged, {copied} copied from the base. Inputs of {read}, read in
{len(facts.plan.passes)} passes; {human(facts.plan.write_bytes)} written in
{facts.seconds:.1f} s by multitask_jax {multitask_jax.__version__}.
"""


def _figures(
    directory: Path,
    names: Sequence[str],
    total: Interference,
    depths: Mapping[str, Interference],
    *,
    sampled: bool,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2))  # fixed: a "constrained" layout takes long
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.15, top=0.91, wspace=0.22)
    left, middle, right = figure.subplots(1, 3)
    blocks = {k: d for k, d in depths.items() if k != "outside blocks"} or depths
    x = np.arange(len(blocks))
    for t, name in enumerate(names):
        left.plot(x, [100 * d.redundant[t] for d in blocks.values()], ".-", label=name)
        right.plot(x, [d.relative_norms[t] for d in blocks.values()], ".-")
    middle.plot(x, [100 * d.conflict_rate for d in blocks.values()], "k.-")
    titles = ("redundant parameters, %", "sign conflicts, %", "norm of tau / of base")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title + (" (sample)" if sampled and axes is not right else ""))
        axes.title.set_fontsize(9)
        axes.set_xlabel("depth")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(directory / _DEPTH_FIGURE)

    size = 2.2 + 0.45 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(total.cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for i in range(len(names)):
        for j in range(len(names)):
            value = _number(round(float(total.cosines[i, j]), 2))
            axes.text(j, i, value, ha="center", va="center", fontsize=8)
    axes.set_title("cosines of task vectors", fontsize=9)
    FigureCanvasAgg(figure).print_png(directory / _COSINE_FIGURE)


def card(facts: Facts, warnings: Sequence[str] = ()) -> str:
    """A model card with the metadata that Hugging Face tools read."""
    sources = ([facts.base] if facts.base else []) + list(facts.models)
    parents = dict.fromkeys(map(_hub_name, sources))
    listed = "\n".join(f"- {json.dumps(p)}" for p in parents)
    said = "\n".join(f"- {w}" for w in warnings) or "None."
    method = facts.recipe.get("method", "a chain of its own")
    weights = [f", weight {_weight(w)}" for w in facts.weights]
    models = "\n".join(
        f"- `{m}`{w}"
        for m, w in zip(facts.models, weights or [""] * len(facts.models), strict=True)
    )
    return f"""---
base_model:
{listed}
{_inherited(sources[0])}tags:
- merge
- multitask_jax
---
# {sources[0].name}, merged

A merge of {len(facts.models)} fine-tuned models by `{method}`, made with multitask_jax
{multitask_jax.__version__}. Interference between the models: `merge_report.md`.

Base: `{facts.base or "none"}`. Models:

{models}

{commands(facts)}

Warnings:

{said}
"""


def _hub_name(path: Path) -> str:
    """The name on the Hugging Face hub, if config.json has kept it, else the path."""
    try:
        name = read_json(path / "config.json").get("_name_or_path", "")
    except ValueError:
        name = ""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) else str(path)


def _inherited(base: Path) -> str:
    """Lines of the base's card that hold for what is made of it."""
    path = base / "README.md"
    if not path.is_file() or path.stat().st_size > _MAX_CARD:
        return ""
    text = path.read_text(errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    keys = "license|license_name|license_link|library_name|pipeline_tag"
    lines = re.findall(rf"^(?:{keys}): *\S+$", front[1] if front else "", re.MULTILINE)
    return "".join(f"{line}\n" for line in lines)
