"""Merges fine-tuned checkpoints from disk to disk, in bounded memory.

    python -m experiments.merge --base=BASE --models=A,B,C --method=ties --output=OUT
    python -m experiments.merge --mergekit_config=recipe.yml --output=OUT
    python -m experiments.merge --flagfile=experiments/flagfiles/merge/ties.flags \
        --base=BASE --models=A,B,C --output=OUT
    python -m experiments.merge ... --coordinator=HOST:PORT --num_processes=2 \
        --process_id=0  # and 1, on another host; or just --distributed on a pod

BASE, A, ... are safetensors files, Hugging Face directories, Orbax or flax msgpack
checkpoints; A, ... may be PEFT LoRA adapters of BASE too, or deltas. OUT is a directory
that appears when everything is done; merge_report.md in it tells how much the models
got in each other's way. --dry_run prints the plan.

    python -m experiments.merge --base=BASE --models=A,B,C --output=OUT --mesh=model=8
    python -m experiments.merge --base=config.json --models=config.json,config.json \
        --mesh=model=256 --dry_run

The first merges on 8 devices (simulated ones on a CPU). The second tells what each of
256 would hold, from a config.json of Llama (or Mistral, Qwen2) without any weights.
"""

import contextlib
import dataclasses
import gc
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import multitask_jax
from experiments import flags, merge_recipe, parsing, signals
from experiments.flags import flag
from multitask_jax import merging, sharding
from multitask_jax.host_memory import keep_freed_memory
from multitask_jax.merging import distributed
from multitask_jax.merging.processes import ALONE, Group


