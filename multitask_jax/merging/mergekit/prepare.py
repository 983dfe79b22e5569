"""Everything about a recipe that can be decided before any weights are read."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, Reader
from multitask_jax.merging import disk
from multitask_jax.merging.mergekit import alignment as aligning
from multitask_jax.merging.mergekit import arrange, layout
from multitask_jax.merging.mergekit.parameters import check_filters
from multitask_jax.merging.mergekit.recipe import Recipe
from multitask_jax.merging.plan import Plan, describe


class Prepared(NamedTuple):
    """Everything decided, no weights read."""

    recipe: Recipe
    inputs: arrange.Inputs
    jobs: list[arrange.Job]
    base: Reader  # whose config.json and other files the output gets
    models: list[Path]  # one a source; empty if slices differ in theirs
    layers: tuple[int, list[int]] | None  # of slices: old count, origin of each layer
    notes: list[str]


def resolve(model: str, folder: Path, where: str = "model") -> Path:
    """The checkpoint of a recipe: relative to its folder, else the working directory.

    Raises:
      CheckpointError: there is none; a name on the hub has to be downloaded first.
    """
    given = Path(model).expanduser()
    for path in (folder / given, Path.cwd() / given):
        if path.exists():
            return path.resolve()
    if "+" in model:
        raise CheckpointError(
            f"{where}: got {model}: a LoRA on top of a model (model+lora) is not"
            " supported in recipes; merge it into the model first"
        )
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        raise CheckpointError(
            f"{where}: {model} is not in {folder} or the working directory. If it is a"
            f" name on the Hugging Face hub, download it (`hf download {model}"
            " --local-dir DIR`) and write DIR in the recipe"
        )
    raise CheckpointError(
        f"{where}: {model}: no such file or directory, neither in {folder} nor in the"
        " working directory"
    )


def prepare(
    recipe: Recipe,
    folder: Path,
    stack: contextlib.ExitStack,
    block_pattern: str | None,
    *,
    allow_missing: Any,
    seed: int,
) -> Prepared:
    """Opens the checkpoints of a recipe (until `stack` ends) and decides everything.

    Raises:
      CheckpointError, ValueError: as for `merge_mergekit`.
    """
    named = {s.model: s.where for part in recipe.slices for s in part.sources}
    named |= {p.base_model: p.where for p in recipe.slices if p.base_model}
    if recipe.base_model:
        named |= {recipe.base_model: "base_model"}
    paths = {model: resolve(model, folder, where) for model, where in named.items()}
    opened: dict[Path, Reader] = {}
    for path in paths.values():
        if path not in opened:
            opened[path] = checkpoints.open(path)
            stack.callback(opened[path].close)
    slices = [arrange.with_base(part, recipe, paths) for part in recipe.slices]
    roles = [arrange.roles_of(part, recipe, paths) for part in slices]
    readers = [[opened[paths[s.model]] for s in part.sources] for part in slices]
    base = opened[paths[recipe.base_model]] if recipe.base_model else readers[0][0]
    notes = list(recipe.notes)
    layers = None
    if recipe.whole:
        first = roles[0].models[0] if roles[0].origin is None else roles[0].origin
        gradients = any(len(v) > 1 for s in recipe.settings for _, v in s.entries)
        targets = layout.whole_models(
            readers[0],
            readers[0][first],
            gradients=gradients,
            block_pattern=block_pattern,
        )
        aliases = [*readers[0][first].aliases]
        if gradients and recipe.method != "passthrough":
            notes.append(
                "Gradients: tensors outside the layers take the first value, the last"
                " norm and the head too, as in mergekit."
            )
    else:
        known = {r.path: layout.find_layers(r, block_pattern) for r in opened.values()}
        counted = [[known[r.path] for r in row] for row in readers]
        targets = layout.slices_of_layers(slices, readers, counted)
        aliases = [a for row in readers for r in row for a in r.aliases]
        origins = [i for part in slices for i in range(*(part.sources[0].layers or ()))]
        layers = (known[base.path].count, origins)
    check_filters(recipe.settings, [t.name for t in targets] + aliases)
    if any(roles[0].method == m for m in ("linear", "karcher")) and (
        recipe.whole and len(slices[0].sources) > len(recipe.slices[0].sources)
    ):
        notes.append(
            f"base_model: one of the models that {recipe.method} averages, as in"
            " mergekit; leave it out if it is not to count."
        )
    alignment = _alignment(recipe, folder, list(opened.values()), base, notes)
    cast = disk.float_dtype("dtype", recipe.dtype)
    out = disk.float_dtype("out_dtype", recipe.out_dtype) or cast
    inputs = arrange.Inputs(
        recipe, slices, roles, readers, targets, alignment, cast, out
    )
    jobs, said = arrange.jobs_of(inputs, allow_missing=allow_missing, seed=seed)
    models = _models(inputs)
    return Prepared(recipe, inputs, jobs, base, models, layers, [*notes, *said])


def _alignment(
    recipe: Recipe,
    folder: Path,
    readers: Sequence[Reader],
    base: Reader,
    notes: list[str],
) -> aligning.Alignment | None:
    if recipe.tokenizer is None:
        aligning.check_rows(base, readers)
        return None
    source = None
    if recipe.tokenizer not in ("base", "union"):
        source = resolve(recipe.tokenizer, folder, "tokenizer_source")
    alignment, said = aligning.align(
        recipe.tokenizer,
        source,
        readers,
        base,
        base_given=recipe.base_model is not None,
        pad_to_multiple_of=recipe.pad_to_multiple_of,
    )
    notes += said
    return alignment


def _models(inputs: arrange.Inputs) -> list[Path]:
    """The models by place, if every slice has the same ones; else none."""
    rows = {
        tuple(inputs.readers[s][i].path for i in roles.models)
        for s, roles in enumerate(inputs.roles)
    }
    return list(rows.pop()) if len(rows) == 1 else []


def paths_read(prepared: Prepared) -> list[Path]:
    """All inputs, which an output must not touch."""
    rows = prepared.inputs.readers
    paths = [prepared.base.path, *(r.path for row in rows for r in row)]
    if prepared.inputs.alignment is not None:
        paths.append(prepared.inputs.alignment.source)
    return list(dict.fromkeys(paths))


def whole_plan(prepared: Prepared) -> Plan:
    """All jobs as one plan, in the order of the output, for the writer and reports."""
    plans = [j.plan for j in prepared.jobs]
    outputs = {t.name: t for p in plans for t in p.outputs}
    most = max((p.passes for p in plans), key=len)
    return Plan(
        tuple(e for p in plans for e in p.merged),
        tuple(c for p in plans for c in p.copied),
        tuple(outputs[t.name] for t in prepared.inputs.targets),
        most,
        tuple(prepared.notes),
    )


def describe_recipe(prepared: Prepared, whole: Plan, memory: int) -> str:
    """The plan in words, for `--dry_run`."""
    recipe, inputs = prepared.recipe, prepared.inputs
    models = [r.path for r in dict.fromkeys(r for row in inputs.readers for r in row)]
    lines = [f"recipe       mergekit {recipe.method}, {len(prepared.jobs)} groups"]
    if not recipe.whole:
        count = len(prepared.layers[1]) if prepared.layers else 0
        lines.append(f"layers       {count} of {len(inputs.slices)} slices")
        outside = [
            f"{t.name} <- {inputs.readers[t.slice][0].path.name}"
            for t in inputs.targets
            if not t.layer
        ]
        lines.append(f"outside      {', '.join(outside[:12])}")
    return "\n".join([*lines, describe(whole, models, memory)])
