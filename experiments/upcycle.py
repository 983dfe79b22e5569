"""Dense checkpoints become a mixture of experts, and a mixture one dense model.

    python -m experiments.upcycle --models=A --experts=8 --output=MOE  # copies
    python -m experiments.upcycle --models=A,B,C --base=BASE --output=MOE  # specialists
    python -m experiments.upcycle --to_dense --models=MOE --method=ties --base=BASE \
        --output=DENSE

The feed-forward layers become experts, one a model (or copies of the only one: sparse
upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055); everything else is merged by
--method, the mean by default (Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv
2403.07816). Gates are random, or with --gate_data send tokens to the specialist whose
own data looks most like them (Mixtral's gates have no bias: what the means have in
common is then left out of them):

    moments = merging.input_moments(apply_fn, params, batches)  # of A, on A's data
    # (with rows=, a function to the mask, where examples are padded)
    merging.save_moments("A/moments.safetensors", moments)

and of a model in torch, such as a Llama of transformers, by what reaches the first
weight of each feed-forward layer, under that weight's name:

    seen = {}

    def rows(batch):
        model(**batch)
        there = batch["attention_mask"].bool()
        return {name: x[there].float().cpu().numpy() for name, x in seen.items()}

    for name, module in model.named_modules():
        if name.endswith("mlp.gate_proj"):
            module.register_forward_pre_hook(
                lambda _, args, key=f"{name}.weight": seen.update({key: args[0]})
            )
    with torch.inference_mode():
        moments = merging.moments_of_rows(map(rows, batches))

--layout=mixtral writes what transformers' Mixtral loads (of Llama and Mistral models),
names any other Hugging Face names (which no class loads: config.json keeps the dense
one's under "upcycled_from"), stacked the parameters of `layers.moe.MoE`; what is
printed at the end says by which arguments. The way back merges the experts by any
method of `experiments.merge` on parameters alone; all else is the mixture's as it was,
but for gates, which are left out.
Stacked experts get the names of our `layers.transformer.Block` (those with a gate:
block/mlp/{gate,up,down}), or those that --base has, by --mlp_pattern if it is given.

Legend: E experts, D width.
"""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from experiments import (
    flags,
    merge,
    parsing,
    signals,
    upcycle_files,
    upcycle_gates,
    upcycle_to_dense,
)
from experiments.flags import flag
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import Reader
from multitask_jax.merging.core import statistics_kind
from multitask_jax.moe import configs, dense_files, files
from multitask_jax.moe.upcycling import Found


@dataclasses.dataclass(frozen=True)
class Config:
    """What becomes of what."""

    models: str = flag("Checkpoints, comma-separated: experts' origins, in order.", "")
    output: str = flag("Directory to write; it must not exist.", "")
    base: str | None = flag("Their common origin, for methods that need one.")
    to_dense: bool = flag("The other way: --models is one mixture.", False)
    experts: int | None = flag("Copies of the only model.")
    k: int | None = flag("Experts a token, for config.json; 2 if not given.")
    method: str = flag(
        "Merges everything else (or, --to_dense, the experts alone).", "linear"
    )
    density: str | None = flag("Of the method, as for experiments.merge.")
    scale: float | None = flag("Of the method, as for experiments.merge.")
    layout: Literal["auto", "mixtral", "names", "stacked"] = flag(
        "Names of the tensors; auto: stacked for names with slashes, mixtral for Llama"
        " and Mistral (--to_dense: for Mixtral's own), else names.",
        "auto",
    )
    mlp_pattern: str | None = flag(
        "Regex of feed-forward tensors with groups `block` and `leaf`, if their names"
        " are not known to the layout; --to_dense looks for them in --base."
    )
    gate_data: str | None = flag("Files of merging.save_moments, one a model.")
    sharpness: float | None = flag(
        "How hard a gate of --gate_data decides; 1 if not given: by the probabilities"
        " of Gaussians of one variance in each dimension around the means."
    )
    gate_stddev: float | None = flag("Of random gates; 0.02 if not given.")
    seed: int | None = flag("Of random gates; 0 if not given.")
    max_shard_size: str | None = flag("Of an output file, like 5GB.")
    overwrite: bool = flag("Replace a checkpoint at --output.", False)
    progress: bool = flag("Show a progress bar.", True)


