"""Everything about a recipe that can be decided before any weights are read."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, Reader
from multitask_jax.merging import disk
from multitask_jax.merging.execution import Job
from multitask_jax.merging.mergekit import alignment as aligning
from multitask_jax.merging.mergekit import arrange, layout, tied
from multitask_jax.merging.mergekit.parameters import check_filters
from multitask_jax.merging.mergekit.recipe import Recipe
from multitask_jax.merging.plan import Plan, describe


class Prepared(NamedTuple):
    """Everything decided, no weights read."""

    recipe: Recipe
    inputs: arrange.Inputs
    jobs: list[Job]
    base: Reader  # base_model, or the first model
    home: Path  # whose config.json and other files the output gets
    models: list[Path]  # one a source; empty if slices differ in theirs
    layers: tuple[int, list[int]] | None  # of slices: old count, origin of each layer
    untied: bool  # whether a tied head became one of its own
    notes: list[str]
    read: list[Path]  # all inputs, which an output must not touch


def resolve(model: str, folder: Path, where: str = "model") -> Path:
    """A recipe's checkpoint: relative to its folder, else to the working directory.

    Raises:
      CheckpointError: there is none; a name on the hub has to be downloaded first.
    """
    # Neither ~nobody nor a name that is too long for the system is an error by itself.
    given = os.path.expanduser(model)
    for path in (folder / given, Path.cwd() / given):
        if os.path.exists(path):
            # Links are kept: the hub's cache links names to files without a suffix.
            return Path(os.path.abspath(path))
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


class _Opened:
    """The checkpoints of a recipe, each opened once."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self._folder, self._stack = folder, stack
        self.paths: dict[str, Path] = {}  # by the recipe's text; tells models apart
        self.readers: dict[Path, Reader] = {}
        self.homes: dict[Path, Path] = {}  # where config.json is

    def open(self, model: str, where: str, base: str | None) -> Path:
        """Opens a model: a checkpoint, "model+adapter", or an adapter of the base."""
        if model in self.paths:
            return self.paths[model]
        try:
            home = path = resolve(model, self._folder, where)
        except CheckpointError:
            whole, plus, adapter = model.rpartition("+")
            if not plus:
                raise
            home = self.open(whole, where, base)
            base, model_path = whole, resolve(adapter, self._folder, where)
            path = Path(f"{home}+{model_path}")
        else:
            model_path = path
        if path not in self.readers:
            below = None if base is None else self.readers[self.paths[base]]
            reader = checkpoints.open(model_path, below)
            self._stack.callback(reader.close)
            self.readers[path] = reader
            self.homes[path] = self.homes.get(home, home)
        self.paths[model] = path
        return path


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
    opened = _Opened(folder, stack)
    if recipe.base_model:
        opened.open(recipe.base_model, "base_model", None)
    for model, where in named.items():
        opened.open(model, where, recipe.base_model)
    readers_of, untied = tied.untie(
        opened.readers, opened.homes, any_rows=recipe.tokenizer is not None
    )
    paths = opened.paths
    slices = [arrange.with_base(part, recipe, paths) for part in recipe.slices]
    roles = [arrange.roles_of(part, recipe, paths) for part in slices]
    readers = [[readers_of[paths[s.model]] for s in part.sources] for part in slices]
    first_model = recipe.base_model or slices[0].sources[0].model
    base = readers_of[paths[first_model]]
    notes = [*recipe.notes, *untied]
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
        known = {
            id(r): layout.find_layers(r, block_pattern) for r in readers_of.values()
        }
        counted = [[known[id(r)] for r in row] for row in readers]
        targets = layout.slices_of_layers(slices, readers, counted)
        aliases = [a for row in readers for r in row for a in r.aliases]
        origins = [i for part in slices for i in range(*(part.sources[0].layers or ()))]
        layers = (known[id(base)].count, origins)
    _check_filters(recipe, readers, [t.name for t in targets] + aliases)
    if any(roles[0].method == m for m in ("linear", "karcher")) and (
        recipe.whole and len(slices[0].sources) > len(recipe.slices[0].sources)
    ):
        notes.append(
            f"base_model: one of the models that {recipe.method} averages, as in"
            " mergekit; leave it out if it is not to count."
        )
    alignment = _alignment(recipe, folder, list(readers_of.values()), base, notes)
    cast = disk.float_dtype("dtype", recipe.dtype)
    out = disk.float_dtype("out_dtype", recipe.out_dtype) or cast
    inputs = arrange.Inputs(
        recipe, slices, roles, readers, targets, alignment, cast, out
    )
    jobs, said = arrange.jobs_of(inputs, allow_missing=allow_missing, seed=seed)
    models = _models(inputs)
    home = opened.homes[paths[first_model]]
    read = [*opened.homes.values(), *(r.path for r in readers_of.values())]
    if alignment is not None:
        read.append(alignment.source)
    return Prepared(
        recipe,
        inputs,
        jobs,
        base,
        home,
        models,
        layers,
        bool(untied),
        [*notes, *said],
        read,
    )


def _check_filters(
    recipe: Recipe, readers: Sequence[Sequence[Reader]], names: list[str]
) -> None:
    """Filters look at names of the output, those of a source at its own names too."""
    above = [*names, *(n for row in readers for r in row for n in r.tensors)]
    above = list(dict.fromkeys(above))
    for level in (recipe.parameters, *(part.parameters for part in recipe.slices)):
        check_filters(list(level.values()), above)
    for part, row in zip(recipe.slices, readers, strict=True):
        for source, reader in zip(part.sources, row, strict=False):  # base_model: last
            own = list(dict.fromkeys([*names, *reader.tensors]))
            check_filters(list(source.parameters.values()), own)


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
    lines = [f"recipe       mergekit {recipe.method}"]
    if not recipe.whole:
        count = len(prepared.layers[1]) if prepared.layers else 0
        lines.append(f"layers       {count}, from {len(inputs.slices)} slices")
        outside = [
            f"{t.name} <- {inputs.readers[t.slice][0].path.name}"
            for t in inputs.targets
            if not t.layer
        ]
        lines.append(f"outside      {', '.join(outside[:12])}")
    return "\n".join([*lines, describe(whole, models, memory)])
