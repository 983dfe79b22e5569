"""Merges fine-tuned checkpoints from disk to disk, in bounded memory.

    python -m experiments.merge --base=BASE --models=A,B,C --method=ties --output=OUT
    python -m experiments.merge --mergekit_config=recipe.yml --output=OUT
    python -m experiments.merge --flagfile=experiments/flagfiles/merge/ties.flags \
        --base=BASE --models=A,B,C --output=OUT

BASE, A, ... are safetensors files, Hugging Face directories, Orbax or flax msgpack
checkpoints; A, ... may be PEFT LoRA adapters of BASE too, or deltas. OUT is a directory
that appears when everything is done; merge_report.md in it tells how much the models
got in each other's way. --dry_run prints the plan.
"""

import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from experiments import flags, merge_recipe
from multitask_jax import merging


def _flag(text: str, default: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


def _methods() -> str:
    """One line a method, from the recipes' docstrings."""
    first = {k: inspect.getdoc(f) or "" for k, f in merging.METHODS.items()}
    return "\n".join(f"  {k}: {text.splitlines()[0]}" for k, text in first.items())


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge, how, and where to. None means: as the method has it."""

    models: str = _flag(
        "Fine-tuned checkpoints, comma-separated; with --base also PEFT LoRA adapters"
        " and deltas.",
        "",
    )
    output: str = _flag("Directory to write; it must not exist.", "")
    base: str | None = _flag(
        "Checkpoint that the models were fine-tuned from (linear, slerp and karcher go"
        " without; nuslerp and multislerp do either)."
    )
    mergekit_config: str | None = _flag(
        "A mergekit recipe (YAML): models or slices of layers, parameters with"
        " gradients and filters, tokenizer_source. Takes the place of --models, --base,"
        " --method and its options; paths in it are relative to its folder."
    )
    method: str = _flag(f"How to merge:\n{_methods()}\n", "ties")
    # Options of methods.
    weights: str | None = _flag("One number a model, comma-separated (1 each).")
    density: str | None = _flag(
        "Share of parameters to keep, in (0, 1]: one number, or one a model."
    )
    scale: float | None = _flag("lambda, what the merged task vector is scaled by (1).")
    t: float | None = _flag(
        "slerp: how far from the first model to the second (.5). nearswap: the farthest"
        " that an entry moves (.001)."
    )
    trim_scope: str | None = _flag(
        "Trim over the whole 'model' (TIES paper) or per 'tensor' (mergekit, PEFT)."
    )
    election: str | None = _flag(
        "Who elects the sign: 'mass' (sum of changes; paper, PEFT total),"
        " 'weighted_mass' (mergekit) or 'frequency' (PEFT)."
    )
    zero_sign: str | None = _flag(
        "Sign where the sum is 0: 'majority' of the model (paper), 'positive'"
        " (mergekit, PEFT), 'negative' or 'zero'."
    )
    combine: str | None = _flag("Entries that agree: their 'mean', 'sum' or 'max'.")
    normalise: str | None = _flag(
        "linear, task_arithmetic, dare: 'true' divides by the sum of weights. ties: the"
        " mean divides by 'weights' or, as PEFT, by the 'count' of models."
    )
    rescale: str | None = _flag(
        "After dropping or trimming: 'density' divides by it (DARE paper),"
        " 'probability' by that of each entry (DELLA paper), 'l1' keeps the L1 norm"
        " (mergekit), 'none'."
    )
    filter_wise: bool | None = _flag("model_stock: an angle for each row.")
    average: str | None = _flag("model_stock: mean of 'cosines' or of 'angles'.")
    ratio: str | None = _flag(
        "model_stock: 'clipped' to [0, 1], or the bare 'formula' (mergekit)."
    )
    antiparallel: str | None = _flag(
        "slerp, nuslerp, multislerp of opposite tensors: 'nearest' or 'lerp'."
    )
    gamma: str | None = _flag(
        "breadcrumbs: share of the largest changes to drop (.01); one, or one a model."
    )
    epsilon: float | None = _flag(
        "della: keep with probability density -+ epsilon (.15). ram: changes up to this"
        " count as none (1e-5)."
    )
    topk: float | None = _flag("sce: share of what varies between models to keep (1).")
    r: float | None = _flag("ramplus: how much unique changes are raised (.1).")
    alpha: float | None = _flag("ramplus: the most that shared / unique counts (.2).")
    clamp_ratio: float | None = _flag("pcb: share of tails to clip (1e-4).")
    iqr_factor: float | None = _flag("arcee_fusion: IQRs above the median (1.5).")
    k: int | None = _flag("consensus: tasks that an entry must serve (2).")
    tall_lambda: str | None = _flag(
        "tall_masks, consensus: how much of the other tasks' change a task's own must"
        " outweigh (.4); one, or one a model."
    )
    multi_task: str | None = _flag("tall_masks, consensus: merged by 'sum' or 'ties'.")
    task: int | None = _flag("tall_masks: the model to serve, from 0.")
    flatten: bool | None = _flag("nuslerp: tensors as vectors (true), or by rows.")
    row_wise: bool | None = _flag(
        "nuslerp: vectors along the first axis, not the last."
    )
    space: str | None = _flag(
        "nuslerp, multislerp, karcher: on 'task_vectors' or 'parameters'."
    )
    max_iter: int | None = _flag("karcher: steps at most (10).")
    tol: float | None = _flag("karcher: a shorter step is the last (1e-5).")
    seed: int | None = _flag("Of random masks: same seed, same bytes (0).")
    # LiNeS, after any method.
    lines_alpha: float | None = _flag(
        "LiNeS: scale of the first block and of all outside the blocks."
    )
    lines_beta: float | None = _flag("LiNeS: how much more the last block gets.")
    block_pattern: str | None = _flag(
        "Finds a tensor's block where names are unusual: a regex with a group for the"
        r" number, like 'layers\.(\d+)\.', or a template 'layers.{i}.'."
    )
    # Which tensors, and how they are stored.
    include: str | None = _flag("Regex: merge only these; others are the base's.")
    exclude: str | None = _flag("Regex: take these from the base.")
    allow_missing: str = _flag("'base': take tensors that a model lacks from it.", "")
    allow_nonfinite: bool = _flag(
        "Merge models with NaN or infinity all the same.", False
    )
    dtype: str | None = _flag(
        "Compute in float32 or float64 (float32, but float64 tensors in float64)."
    )
    out_dtype: str | None = _flag("Store as, e.g. bfloat16 (as in the base).")
    output_format: str = _flag(
        "safetensors, orbax or msgpack; or delta: the merged task vector alone, sparse"
        " where that is smaller, to be merged again with the same --base.",
        "safetensors",
    )
    max_shard_size: str | None = _flag("Largest file, like 5GB (one file).")
    overwrite: bool = _flag("Replace a checkpoint at --output.", False)
    # Around the merge.
    report: bool = _flag("Write merge_report.md, .json, figures, a model card.", True)
    dry_run: bool = _flag("Print the plan: tensors, bytes, memory, passes.", False)
    max_memory: str | None = _flag("Refuse to need more, like 8GB.")
    progress: bool = _flag("Show a progress bar.", True)
    threads: int | None = _flag("Threads that merge (two a core, 8 at most).")


# Flags that are a method's own keyword arguments.
_OPTIONS = tuple(
    f.name
    for f in dataclasses.fields(Config)
    if any(
        f.name in inspect.signature(recipe).parameters
        for recipe in merging.METHODS.values()
    )
)


def run(config: Config) -> merging.MergeResult:
    """Merges as `config` says; prints the plan and what to know of the result.

    Raises:
      ValueError (CheckpointError among them): a flag, an input or the output is not as
        it should be; nothing was written.
    """
    if not config.output and not config.dry_run:
        raise ValueError("--output: got none; pass the directory to write")
    _one_of("allow_missing", config.allow_missing, ("", "base"))
    if config.mergekit_config is not None:
        result = merge_recipe.merge(
            config,
            max_shard_size=_bytes("max_shard_size", config.max_shard_size),
            max_memory=_bytes("max_memory", config.max_memory),
        )
        return _said(config, result, f"by {config.mergekit_config}")
    models = [m.strip() for m in config.models.split(",") if m.strip()]
    if not models:
        raise ValueError("--models: got none; pass --models=A,B,C")
    result = merging.merge_checkpoints(
        build_method(config),
        config.base,
        models,
        config.output,
        weights=_numbers("weights", config.weights),
        include=config.include,
        exclude=config.exclude,
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        output_format=config.output_format,
        max_shard_size=_bytes("max_shard_size", config.max_shard_size),
        block_pattern=config.block_pattern,
        allow_missing=_one_of("allow_missing", config.allow_missing, ("", "base")),
        allow_nonfinite=config.allow_nonfinite,
        overwrite=config.overwrite,
        report_files=config.report,
        recipe=recipe_of(config),
        max_memory=_bytes("max_memory", config.max_memory),
        dry_run=config.dry_run,
        progress=config.progress,
        threads=config.threads,
    )
    return _said(config, result, f"{len(models)} models")


def _said(
    config: Config, result: merging.MergeResult, what: str
) -> merging.MergeResult:
    """Prints the plan of a dry run, or notes and what was done."""
    if config.dry_run:
        print(result.plan)
        return result
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    report = f"; see {result.output}/merge_report.md" if config.report else ""
    print(f"merged {what} in {result.seconds:.1f} s{report}")
    return result


def build_method(config: Config) -> merging.Method:
    """The recipe by its name with the options given, and LiNeS after it if asked for.

    Raises:
      ValueError: unknown method, or an option that it does not take.
    """
    recipe = _method(config.method)
    taken = inspect.signature(recipe).parameters
    options: dict[str, Any] = {}
    for name in _OPTIONS:
        value = getattr(config, name)
        if value is None:
            continue
        if name not in taken:
            raise ValueError(
                f"--{name}: {config.method} does not take it; it takes"
                f" {', '.join('--' + p for p in taken)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name}: got {value}, expected a finite number")
        if name in ("density", "gamma", "tall_lambda"):
            numbers = _numbers(name, value)
            value = numbers[0] if len(numbers) == 1 else tuple(numbers)
        elif name == "normalise":
            value = {"true": True, "false": False}.get(value.lower(), value)
            bool_wanted = isinstance(taken[name].default, bool)
            if isinstance(value, bool) is not bool_wanted:
                wanted = "true or false" if bool_wanted else "weights or count"
                raise ValueError(f"--normalise: got {value}, expected {wanted}")
        options[name] = value
    if "space" in taken and "space" not in options and config.base is None:
        options["space"] = "parameters"
    method = recipe(**options)
    alpha, beta = config.lines_alpha, config.lines_beta
    if alpha is None and beta is None:
        return method
    if alpha is None:
        raise ValueError("--lines_beta needs --lines_alpha too")
    return merging.with_lines(
        method,
        alpha=alpha,
        beta=1 - alpha if beta is None else beta,
        block_pattern=config.block_pattern,
    )


def recipe_of(config: Config) -> dict[str, Any]:
    """The flags that differ from their defaults: what reproduces the merge."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(Config)
        if f.name == "method" or getattr(config, f.name) != f.default
    }


