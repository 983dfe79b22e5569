r"""A LoRA adapter from a fine-tuned model: the truncated SVD of its task vector.

    python -m experiments.extract_lora --base=BASE --model=TUNED --rank=16 \
        --output=ADAPTER
    python -m experiments.extract_lora --base=BASE --model=TUNED --energy=0.95 \
        --dtype=bfloat16 --output=ADAPTER

ADAPTER is a directory that PEFT loads (adapter_config.json, adapter_model.safetensors)
and that experiments.merge takes as a model of BASE. Each matrix of the task vector
tau = TUNED - BASE is replaced by the nearest one of rank r, U_r S_r V_r^T (Eckart and
Young 1936), stored as B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T: factors of one size
lose least in a narrow dtype. --energy chooses r for each tensor.

What is no matrix (norms, biases), and embeddings unless --embeddings, is not in the
adapter unless --modules_to_save keeps it whole; report.md lists what that loses, and
the energy (share of |tau|^2) kept of each tensor, measured on the factors as stored.

The SVD is exact up to 1024 rows or columns and for --energy, else by randomised
subspace iteration (multitask_jax/merging/low_rank.py). In memory are the adapter and
one tensor a thread.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tqdm import tqdm

from experiments import flags, parsing
from experiments.flags import flag
from multitask_jax import checkpoints, tree
from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo
from multitask_jax.merging import task_arithmetic
from multitask_jax.merging.low_rank import factorise
from multitask_jax.merging.parallel import cores, one_blas_thread
from multitask_jax.merging.plan import Entry, human, plan_merge

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
PREFIX = "base_model.model."  # PEFT's, before the module's name
# Last words of modules that look rows up (embed_out is GPT-NeoX's head, a matrix).
_EMBEDDING = re.compile(
    r"(?!embed_out).*embed.*|wte|wpe|shared|relative_attention_bias", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to extract, and where to."""

    base: str = flag("Checkpoint that TUNED was fine-tuned from.", "")
    model: str = flag("The fine-tuned checkpoint, TUNED.", "")
    output: str = flag("Directory to write; it must not exist.", "")
    rank: int | None = flag(
        "Rank of every matrix (16); with --energy the most that one gets.", None
    )
    energy: float | None = flag(
        "Of each matrix the least rank that keeps this share of |tau|^2, (0, 1].", None
    )
    alpha: float | None = flag(
        "lora_alpha to store (the rank, so that alpha / r is 1).", None
    )
    include: str | None = flag("Regex: only these tensors get factors.", None)
    exclude: str | None = flag("Regex: these get none.", None)
    embeddings: bool = flag(
        "Factors for embeddings too (lora_embedding_A and _B). Beware of tied heads:"
        " PEFT changes them only in merge_and_unload.",
        False,
    )
    modules_to_save: str | None = flag(
        "Regex: modules with such a tensor are stored whole (norms, heads).", None
    )
    fan_in_fan_out: bool | None = flag(
        "Layers store their weights as [in, out] (GPT-2's Conv1D). None: as the shapes"
        " of biases say, else not.",
        None,
    )
    dtype: str = flag(f"Of the factors: {', '.join(DTYPES)}.", "float32")
    base_name: str | None = flag(
        "base_model_name_or_path in adapter_config.json (--base).", None
    )
    block_pattern: str | None = flag(
        "Finds a tensor's block for the figure where names are unusual.", None
    )
    threads: int | None = flag("Tensors at a time (one a core, 8 at most).", None)
    overwrite: bool = flag("Replace a checkpoint at --output.", False)
    progress: bool = flag("Show a progress bar.", True)


class Row(NamedTuple):
    """What became of one changed tensor."""

    name: str
    shape: tuple[int, ...]
    energy: float  # |tau|^2
    kept: float  # share of it in the adapter
    rank: int  # 0: no factors
    how: str  # "low rank", "whole", or why it is not in the adapter


class Result(NamedTuple):
    """What was written."""

    output: Path
    kept: float  # share of the whole task vector's |tau|^2
    rows: tuple[Row, ...]