def _methods() -> str:
    """One line a method, from the recipes' docstrings."""
    first = {k: inspect.getdoc(f) or "" for k, f in merging.METHODS.items()}
    return "\n".join(f"  {k}: {text.splitlines()[0]}" for k, text in first.items())


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge, how, and where to. None means: as the method has it."""

    models: str = flag(
        "Fine-tuned checkpoints, comma-separated; with --base also PEFT LoRA adapters"
        " and deltas.",
        "",
    )
    output: str = flag("Directory to write; it must not exist.", "")
    base: str | None = flag(
        "Checkpoint that the models were fine-tuned from (linear, slerp and karcher go"
        " without; nuslerp and multislerp do either)."
    )
    mergekit_config: str | None = flag(
        "A mergekit recipe (YAML): models or slices of layers, parameters with"
        " gradients and filters, tokenizer_source. Takes the place of --models, --base,"
        " --method and its options; paths in it are relative to its folder."
    )
    method: str = flag(f"How to merge:\n{_methods()}\n", "ties")
    # Options of methods.
    weights: str | None = flag("One number a model, comma-separated (1 each).")
    statistics: str | None = flag(
        "fisher, regmean: what merging.save_statistics wrote of each model's data,"
        " comma-separated: A/fisher.safetensors,B/fisher.safetensors."
    )
    density: str | None = flag(
        "Share of parameters to keep, in (0, 1]: one number, or one a model."
    )
    scale: float | None = flag("lambda, what the merged task vector is scaled by (1).")
    t: float | None = flag(
        "slerp: how far from the first model to the second (.5). nearswap: the farthest"
        " that an entry moves (.001)."
    )
    trim_scope: str | None = flag(
        "Trim over the whole 'model' (TIES paper) or per 'tensor' (mergekit, PEFT)."
    )
    election: str | None = flag(
        "Who elects the sign: 'mass' (sum of changes; paper, PEFT total),"
        " 'weighted_mass' (mergekit) or 'frequency' (PEFT)."
    )
    zero_sign: str | None = flag(
        "Sign where the sum is 0: 'majority' of the model (paper), 'positive'"
        " (mergekit, PEFT), 'negative' or 'zero'."
    )
    combine: str | None = flag("Entries that agree: their 'mean', 'sum' or 'max'.")
    combine_by: str | None = flag(
        "knots: in the shared basis by 'mean', 'ties' or 'dare_ties'."
    )
    input_axis: str | None = flag(
        "knots, wudi: where a matrix has its inputs, 'last' (torch) or 'first' (flax)."
    )
    eps: float | None = flag(
        "knots: leaves out singular values up to this part of the largest (1e-4)."
    )
    normalise: str | None = flag(
        "linear, task_arithmetic, dare: 'true' divides by the sum of weights. ties: the"
        " mean divides by 'weights' or, as PEFT, by the 'count' of models. fisher: each"
        " model's Fisher by its norm."
    )
    rescale: str | None = flag(
        "After dropping or trimming: 'density' divides by it (DARE paper),"
        " 'probability' by that of each entry (DELLA paper), 'l1' keeps the L1 norm"
        " (mergekit), 'none'."
    )
    filter_wise: bool | None = flag("model_stock: an angle for each row.")
    average: str | None = flag("model_stock: mean of 'cosines' or of 'angles'.")
    ratio: str | None = flag(
        "model_stock: 'clipped' to [0, 1], or the bare 'formula' (mergekit)."
    )
    antiparallel: str | None = flag(
        "slerp, nuslerp, multislerp of opposite tensors: 'nearest' or 'lerp'."
    )
    iterations: int | None = flag("wudi: steps of Adam (400).")
    common_fraction: float | None = flag(
        "iso_cts: share of singular directions that tasks have in common (.8)."
    )
    at_least: int | None = flag(
        "breadcrumbs, sce: entries kept of a tensor, whatever the density (1), or 0."
    )
    gamma: str | None = flag(
        "breadcrumbs: share of the largest changes to drop (.01); one, or one a model."
    )
    epsilon: float | None = flag(
        "della: keep with probability density -+ epsilon (.15). ram: changes up to this"
        " count as none (1e-5)."
    )
    topk: float | None = flag("sce: share of what varies between models to keep (1).")
    r: float | None = flag("ramplus: how much unique changes are raised (.1).")
    alpha: float | None = flag("ramplus: the most that shared / unique counts (.2).")
    clamp_ratio: float | None = flag("pcb: share of tails to clip (1e-4).")
    iqr_factor: float | None = flag("arcee_fusion: IQRs above the median (1.5).")
    k: int | None = flag("consensus: tasks that an entry must serve (2).")
    tall_lambda: str | None = flag(
        "tall_masks, consensus: how much of the other tasks' change a task's own must"
        " outweigh (.4); one, or one a model."
    )
    multi_task: str | None = flag("tall_masks, consensus: merged by 'sum' or 'ties'.")
    task: int | None = flag("tall_masks: the model to serve, from 0.")
    flatten: bool | None = flag("nuslerp: tensors as vectors (true), or by rows.")
    row_wise: bool | None = flag("nuslerp: vectors along the first axis, not the last.")
    space: str | None = flag(
        "nuslerp, multislerp, karcher: on 'task_vectors' or 'parameters'."
    )
    max_iter: int | None = flag("karcher: steps at most (10).")
    tol: float | None = flag("karcher: a shorter step is the last (1e-5).")
    fisher_floor: float | None = flag("fisher: added to each Fisher entry (1e-6).")
    off_diagonal: float | None = flag(
        "regmean: factor of the Gram matrices' entries off the diagonal (.9)."
    )
    seed: int | None = flag("Of random masks: same seed, same bytes (0).")
    # LiNeS, after any method.
    lines_alpha: str | None = flag(
        "LiNeS: scale of the first block and of all outside the blocks; or 'norm', the"
        " size of the average over that of the merged change (--lines_beta alone is"
        " then to be tuned)."
    )
    lines_beta: float | None = flag(
        "LiNeS: how much more the last block gets (1 - lines_alpha)."
    )
    block_pattern: str | None = flag(
        "Finds a tensor's block where names are unusual: a regex with a group for the"
        r" number, like 'layers\.(\d+)\.', or a template 'layers.{i}.'."
    )
    # Which tensors, and how they are stored.
    include: str | None = flag("Regex: merge only these; others are the base's.")
    exclude: str | None = flag("Regex: take these from the base.")
    allow_missing: str = flag("'base': take tensors that a model lacks from it.", "")
    allow_nonfinite: bool = flag(
        "Merge models with NaN or infinity all the same.", False
    )
    dtype: str | None = flag(
        "Compute in float32 or float64 (float32, but float64 tensors in float64)."
    )
    out_dtype: str | None = flag("Store as, e.g. bfloat16 (as in the base).")
    output_format: str = flag(
        "safetensors, orbax or msgpack; or delta: the merged task vector alone, sparse"
        " where that is smaller, to be merged again with the same --base.",
        "safetensors",
    )
    max_shard_size: str | None = flag("Largest file, like 5GB (one file).")
    overwrite: bool = flag("Replace a checkpoint at --output.", False)
    resume: bool = flag(
        "Go on with what a killed run of the same command had finished (or begin, if"
        " there is none), and keep what is finished if this one is interrupted. Another"
        " method, input or version is refused. Kept are statistics of the whole model"
        " and tensors, at the end of each file (--max_shard_size) or every 10 s.",
        False,
    )
    verify: bool = flag(
        "Write checksums of all tensors to merge_report.json (checksums.json with"
        " --noreport); `python -m experiments.verify OUT` checks them.",
        False,
    )
    # Around the merge.
    report: bool = flag("Write merge_report.md, .json, figures, a model card.", True)
    dry_run: bool = flag("Print the plan: tensors, bytes, memory, passes.", False)
    max_memory: str | None = flag("Refuse to need more, like 8GB.")
    progress: bool = flag("Show a progress bar.", True)
    threads: int | None = flag("Threads that merge (two a core, 8 at most).")
    # On several devices.
    mesh: str | None = flag(
        "Merge on a mesh of this host's devices (a CPU simulates them), parameters"
        " sharded over named axes: model=8, or data=2,model=4. With --dry_run any"
        " number, and the bytes of each device; checkpoints may then be JSON files of"
        ' names and shapes, {"NAME": {"dtype": "BF16", "shape": [8192]}, ...}, or a'
        " config.json of Llama, Mistral or Qwen2."
    )
    sharding_rules: str | None = flag(
        "How tensors lie on the mesh, REGEX=SPEC;REGEX=SPEC: the first regex found in a"
        " tensor's name counts, its SPEC names a mesh axis for each axis of the tensor,"
        " a+b for two and None for none: 'embed|lm_head=model,None;norm='. By default"
        " the largest axis that the devices divide, else replicated."
    )
    # Several processes, each started with the same command, on a shared file system.
    distributed: bool = flag(
        "Share the merge with the other processes of the TPU pod, Slurm or Open MPI job"
        " (jax.distributed finds them).",
        False,
    )
    coordinator: str | None = flag(
        "host:port of process 0, to share the merge with others by hand."
    )
    num_processes: int | None = flag("How many processes share it.")
    process_id: int | None = flag("Which of them this is, from 0.")


_PROCESSES = ("coordinator", "num_processes", "process_id")
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
    with processes_of(config) as group:
        return _run(config, group)


def _run(config: Config, group: Group) -> merging.MergeResult:
    allow_missing = parsing.one_of("allow_missing", config.allow_missing, ("", "base"))
    mesh, rules = mesh_of(config)
    if config.mergekit_config is not None:
        result = merge_recipe.merge(
            config,
            max_shard_size=parsing.size_in_bytes(
                "max_shard_size", config.max_shard_size
            ),
            max_memory=parsing.size_in_bytes("max_memory", config.max_memory),
            group=group,
        )
        return _said(config, group, result, f"by {config.mergekit_config}")
    models = parsing.paths(config.models)
    if not models:
        raise ValueError("--models: got none; pass --models=A,B,C")
    result = merging.merge_checkpoints(
        build_method(config),
        config.base,
        models,
        config.output,
        weights=parsing.numbers("weights", config.weights),
        statistics=parsing.paths(config.statistics),
        include=config.include,
        exclude=config.exclude,
        dtype=config.dtype,
        out_dtype=config.out_dtype,
        output_format=config.output_format,
        max_shard_size=parsing.size_in_bytes("max_shard_size", config.max_shard_size),
        block_pattern=config.block_pattern,
        allow_missing=allow_missing,
        allow_nonfinite=config.allow_nonfinite,
        overwrite=config.overwrite,
        resume=config.resume,
        verify=config.verify,
        report_files=config.report,
        recipe=recipe_of(config),
        max_memory=parsing.size_in_bytes("max_memory", config.max_memory),
        dry_run=config.dry_run,
        progress=config.progress,
        threads=config.threads,
        mesh=mesh,
        rules=rules,
        group=group,
    )
    return _said(config, group, result, f"{len(models)} models")


@contextlib.contextmanager
def processes_of(config: Config) -> Iterator[Group]:
    """The processes that the flags tell of, which must all have the same flags.

    Raises:
      ValueError: a flag is missing or wrong, or they do not find each other.
    """
    by_hand = {name: getattr(config, name) for name in _PROCESSES}
    missing = [f"--{name}" for name, value in by_hand.items() if value is None]
    if len(missing) == len(_PROCESSES) and not config.distributed:
        yield ALONE
        return
    if missing and not config.distributed:
        raise ValueError(
            f"{', '.join(missing)}: got none; several processes need --coordinator,"
            " --num_processes and --process_id, or --distributed alone where JAX finds"
            " them (TPU pods, Slurm, Open MPI)"
        )
    if config.mesh is not None:
        raise ValueError(f"--mesh: {merging.disk.NO_MESH_OF_PROCESSES}")
    with distributed.join(**by_hand) as group:
        group.agree("flags", (recipe_of(config), multitask_jax.__version__))
        yield group


def _said(
    config: Config, group: Group, result: merging.MergeResult, what: str
) -> merging.MergeResult:
    """Prints the plan of a dry run, or notes and what was done; one process does."""
    if group.index:
        return result
    if config.dry_run:
        print(result.plan)
        return result
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    report = f"; see {result.output}/merge_report.md" if config.report else ""
    print(f"merged {what} in {result.seconds:.1f} s{report}")
    return result


def mesh_of(config: Config) -> tuple[Any, Any]:
    """The mesh and the sharding rules that flags ask for, or None.

    Raises:
      ValueError: no such flags together, or fewer devices than they ask for.
    """
    if config.mesh is None:
        if config.sharding_rules is not None:
            raise ValueError("--sharding_rules needs --mesh too")
        return None, None
    if config.mergekit_config is not None:
        raise ValueError(
            "--mesh: recipes of --mergekit_config are merged without a mesh; leave"
            " either out"
        )
    axes, rules = sharding.parse_axes(config.mesh), config.sharding_rules
    mesh = sharding.host_mesh(axes, simulate=config.dry_run)
    return mesh, None if rules is None else sharding.parse_rules(rules)


def build_method(config: Config) -> merging.Method:
    """The recipe by its name with the options given, and LiNeS after it if asked for.

    Raises:
      ValueError: unknown method, or an option that it does not take.
    """
    recipe = recipe_named(config.method)
    taken = inspect.signature(recipe).parameters
    options: dict[str, Any] = {}
    for name in _OPTIONS:
        value = getattr(config, name)
        if value is None:
            continue
        if name not in taken:
            raise ValueError(
                f"--{name}: {config.method} does not take it; it takes"
                f" {', '.join('--' + p for p in taken if p in _OPTIONS)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name}: got {value}, expected a finite number")
        if name in ("density", "gamma", "tall_lambda"):
            numbers = parsing.numbers(name, value)
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
    alpha, beta = _lines_alpha(config.lines_alpha), config.lines_beta
    if alpha is None and beta is None:
        return method
    if alpha is None:
        raise ValueError("--lines_beta needs --lines_alpha too")
    if alpha == "norm" and beta is None:
        raise ValueError(
            "--lines_alpha=norm needs --lines_beta too (papers tune it from .1 to 1.5)"
        )
    return merging.with_lines(
        method,
        alpha=alpha,
        beta=1 - alpha if beta is None else beta,
        block_pattern=config.block_pattern,
    )


def _lines_alpha(value: Any) -> Any:
    """A number, "norm" or None; numbers may be traced."""
    if not isinstance(value, str) or value == "norm":
        return value
    try:
        if math.isfinite(number := float(value)):
            return number
    except ValueError:
        pass
    raise ValueError(
        f"--lines_alpha: got {value!r}, expected a number like 0.3, or norm"
    )


def recipe_of(config: Config) -> dict[str, Any]:
    """The flags that differ from their defaults: what reproduces the merge."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(Config)
        if (f.name == "method" or getattr(config, f.name) != f.default)
        and f.name not in (*_PROCESSES, "distributed", "resume")
    }


