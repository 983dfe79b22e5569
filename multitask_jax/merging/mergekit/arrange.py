"""From a recipe and open checkpoints to jobs for the stream.

Tensors that share a method, its static options and the number of models are one job:
its readers are views that present, under the names of the output, what each slice takes
from where. Weights, t and lambda ride along by tensor, so that a gradient over 80
layers is still one job and one program.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multitask_jax.checkpoints import Reader, TensorInfo
from multitask_jax.merging import core
from multitask_jax.merging.execution import Job
from multitask_jax.merging.mergekit import methods
from multitask_jax.merging.mergekit.alignment import Alignment
from multitask_jax.merging.mergekit.layout import Target
from multitask_jax.merging.mergekit.methods import Choice, Spec
from multitask_jax.merging.mergekit.parameters import lookup
from multitask_jax.merging.mergekit.recipe import Recipe, Slice, Source
from multitask_jax.merging.mergekit.views import Part, View
from multitask_jax.merging.plan import Plan, plan_merge, plan_passes


class Roles(NamedTuple):
    """The sources of a slice: its origin of task vectors and its models, by place."""

    method: str  # passthrough where one source is all there is
    origin: int | None
    models: tuple[int, ...]


# -- roles -----------------------------------------------------------------------------


def with_base(part: Slice, recipe: Recipe, paths: Mapping[str, Path]) -> Slice:
    """Adds base_model to the sources of a slice that do not have it.

    Raises:
      ValueError: it is needed but not given, or its layers can't be told.
    """
    spec = methods.SPECS[recipe.method]
    base = part.base_model or recipe.base_model
    if base is None:
        if spec.base in ("origin", "first"):
            raise ValueError(
                f"base_model: {recipe.method} needs one"
                + (": the model at t = 0" if spec.base == "first" else "")
            )
        return part
    listed = [paths[s.model] for s in part.sources]
    if paths[base] in listed:
        return part
    if recipe.whole:
        source = Source(base, None, {}, "base_model")
    elif spec.base in ("model", "first"):
        return part
    else:
        ranges = {s.layers for s in part.sources}
        if len(ranges) > 1:
            raise ValueError(
                f"{part.where}.sources: base_model {base} is not among them, and they"
                " have different layer_ranges, so its layers can't be told; list it"
                " with its layer_range"
            )
        source = Source(base, part.sources[0].layers, {}, f"{part.where}: base_model")
    return dataclasses.replace(part, sources=(*part.sources, source))


def roles_of(part: Slice, recipe: Recipe, paths: Mapping[str, Path]) -> Roles:
    """Who is what in a slice that `with_base` has completed.

    Raises:
      ValueError: the wrong number of models.
    """
    spec = methods.SPECS[recipe.method]
    base = part.base_model or recipe.base_model
    everyone = tuple(range(len(part.sources)))
    at = [i for i in everyone if base and paths[part.sources[i].model] == paths[base]]
    where = part.where if recipe.whole else f"{part.where}.sources"
    # A slice of one source is that source, where a method merges two or changes a base.
    alone = not recipe.whole and len(everyone) == 1 and spec.base != "model"
    if alone:
        return Roles("passthrough", None, everyone)
    if spec.base == "model" or (not at and spec.base == "optional"):
        origin, models = None, everyone
    elif spec.base == "first":
        if len(everyone) != 2 or not at:
            raise ValueError(
                f"{where}: {recipe.method} merges base_model and one other model; got"
                f" {len(everyone)}, {len(at)} of them the base_model {base}"
            )
        return Roles(recipe.method, None, (at[0], 1 - at[0]))
    else:
        ranges = {part.sources[i].layers for i in at}
        if len(ranges) > 1:
            raise ValueError(
                f"{where}: base_model {base} is listed with different layer_ranges, so"
                " it can't be told which one task vectors start from"
            )
        origin, models = at[0], tuple(i for i in everyone if i not in at)
        if not models:
            raise ValueError(f"{where}: got no models besides base_model {base}")
    exact = spec.count is not None
    if len(models) != spec.count if exact else len(models) < spec.least:
        besides = " besides base_model" if origin is not None else ""
        wanted = f"exactly {spec.count}" if exact else f"at least {spec.least}"
        raise ValueError(
            f"{where}: {recipe.method} merges {wanted} models{besides}, got"
            f" {len(models)}"
        )
    return Roles(recipe.method, origin, models)


# -- parameters ------------------------------------------------------------------------


def choose(
    recipe: Recipe, part: Slice, roles: Roles, target: Target, seed: int
) -> Choice:
    """All options of the method for one tensor.

    Raises:
      ValueError: a parameter is missing or out of range; names it and the tensor.
    """
    spec = methods.SPECS[roles.method]
    if roles.method != recipe.method:  # a slice of one source
        return Choice((), (1.0,), 1.0, {})
    above = (part.parameters, recipe.parameters)

    def find(name: str, default: Any, source: Source | None, tensor: str) -> Any:
        levels = above if source is None else (source.parameters, *above)
        value = lookup(name, levels, tensor, target.position)
        if value is not None:
            return value
        if default is methods.REQUIRED:
            where = "" if source is None else f" for {source.where} ({source.model})"
            raise ValueError(
                f"parameters.{name}: {recipe.method} needs it, but nothing gives it"
                f" for {target.name}{where}"
            )
        return default

    per_tensor = {
        name: find(name, default, None, target.name)
        for name, default in spec.per_tensor.items()
    }
    per_model = {
        name: tuple(
            find(name, default, part.sources[i], target.inputs[i] or target.name)
            for i in roles.models
        )
        for name, default in spec.per_model.items()
    }
    try:
        return methods.choose(
            spec, {**per_tensor, "seed": seed}, per_model, len(roles.models)
        )
    except ValueError as e:
        raise _placed(e, recipe, target.name) from None


def _placed(error: ValueError, recipe: Recipe, tensor: str) -> ValueError:
    """An error that begins with a parameter's name, at its places in the recipe."""
    name, _, rest = str(error).partition(": ")
    places = [s.where for s in recipe.settings if s.where.endswith(f".{name}")]
    if len(places) > 3:
        places = [*places[:3], f"{len(places) - 3} more"]
    where = ", ".join(places) or f"parameters.{name}"
    return ValueError(f"{where}: {rest} (for {tensor})")