def run(config: Config) -> Result:
    """Extracts the adapter and writes its report.

    Raises:
      ValueError (CheckpointError among them): a flag or a checkpoint is not as it
        should be; nothing was written.
    """
    check(config)
    base = checkpoints.open(config.base)
    model = checkpoints.open(config.model, base)
    inputs = [base.path, model.path]
    checkpoints.check_output(config.output, overwrite=config.overwrite, inputs=inputs)
    plan = plan_merge(task_arithmetic(), base, [model])
    names = [e.path for e in plan.merged]
    chosen = tree.select(names, include=config.include, exclude=config.exclude)
    saved = modules_to_save(config, names)
    flip = fan_in_fan_out(config, base)

    def work(e: Entry, keep: bool) -> tuple[Row, dict[str, np.ndarray]]:
        whole = any(e.path.startswith(f"{m}.") for m in saved)
        return extract(config, e, base, model, keep=keep, whole=whole, flip=flip)

    threads = config.threads or min(8, cores())
    with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        jobs = pool.map(work, plan.merged, chosen)
        bar = tqdm(jobs, "", len(names), unit="tensor", disable=not config.progress)
        found = list(bar)
    rows = [row for row, _ in found if row.energy]
    tensors = {name: x for _, some in found for name, x in some.items()}
    if not any(r.rank for r in rows):
        raise CheckpointError(
            f"{model.path}: no changed matrix named *.weight is selected: nothing to"
            " factorise"
        )
    total = sum(r.energy for r in rows)
    kept = sum(r.energy * r.kept for r in rows) / total
    settings = adapter_config(config, rows, saved, flip)
    infos = [TensorInfo(k, x.shape, x.dtype) for k, x in tensors.items()]
    with checkpoints.create(
        config.output,
        infos,
        overwrite=config.overwrite,
        inputs=inputs,
        stem="adapter_model",
    ) as writer:
        for name, x in tensors.items():
            writer.write(name, 0, np.ascontiguousarray(x).reshape(-1))
        folder = writer.directory
        text = json.dumps(settings, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text)
        lines = [json.dumps(r._asdict()) + "\n" for r in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
        size = sum(i.nbytes for i in infos)
        said = warnings(plan.copied, rows, base, model)
        (folder / "report.md").write_text(report(config, rows, kept, size, said))
        draw(rows, config.block_pattern, folder / "energy.png")
    model.close()
    base.close()
    for line in said:
        print(f"warning: {line}", file=sys.stderr)
    print(
        f"kept {kept:.1%} of the task vector's energy in {human(size)}; see"
        f" {config.output}/report.md"
    )
    return Result(Path(config.output), kept, tuple(rows))


def extract(
    config: Config,
    e: Entry,
    base: Reader,
    model: Reader,
    *,
    keep: bool,
    whole: bool,
    flip: bool,
) -> tuple[Row, dict[str, np.ndarray]]:
    """What becomes of one tensor, and what is stored of it.

    `keep`: --include and --exclude let it through; `whole`: --modules_to_save has it;
    `flip`: layers are stored [in, out].
    """
    module, _, last = e.path.rpartition(".")
    theta = model.read(e.path)
    tau = theta.astype(e.compute) - base.read(e.path).astype(e.compute)
    tau = tau.astype(np.float32, copy=False)
    energy = float(np.square(tau, dtype=np.float64).sum())
    if not np.isfinite(energy):
        raise CheckpointError(
            f"{e.path}: the task vector is not finite: the fine-tuning diverged, or a"
            " file is damaged"
        )
    row = Row(e.path, e.shape, energy, 0.0, 0, "unchanged")
    embedding = _EMBEDDING.fullmatch(module.rpartition(".")[2]) is not None
    if whole:  # changed or not: PEFT replaces modules, not tensors
        stored = {PREFIX + e.path: np.array(theta).reshape(e.shape)}
        return row._replace(kept=1.0, how="whole"), stored
    if not energy:
        return row, {}
    if len(e.shape) != 2 or last != "weight":
        return row._replace(how="no matrix of a layer"), {}
    if not keep:
        return row._replace(how="left out by --include or --exclude"), {}
    if embedding and not config.embeddings:
        return row._replace(how="an embedding (--embeddings)"), {}
    tau = tau.reshape(e.shape)
    tau = tau.T if embedding or flip else tau  # [out, in]
    b, a = _stored_factors(config, tau)
    rank = b.shape[1]
    tau = tau - _scaling(config, rank) * (b.astype(np.float32) @ a.astype(np.float32))
    kept = 1 - float(np.square(tau, dtype=np.float64).sum()) / energy
    kind = f"{PREFIX}{module}." + (
        "lora_embedding_{}" if embedding else "lora_{}.weight"
    )
    stored = {kind.format("A"): a, kind.format("B"): b}
    return row._replace(kept=kept, rank=rank, how="low rank"), stored


def check(config: Config) -> None:
    """Raises ValueError for what needs no checkpoint to be wrong."""
    for name in ("base", "model", "output"):
        if not getattr(config, name):
            raise ValueError(f"--{name}: got none; pass --{name}=PATH")
    parsing.at_least(config, rank=1, threads=1)
    if config.energy is not None and not 0 < config.energy <= 1:
        raise ValueError(f"--energy: got {config.energy}, expected a share in (0, 1]")
    if config.alpha is not None and not 0 < config.alpha < 1e9:
        raise ValueError(f"--alpha: got {config.alpha}, expected a positive number")
    if config.dtype not in DTYPES:
        raise ValueError(
            f"--dtype: got {config.dtype!r}, expected one of {', '.join(DTYPES)}"
        )


def modules_to_save(config: Config, names: Sequence[str]) -> list[str]:
    """The modules that hold a tensor which --modules_to_save finds."""
    if config.modules_to_save is None:
        return []
    try:
        found = tree.select(names, include=config.modules_to_save)
    except ValueError as e:
        raise ValueError(f"--modules_to_save: {e}") from None
    modules = [
        n.rpartition(".")[0] for n, keep in zip(names, found, strict=True) if keep
    ]
    if "" in modules:
        raise ValueError(
            f"--modules_to_save={config.modules_to_save!r} finds a tensor outside every"
            " module, which PEFT can't store"
        )
    return list(dict.fromkeys(modules))


def fan_in_fan_out(config: Config, base: Reader) -> bool:
    """Whether layers are stored [in, out]: the flag, or what biases' sizes say."""
    if config.fan_in_fan_out is not None:
        return config.fan_in_fan_out
    votes: dict[bool, str] = {}
    for name, info in base.tensors.items():
        bias = base.tensors.get(name.removesuffix("weight") + "bias")
        if name.endswith(".weight") and len(info.shape) == 2 and bias is not None:
            sides = [n == bias.size for n in info.shape]
            if sum(sides) == 1:
                votes.setdefault(sides[1], name)
    if len(votes) == 2:
        raise ValueError(
            f"{votes[True]} is stored [in, out], {votes[False]} [out, in], and PEFT has"
            " one flag for all: pass --fan_in_fan_out=true or false, and --exclude the"
            " others"
        )
    return votes.get(True) is not None


def _scaling(config: Config, rank: int) -> float:
    return 1.0 if config.alpha is None else config.alpha / rank


def _stored_factors(config: Config, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B [out, r] and A [r, in] as stored: alpha / r B A is near tau [out, in]."""
    rank = 16 if config.rank is None and config.energy is None else config.rank
    b, a = factorise(tau, rank, config.energy)
    root = np.float32(1 / np.sqrt(_scaling(config, b.shape[1])))
    dtype = DTYPES[config.dtype]
    return (root * b).astype(dtype), (root * a).astype(dtype)


def adapter_config(
    config: Config, rows: Sequence[Row], saved: Sequence[str], flip: bool
) -> dict[str, Any]:
    """What PEFT's LoraConfig reads."""
    ranks = {r.name.removesuffix(".weight"): r.rank for r in rows if r.rank}
    counts = list(ranks.values())
    rank = max(counts, key=counts.count)
    # Keys are regexes that PEFT finds at the end of a name, hence ^ and the escapes.
    others = {f"^{re.escape(m)}": r for m, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": config.base_name or config.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank if config.alpha is None else config.alpha,
        "rank_pattern": others,
        "alpha_pattern": others if config.alpha is None else {},
        "target_modules": list(ranks),
        "modules_to_save": list(saved) or None,
        "fan_in_fan_out": flip,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def warnings(
    copied: Sequence[TensorInfo], rows: Sequence[Row], base: Reader, model: Reader
) -> list[str]:
    """What a user should know is not in the adapter."""
    lost = [r for r in rows if not r.kept]
    total = sum(r.energy for r in rows)
    out = []
    if lost:
        share = sum(r.energy for r in lost) / total
        out.append(
            f"{len(lost)} changed tensors with {share:.1%} of the task vector's energy"
            " are not in the adapter (listed in report.md): --modules_to_save=REGEX"
            " stores them whole"
        )
    differ = [
        i.name
        for i in copied
        if i.name in model.tensors
        and not np.array_equal(base.read(i.name), model.read(i.name))
    ]
    if differ:
        out.append(f"integer tensors differ and are left out: {', '.join(differ[:5])}")
    return out


def report(
    config: Config, rows: Sequence[Row], kept: float, size: int, said: Sequence[str]
) -> str:
    """The tables in Markdown."""
    total = sum(r.energy for r in rows)
    command = [
        f"--{f.name}={value}"
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != f.default and f.name != "progress"
    ]
    groups: Mapping[str, list[Row]] = {
        "low rank": [r for r in rows if r.rank],
        "whole": [r for r in rows if r.how == "whole"],
        "not in the adapter": [r for r in rows if not r.kept],
    }
    lines = [
        "# LoRA extraction",
        "",
        "```",
        " \\\n  ".join(["python -m experiments.extract_lora", *command]),
        "```",
        "",
        f"**{kept:.2%} of the task vector's energy** (|tau|^2 of tau = model - base) is"
        f" in the adapter of {human(size)}.",
        "",
        *(f"- **{line}**" for line in said),
        "",
        "| tensors | number | share of energy | kept of that |",
        "|---|--:|--:|--:|",
    ]
    for name, group in groups.items():
        energy = sum(r.energy for r in group)
        inside = sum(r.energy * r.kept for r in group) / energy if energy else 0
        lines.append(f"| {name} | {len(group)} | {energy / total:.2%} | {inside:.2%} |")
    lines += [
        "",
        "## By tensor",
        "",
        "![energy kept by depth](energy.png)",
        "",
        "| tensor | shape | rank | share of energy | kept of that | |",
        "|---|---|--:|--:|--:|---|",
    ]
    for r in rows:
        shape = " x ".join(map(str, r.shape))
        share = f"{r.energy / total:.3%} | {r.kept:.2%}"
        lines.append(f"| `{r.name}` | {shape} | {r.rank or '-'} | {share} | {r.how} |")
    return "\n".join([*lines, ""])


def draw(rows: Sequence[Row], block_pattern: str | None, path: Path) -> None:
    """Energy kept over depth, a line for each kind of matrix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low_rank = [r for r in rows if r.rank]
    names = [r.name for r in low_rank]
    try:
        depths = tree.block_depths(names, block_pattern=block_pattern)
    except ValueError:  # no blocks: tensors one after the other
        depths = dict.fromkeys(names)
    lines: dict[str, list[tuple[int, float]]] = {}
    for i, r in enumerate(low_rank):
        depth = depths[r.name]
        inner = re.sub(r".*\.\d+\.", "", r.name).removesuffix(".weight")
        kind, x = (inner, depth.index) if depth else ("outside blocks", i)
        lines.setdefault(kind, []).append((x, 100 * r.kept))
    if len(lines) > 1:
        lines.pop("outside blocks", None)  # their places are no depths
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), ".-", label=kind)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("depth")
    axes.set_ylabel("energy kept, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(run))