def _method(name: str) -> Callable[..., merging.Method]:
    if name not in merging.METHODS:
        import difflib

        near = difflib.get_close_matches(name, merging.METHODS, n=1, cutoff=0.4)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--method: got {name!r}, expected one of"
            f" {', '.join(merging.METHODS)}{guess}"
        )
    return merging.METHODS[name]


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(x) for x in str(text).split(",")]
        if all(map(math.isfinite, numbers)):
            return numbers
        raise ValueError
    except ValueError:
        raise ValueError(
            f"--{name}: got {text!r}, expected numbers like 0.5,0.3"
        ) from None


def _one_of(name: str, value: str, options: tuple[str, ...]) -> Any:
    if value not in options:
        raise ValueError(f"--{name}: got {value!r}, expected one of {options}")
    return value


def _bytes(name: str, text: str | None) -> int | None:
    """Bytes of a size: 5GB -> 5 * 10**9, 512MiB -> 512 * 2**20."""
    if not text:
        return None
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", str(text).strip())
    if m is None or float(m[1]) == 0:
        raise ValueError(f"--{name}: got {text!r}, expected a size like 5GB or 512MiB")
    unit = 1024 if m[3] else 1000
    return int(float(m[1]) * unit ** " KMGT".index(m[2].upper() or " "))


def main(config: Config) -> None:
    """The script: errors of input end in one message, not in a traceback."""
    _keep_freed_memory()
    try:
        run(config)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")


def _keep_freed_memory() -> None:
    """Has glibc reuse freed chunk buffers, instead of giving them back each time.

    Page faults of fresh memory otherwise cost about half of a merge's time.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8
    mallopt(arena_max, 1)  # threads with a heap each would give it back too
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


if __name__ == "__main__":
    flags.main(Config, main)