# -- jobs ------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the jobs are made from."""

    recipe: Recipe
    slices: Sequence[Slice]  # with base_model
    roles: Sequence[Roles]
    readers: Sequence[Sequence[Reader]]  # of each slice's sources
    targets: Sequence[Target]
    alignment: Alignment | None
    cast: np.dtype | None  # the recipe's dtype
    out: np.dtype | None  # of the output


def jobs_of(
    inputs: Inputs, *, allow_missing: Any = "", seed: int = 0
) -> tuple[list[Job], list[str]]:
    """The jobs, and notes.

    Raises:
      CheckpointError: tensors are missing, or shapes differ.
      ValueError: a parameter is missing or out of range.
    """
    families: dict[tuple[str, bool, int], list[Target]] = {}
    for target in inputs.targets:
        roles = inputs.roles[target.slice]
        key = (roles.method, roles.origin is not None, len(roles.models))
        families.setdefault(key, []).append(target)
    jobs, notes = [], []
    for (method, with_origin, count), targets in families.items():
        views = _views(inputs, targets, count)
        made, said = _family(
            inputs,
            methods.SPECS[method],
            with_origin,
            views,
            targets,
            allow_missing,
            seed,
        )
        jobs += made
        notes += said
    return jobs, list(dict.fromkeys(notes))