def flags_of(config: Config, *, leave_out: Sequence[str] = ()) -> list[str]:
    """`recipe_of` as words of a command line: ["--method=ties", "--report=false"]."""
    return [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in recipe_of(config).items()
        if name not in leave_out
    ]


def recipe_named(name: str) -> Callable[..., merging.Method]:
    """The recipe in `merging.METHODS`; ValueError with the nearest name otherwise."""
    if name not in merging.METHODS:
        import difflib

        near = difflib.get_close_matches(name, merging.METHODS, n=1, cutoff=0.4)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"--method: got {name!r}, expected one of"
            f" {', '.join(merging.METHODS)}{guess}"
        )
    return merging.METHODS[name]


def _interrupted(config: Config) -> str:
    if config.resume:
        return "what is finished is kept; the same command goes on from there"
    return "nothing was written (with --resume, what is finished is kept)"


if __name__ == "__main__":
    gc.freeze()  # modules stay: no collection needs to look at them again
    keep_freed_memory()  # chunks' buffers
    signals.as_interruption()
    signals.say_on_bus_error(
        "error: an input was cut shorter while it was read, or its disk failed (bus"
        " error); no output was written. Merge again when nothing writes to the inputs"
    )
    flags.main(Config, flags.plain_errors(run, _interrupted))