class Result(NamedTuple):
    """What was written."""

    output: Path
    experts: int
    notes: tuple[str, ...]


def run(config: Config) -> Result:
    """Writes the mixture, or the dense model.

    Raises:
      ValueError (CheckpointError among them): a flag or a file is not as it should be;
        nothing was written.
    """
    models = _expanded(config.models) or []
    if not models or not config.output:
        raise ValueError("--models and --output: got none; see --help")
    config = parsing.expanded(config, "base")
    parsing.one_of("method", config.method, tuple(merging.METHODS))
    method = _method(config)
    written = upcycle_to_dense.run if config.to_dense else to_experts
    count, notes = written(config, models, method)
    print(f"wrote {config.output}: {count} experts")
    for note in notes:
        print(f"- {note}")
    return Result(Path(config.output), count, tuple(notes))


def to_experts(
    config: Config, models: Sequence[str], method: merging.Method
) -> tuple[int, list[str]]:
    """Dense checkpoints to a mixture: the number of experts, and what to know."""
    copies = _copies(config, models)
    count = copies or len(models)
    about = upcycle_files.config_of(models[0])
    k = 2 if config.k is None else config.k
    if not 1 <= k <= count:
        raise ValueError(f"--k: got {k}, expected 1 to {count}, the experts")
    if config.k is not None and about is None:
        raise ValueError(
            f"--k: {models[0]} has no config.json to write it to; leave it out, and"
            " tell k the code that runs the mixture"
        )
    upcycle_gates.check_flags(config)
    # What is refused is refused before anything is merged.
    inputs = [Path(m) for m in [*models, *([config.base] if config.base else [])]]
    checkpoints.check_output(config.output, overwrite=config.overwrite, inputs=inputs)
    size = parsing.size_in_bytes("max_shard_size", config.max_shard_size)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(upcycle_files.opened(m)) for m in models]
        name, layout = upcycle_files.layout_of(config, readers[0], models[0])
        if about is not None:
            file = upcycle_files.home(models[0]) / "config.json"
            about = configs.config_of_mixture(about, name, count, k, file)
        found = files.found_in(readers[0], layout)
        files.check_alike(readers, list(found))
        gates, how = upcycle_gates.made(
            config,
            _expanded(config.gate_data),
            readers[0],
            files.gate_inputs(readers[0], found),
            layout,
            count,
        )
        notes = [how]
        origins = readers if len(models) > 1 else readers * copies
        rest = readers[0]
        outputs = files.plan(origins, rest, layout, gates)
        if len(models) > 1:
            rest = _merged(config, method, readers, found, stack)
            outputs = files.plan(origins, rest, layout, gates)
            notes.append(f"everything but experts and gates is their {config.method}")
        notes.append(_how_to_run(name, outputs, count, k))
        if not layout.bias and config.gate_data:
            notes.append(
                "Mixtral's gate has no bias: what the means have in common is left out"
            )
        _write(config, outputs, inputs, rest, about, size)
    return count, notes


def _merged(
    config: Config,
    method: merging.Method,
    readers: Sequence[Reader],
    found: Mapping[str, Found],
    stack: contextlib.ExitStack,
) -> Reader:
    """The models' merge, of all but feed-forward layers; these are the first model's.

    Experts take no part: what a method measures over a model is of what it merges.
    """

    def without(reader: Reader) -> dense_files.View:
        return dense_files.View(
            reader,
            {
                name: (info, files.Part(reader, name))
                for name, info in reader.tensors.items()
                if name not in found
            },
        )

    first, *others = map(without, readers)
    floats = [
        t for t in first.tensors.values() if jnp.issubdtype(t.dtype, jnp.floating)
    ]
    if not floats:
        return readers[0]
    base = None
    if config.base is not None:
        base = without(stack.enter_context(upcycle_files.opened(config.base)))
    folder = stack.enter_context(upcycle_files.temporary(config.output))
    dtype = upcycle_files.dtype_of(readers[0].tensors.values())
    result = merging.merge_checkpoints(
        method,
        base,
        [first, *others],
        folder / "rest",
        out_dtype=None if dtype is None else dtype.name,
        report_files=False,
        progress=config.progress,
    )
    merged = stack.enter_context(upcycle_files.opened(str(result.output)))
    # In the order of the model, whose layers lie together.
    order = dict.fromkeys([*readers[0].tensors, *merged.tensors])
    origin = {name: readers[0] if name in found else merged for name in order}
    return dense_files.View(
        merged,
        {
            name: (reader.tensors[name], files.Part(reader, name))
            for name, reader in origin.items()
            if name in reader.tensors
        },
    )