def _views(inputs: Inputs, targets: Sequence[Target], count: int) -> tuple[View, ...]:
    """The base (or the first model in its place) and the models, over all slices."""
    used = sorted({t.slice for t in targets})
    views = []
    for place in range(-1, count):
        parts: dict[str, Part] = {}
        aliases: dict[str, str] = {}
        for s in used:
            roles = inputs.roles[s]
            first = roles.models[0] if roles.origin is None else roles.origin
            i = first if place < 0 else roles.models[place]
            reader = inputs.readers[s][i]
            if inputs.recipe.whole:  # what a model has besides is for the plan to judge
                names = {n: n for n in reader.tensors}
                aliases |= reader.aliases
            else:
                names = {}
            for t in targets:
                name = t.inputs[i] if t.slice == s else None
                if name is not None and name not in reader.aliases:
                    names[t.name] = name
            for name, stored in names.items():
                parts[name] = _part(inputs, reader, stored, name)
        if inputs.recipe.whole:
            _untie(inputs, reader, targets, parts, aliases)
        views.append(View(parts, reader.path, aliases))
    return tuple(views)


def _untie(
    inputs: Inputs,
    reader: Reader,
    targets: Sequence[Target],
    parts: dict[str, Part],
    aliases: dict[str, str],
) -> None:
    """A model's tied tensor that the output has on its own is presented as such."""
    for t in targets:
        stored = aliases.get(t.name)
        if stored is not None and t.name not in parts:
            parts[t.name] = _part(inputs, reader, stored, t.name)
            del aliases[t.name]


def _part(inputs: Inputs, reader: Reader, stored: str, name: str) -> Part:
    info, rows = reader.tensors[stored], None
    if inputs.alignment is not None:
        info, rows = inputs.alignment.place(reader, info)
    cast = (
        inputs.cast if inputs.cast is not None and core.is_float(info.dtype) else None
    )
    return Part(reader, stored, TensorInfo(name, info.shape, cast or info.dtype), rows)


def _family(
    inputs: Inputs,
    spec: Spec,
    with_origin: bool,
    views: tuple[View, ...],
    targets: Sequence[Target],
    allow_missing: Any,
    seed: int,
) -> tuple[list[Job], list[str]]:
    """Jobs of one method and number of models, grouped by static options."""
    choices = {
        t.name: choose(
            inputs.recipe, inputs.slices[t.slice], inputs.roles[t.slice], t, seed
        )
        for t in targets
    }
    groups: dict[Any, list[str]] = {}
    for name, choice in choices.items():
        groups.setdefault(choice.static, []).append(name)
    made = {
        static: _method(
            inputs.recipe, spec, {n: choices[n] for n in names}, with_origin
        )
        for static, names in groups.items()
    }
    whole = plan_merge(
        next(iter(made.values())),
        views[0],
        views[1:],
        out_dtype=inputs.out,
        allow_missing=allow_missing,
    )
    copied = list(whole.copied)
    entries = {e.path: e for e in whole.merged}
    if spec is methods.SPECS["passthrough"]:
        for e in whole.merged:  # as it is: copied, not computed
            if choices[e.path].factor == 1 and e.base == e.out:
                copied.append(TensorInfo(e.path, e.shape, e.out))
                del entries[e.path]
    outputs = {t.name: t for t in whole.outputs}
    jobs = []
    for static, names in groups.items():
        method, chosen = made[static], set(names)
        plan = Plan(
            tuple(entries[n] for n in names if n in entries),
            tuple(c for c in copied if c.name in chosen),
            tuple(outputs[n] for n in names),
            plan_passes(method),
            (),
        )
        weights = {n: choices[n].weights for n in names}
        shared = tuple((k, v) for k, v in static if k not in spec.ranks)
        scaled = any(choices[n].factor != 1 for n in names)
        program = (id(spec), with_origin, len(views), shared, scaled)
        jobs.append(Job(method, plan, views, weights, program=program))
    return jobs, list(whole.notes)


def _method(
    recipe: Recipe, spec: Spec, choices: Mapping[str, Choice], with_origin: bool
) -> core.Method:
    try:
        return methods.method_of(spec, choices, with_origin)
    except ValueError as e:
        raise _placed(e, recipe, next(iter(choices))) from None
