"""Merges of one set of inputs in memory, at many coefficients.

Inputs are read once. Coefficients that JAX may trace (scale, t, LiNeS, weights) share
one compiled program; others (density, seeds, words) need one for each value. What comes
before the traced ones, like trimming and elections, is then done once as well.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import merge, parsing
from multitask_jax import checkpoints, merging
from multitask_jax import tree as trees
from multitask_jax.merging.core import check_models, is_float, split_scales
from multitask_jax.merging.plan import plan_merge
from multitask_jax.merging.task_statistics import StatisticsFile

Coefficients = Mapping[str, Any]
_MERGE_FIELDS = {f.name for f in dataclasses.fields(merge.Config)}
_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
)
_WEIGHT = re.compile(r"weights\[(\d+)\]")


class Inputs(NamedTuple):
    """What is merged, on the device."""

    base: dict[str, Any]  # by name; what JAX can't hold has no entries here
    models: list[dict[str, Any]]  # alike; what isn't merged is the base's
    include: str  # regex of what is merged
    integers: dict[str, np.ndarray]  # copied from the base
    aliases: dict[str, str]  # tied name -> stored name
    statistics: list[dict[str, Any]] | None  # of each model's data, by name


def takes(method: str) -> list[str]:
    """Names of the coefficients that can be searched for a method."""
    recipe = merge.recipe_named(method)
    options = [p for p in inspect.signature(recipe).parameters if p in _MERGE_FIELDS]
    weights = ["weights", "weights[0], ..."] if recipe().weighted else []
    return [*options, "lines_alpha", "lines_beta", *weights]


def check_known(names: Sequence[str], config: merge.Config, models: int) -> None:
    """Raises ValueError for a coefficient that the method has not, or has by a flag."""
    known = takes(config.method)
    for name in names:
        weight = _WEIGHT.fullmatch(name)
        if weight and "weights" in known:
            if int(weight[1]) >= models:
                raise ValueError(f"--ranges: got {name}, but there are {models} models")
        elif name not in known:
            raise ValueError(
                f"--ranges: {config.method} has no coefficient {name!r}; it has"
                f" {', '.join(known)}"
            )
        elif getattr(config, name) is not None:
            raise ValueError(f"--{name} is given, and searched too: leave one out")


def is_traced(name: str, method: str) -> bool:
    """Whether a coefficient may be a JAX value: recipes annotate these with Any."""
    if name in ("lines_alpha", "lines_beta") or _WEIGHT.fullmatch(name):
        return True
    return typing.get_type_hints(merge.recipe_named(method)).get(name) is Any


def config_at(config: merge.Config, coefficients: Coefficients) -> merge.Config:
    """The flags of `experiments.merge` at these coefficients, traced ones perhaps.

    Raises:
      ValueError: a fraction where a flag takes an integer.
    """
    fields = {name: getattr(config, name) for name in _MERGE_FIELDS}
    for name, value in coefficients.items():
        if _WEIGHT.fullmatch(name):
            continue
        hint = typing.get_type_hints(merge.Config)[name]
        kind = next(h for h in (*typing.get_args(hint), hint) if h is not type(None))
        if isinstance(value, float) and kind is not float:
            if kind is not str and not value.is_integer():
                raise ValueError(f"--ranges: {name} takes whole numbers, got {value}")
            value = kind(value)
        elif isinstance(value, str) and kind is bool:
            value = {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str) and kind is not str:
            raise ValueError(f"--ranges: {name} takes numbers, got {value!r}")
        fields[name] = value
    weights = weights_at(config, coefficients, len(parsing.paths(config.models) or ()))
    if weights is not None and all(isinstance(w, float) for w in weights):
        fields["weights"] = ",".join(map(str, weights))
    return merge.Config(**fields)


def weights_at(
    config: merge.Config, coefficients: Coefficients, models: int
) -> list[Any] | None:
    """Given weights (1 each by default) with searched ones in place; None for none."""
    given: list[Any] | None = parsing.numbers("weights", config.weights)
    for name, value in coefficients.items():
        if found := _WEIGHT.fullmatch(name):
            given = given or [1.0] * models
            given[int(found[1])] = value
    return given


def read_inputs(config: merge.Config, method: merging.Method) -> Inputs:
    """Reads base and models once; the same tensors are merged as from disk.

    Raises:
      ValueError (CheckpointError among them): inputs that `experiments.merge` would
        refuse, or float64 without --dtype=float32.
    """
    models = parsing.paths(config.models) or []
    weights = parsing.numbers("weights", config.weights)
    check_models(method, len(models), weights)
    if config.base is None and (method.start, method.end) != ("parameters",) * 2:
        raise ValueError("this method needs a base: pass the models' common origin")
    with contextlib.ExitStack() as stack:
        readers = []
        for path in (config.base or models[0], *models):
            origin = readers[0] if readers and config.base is not None else None
            readers.append(checkpoints.open(path, origin))
            stack.callback(readers[-1].close)
        known = None
        if config.statistics is not None:
            known = [StatisticsFile(p) for p in parsing.paths(config.statistics) or ()]
            for file in known:
                stack.callback(file.close)
        plan = plan_merge(
            method,
            readers[0],
            readers[1:],
            include=config.include,
            exclude=config.exclude,
            statistics=known,
            allow_missing=parsing.one_of(
                "allow_missing", config.allow_missing, ("", "base")
            ),
        )
        merged = [e.path for e in plan.merged]

        def read(reader: checkpoints.Reader, name: str) -> Any:
            stored = reader.aliases.get(name, name)
            info = reader.tensors[stored]
            x = np.array(reader.read(stored)).reshape(info.shape)
            if not is_float(info.dtype):
                return x
            if info.dtype == np.float64:
                if config.dtype != "float32":
                    raise ValueError(
                        f"{reader.path}: {name} is float64, a sweep computes in"
                        " float32; pass --dtype=float32 to round"
                    )
                x = x.astype(np.float32)
            finite = np.isfinite(x.astype(np.float32)).all()
            if not (finite or config.allow_nonfinite):
                raise checkpoints.CheckpointError(
                    f"{reader.path}: tensor {name!r} has NaN or infinity; leave the"
                    " model out, exclude the tensor, or pass --allow_nonfinite"
                )
            return jnp.asarray(x)

        base = {name: read(readers[0], name) for name in readers[0].tensors}
        integers = {k: v for k, v in base.items() if isinstance(v, np.ndarray)}
        # JAX would cut int64 short: only the names go in, which count for depths.
        base |= dict.fromkeys(integers, np.zeros(0, np.float32))
        others = [base | {name: read(r, name) for name in merged} for r in readers[1:]]
        names = "|".join(map(re.escape, merged))
        aliases = dict(readers[0].aliases)
        statistics = known and [
            {
                name: jax.tree.map(jnp.float32, x)
                for name, x in merging.load_statistics(file.path).items()
                if name in merged
            }
            for file in known
        ]
    return Inputs(base, others, f"^(?:{names})$", integers, aliases, statistics)


class Program(NamedTuple):
    """What serves all candidates that differ in traced coefficients only."""

    merged: Callable[..., Any]  # (traced, *arguments) -> tensors by name
    gradient: Callable[..., Any]  # the same -> the score and its derivatives
    arguments: tuple[Any, ...]


class Candidates:
    """Scores and gradients of merges at coefficients."""

    def __init__(self, config: merge.Config, inputs: Inputs, score: Callable[..., Any]):
        """`score`: parameters (as by `nested`) -> a scalar."""
        self._config, self._inputs, self._score = config, inputs, score
        # Grids go through what needs a program of its own slowest: one is enough.
        self._program = functools.lru_cache(maxsize=1)(self._new_program)

    def params(self, coefficients: Coefficients) -> dict[str, Any]:
        """The merge at coefficients, as a score is given it."""
        program, traced = self._at(coefficients)
        return self._nested(program.merged(traced, *program.arguments))

    def value(self, coefficients: Coefficients) -> float:
        """The score at coefficients."""
        program, traced = self._at(coefficients)
        return float(self._scored(program.merged(traced, *program.arguments)))

    def value_and_gradient(
        self, coefficients: Coefficients
    ) -> tuple[float, dict[str, float]]:
        """The score and its derivatives; the score must be traceable by JAX.

        Raises:
          ValueError: it is not.
        """
        program, traced = self._at(coefficients)
        try:
            value, slopes = program.gradient(traced, *program.arguments)
        except _NOT_TRACEABLE as e:
            raise ValueError(
                "--search=gradient: the score turns JAX values into Python or NumPy"
                " ones, so it can't be differentiated; keep it in jax.numpy, or use"
                " --search=cmaes"
            ) from e
        return float(value), {k: float(v) for k, v in slopes.items()}

    def _at(self, coefficients: Coefficients) -> tuple[Program, dict[str, jax.Array]]:
        method = self._config.method
        fixed = {k: v for k, v in coefficients.items() if not is_traced(k, method)}
        traced = {k: jnp.float32(v) for k, v in coefficients.items() if k not in fixed}
        return self._program(tuple(fixed.items()), tuple(traced)), traced

    def _new_program(
        self, fixed: tuple[tuple[str, Any], ...], names: tuple[str, ...]
    ) -> Program:
        config, (base, models, include, *_) = self._config, self._inputs
        known = self._inputs.statistics

        def method(traced: Coefficients, **instead: Any) -> merging.Method:
            at = config_at(config, dict(fixed) | traced)
            return merge.build_method(dataclasses.replace(at, **instead))

        def merged(
            method: Any, base: Any, models: Any, known: Any, traced: Coefficients
        ) -> Any:
            return merging.merge(
                method,
                base,
                models,
                weights=weights_at(config, traced, len(models)),
                statistics=known,
                include=include,
            )

        def whole(traced: Coefficients, base: Any, models: Any, known: Any) -> Any:
            return merged(method(traced), base, models, known, traced)

        # The norm rule's alpha is a number once tau is known.
        norm = config.lines_alpha == "norm"

        def head(
            traced: Coefficients, base: Any, models: Any, known: Any
        ) -> tuple[Any, Any]:
            """tau in float32, before what only scales it, and alpha of LiNeS."""
            instead = {"lines_alpha": 0.0} if norm else {}
            first, _ = split_scales(method(traced, **instead))
            wide = {k: jnp.asarray(x).astype(jnp.float32) for k, x in base.items()}
            first = first._replace(end="parameters")
            tau = merged(first, wide, models, known, traced)
            if not norm:
                return tau, {}
            add = merging.Method((merging.weighted_sum(),), end="parameters")
            total = merging.merge(add, wide, models, include=include)
            pair = [{k: t[k] for k in t if re.search(include, k)} for t in (total, tau)]
            return tau, {"lines_alpha": merging.norm_rule(*pair, len(models))}

        def tail(traced: Coefficients, base: Any, known: tuple[Any, Any]) -> Any:
            tau, instead = known
            _, scales = split_scales(method(traced, **instead))
            last = merging.Method(scales, start="parameters")
            return merging.merge(last, base, [tau], include=include)

        run: Any = jax.jit(whole)
        arguments: tuple[Any, ...] = (base, models, known)
        example = dict.fromkeys(names, jnp.float32(0.5))
        if names and method(example).end == "task_vectors":
            jaxpr = jax.make_jaxpr(head)(example, *arguments).jaxpr
            used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
            if not any(id(v) in used for v in jaxpr.invars[: len(names)]):
                run = jax.jit(tail)
                arguments = (base, jax.jit(head)(example, *arguments))

        def value(traced: Coefficients, *arguments: Any) -> jax.Array:
            return jnp.asarray(self._scored(run(traced, *arguments)), jnp.float32)

        return Program(run, jax.jit(jax.value_and_grad(value)), arguments)

    def _scored(self, tensors: Mapping[str, Any]) -> Any:
        out = call_score(self._score, self._nested(tensors))
        number = isinstance(out, (int, float, np.generic, np.ndarray, jax.Array))
        if not number or np.shape(out):
            shape = f" of shape {np.shape(out)}" if number else ""
            raise ValueError(
                f"--score returned {type(out).__name__}{shape}, expected one number"
            )
        return out

    def _nested(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """What a score is given: integers and tied tensors as well."""
        tensors = {**tensors, **self._inputs.integers}
        tied = {k: tensors[v] for k, v in self._inputs.aliases.items()}
        return trees.nest({**tensors, **tied})


def call_score(score: Callable[..., Any], params: Any) -> Any:
    """What the user's function returns.

    Raises:
      RuntimeError: it failed; the cause has the traceback.
    """
    try:
        return score(params)
    except _NOT_TRACEABLE:
        raise
    except Exception as e:  # the user's code: the traceback is what helps
        raise RuntimeError(f"--score failed: {type(e).__name__}: {e}") from e


def fingerprint(path: str, base: str | None = None) -> list[list[Any]]:
    """Names, sizes and times of a checkpoint's files, to tell a changed one.

    `base`: of adapters and deltas, as for `checkpoints.open`.
    """
    root = Path(path).expanduser()
    with contextlib.ExitStack() as stack:  # errors tell what is wrong with a path
        reader = None
        if base is not None:
            reader = checkpoints.open(Path(base).expanduser())
            stack.callback(reader.close)
        stack.callback(checkpoints.open(root, reader).close)
    files = (
        sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    )
    stats = [(f, f.stat()) for f in files]
    return [[str(f.relative_to(root)), s.st_size, s.st_mtime_ns] for f, s in stats]