def _how_to_run(
    name: str, outputs: Sequence[files.Output], experts: int, k: int
) -> str:
    """Which code runs what is written."""
    if name == "mixtral":
        return "run it by transformers' MixtralForCausalLM"
    if name == "names":
        return (
            "its names are of no class that is known (the dense one would get new"
            " feed-forward layers): run it by code of your own, the sum of the"
            f" {k} best experts weighted by the softmax of their logits, which are"
            " x gate.weight^T (+ gate.bias)"
        )
    shapes = {o.info.name: o.info.shape for o in outputs}
    up = next((s for n, s in shapes.items() if n.endswith("experts/up/kernel")), None)
    if up is None:
        return (
            "run it by functions of multitask_jax.moe: `layers.moe.MoE` has no such"
            " experts"
        )
    gated = any(n.endswith("experts/gate/kernel") for n in shapes)
    bias = any(n.endswith("experts/up/bias") for n in shapes)
    gate_bias = any(n.endswith("mlp/gate/bias") for n in shapes)
    return (
        f"run it by layers.moe.MoE(experts={experts}, hidden={up[-1]}, k={k},"
        f" kind={'swiglu' if gated else 'gelu'!r}, normalize='after_topk',"
        f" dispatch='dropless', bias={bias}, gate_bias={gate_bias})"
        + ("" if gated else "; kind='mlp' or 'relu' if the dense layers' activation is")
    )


def _expanded(text: str | None) -> list[str] | None:
    """Paths of a flag, ~ written out."""
    found = parsing.paths(text)
    return found and [os.path.expanduser(p) for p in found]


def _method(config: Config) -> merging.Method:
    """The method with its options.

    Raises:
      ValueError: an option that it does not take; or it needs or makes more than
        checkpoints.
    """
    taken = inspect.signature(merging.METHODS[config.method]).parameters
    for name in ("density", "scale"):
        if getattr(config, name) is not None and name not in taken:
            raise ValueError(f"--{name}: {config.method} does not take it")
    options = {k: getattr(config, k) for k in ("base", "method", "density", "scale")}
    method = merge.build_method(merge.Config(**options))
    kind = statistics_kind(method)
    if kind or method.aside:
        why = f"needs {kind} statistics of data" if kind else "writes a file a model"
        raise ValueError(
            f"--method: got {config.method}, which {why}: there is no place for that"
            " here; choose one of parameters alone, such as linear, task_arithmetic or"
            " ties"
        )
    return method


def _copies(config: Config, models: Sequence[str]) -> int:
    """E of one model; 0 of several."""
    if len(models) > 1:
        if config.experts not in (None, len(models)):
            raise ValueError(
                f"--experts={config.experts}: each of {len(models)} models is an expert"
            )
        return 0
    merges = ("base", "density", "scale")
    if config.method != Config.method or any(
        getattr(config, n) is not None for n in merges
    ):
        raise ValueError(
            "--method, --base, --density, --scale: nothing is merged of one model's"
            " copies; leave them out"
        )
    if config.experts is None or config.experts < 2 or config.gate_data:
        raise ValueError(
            "one model becomes experts that are copies: give their number by --experts"
            " (at least 2), and no --gate_data"
        )
    return config.experts


def _write(
    config: Config,
    outputs: Sequence[files.Output],
    inputs: Sequence[Path],
    rest: Reader,
    about: Mapping[str, Any] | None,
    max_shard_size: int | None,
) -> None:
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    writer = checkpoints.create(
        config.output,
        [o.info for o in outputs],
        format="orbax" if rest.format == "orbax" else "safetensors",
        overwrite=config.overwrite,
        inputs=inputs,
        **options,
    )
    with writer:
        files.write(writer, outputs, progress=config.progress)
        writer.complete()
        home = upcycle_files.home(str(inputs[0]))
        checkpoints.copy_companions(home, writer.directory)
        if about is not None:
            upcycle_files.write_config(writer.directory, about)


if __name__ == "__main__":
    signals.as_interruption()
    flags.main(Config, flags.plain_errors(run))
