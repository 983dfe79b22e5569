"""mergekit's YAML, parsed into frozen dataclasses; every key is known or refused.

    merge_method: ties
    base_model: base
    models:
    - model: ft1
      parameters: {weight: 1.0, density: [0.3, 0.7]}
    dtype: float32

A key that is not understood is an error that names it by its path in the file
("slices[0].sources[1].parameters.wieght") with a near match.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multitask_jax.checkpoints.types import brief, name_problem
from multitask_jax.merging.mergekit import methods
from multitask_jax.merging.mergekit.yaml_text import MAX_BYTES, read_yaml

Value = float | bool
# Keys that steer mergekit's own machinery, and what is said of each.
_IGNORED = {
    "chat_template": "not applied: the chat template of the tokenizer's files is kept",
    "name": "not used: the output is named by its path",
    "random_seed": "the seed of random masks is an argument here",
    "int8_mask": "masks are never stored here",
    "eps": "norms of zero are guarded for in another way here",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A parameter's value: (filter, value or gradient) pairs, the first match wins.

    Before/after: `0.5` -> ((None, (0.5,)),); a gradient `[0, 1]` -> ((None, (0, 1)),).
    """

    where: str
    entries: tuple[tuple[str | None, tuple[Value, ...]], ...]


Settings = Mapping[str, Setting]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, or layers [start, stop) of it."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings
    where: str


@dataclasses.dataclass(frozen=True)
class Slice:
    """Output layers, made of the same number of layers of every source."""

    sources: tuple[Source, ...]
    parameters: Settings
    base_model: str | None
    where: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole file. `models` is one slice whose sources have `layers` None."""

    method: str
    slices: tuple[Slice, ...]
    parameters: Settings
    base_model: str | None
    dtype: str | None
    out_dtype: str | None
    tokenizer: str | None  # "base", "union" or a model
    pad_to_multiple_of: int | None
    notes: tuple[str, ...]
    text: str  # the YAML

    @property
    def whole(self) -> bool:
        """Whether it merges models, rather than slices of layers."""
        return self.slices[0].sources[0].layers is None

    @property
    def settings(self) -> list[Setting]:
        """All parameters at all levels."""
        levels = [self.parameters, *(s.parameters for s in self.slices)]
        levels += [source.parameters for s in self.slices for source in s.sources]
        return [setting for level in levels for setting in level.values()]


def load(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Reads and checks a recipe: a path, or what its YAML would hold.

    Raises:
      ValueError: not YAML, or an unknown, missing or malformed key; names it.
    """
    if isinstance(recipe, Mapping):
        import yaml

        try:
            text = yaml.safe_dump(dict(recipe), sort_keys=False)
        except yaml.YAMLError as e:
            raise ValueError(f"recipe: not what YAML can hold: {e}") from None
        return parse(text, "recipe")
    path = Path(recipe).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a mergekit recipe in YAML")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path}: got {path.stat().st_size:,} bytes, expected a recipe of"
            f" {MAX_BYTES:,} at most"
        )
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e})") from None


def parse(text: str, where: str = "recipe") -> Recipe:
    """Parses a recipe's text; errors begin with `where`.

    Raises:
      ValueError: as for `load`.
    """
    content = read_yaml(text, where)
    try:
        return _recipe(content, text)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


# -- keys ------------------------------------------------------------------------------


def near(name: Any, options: Sequence[str]) -> str:
    """Ends an error: did you mean this, or, if nothing is near, one of these."""
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; expected one of {', '.join(options)}"


def _mapping(x: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    at = where or "the file"
    if not isinstance(x, dict):
        raise ValueError(f"{at}: got {_kind(x)}, expected a mapping of keys to values")
    for key in x:
        if key not in keys:
            shown = str(key) if str(key).isidentifier() else repr(key)
            shown = shown[:80]
            raise ValueError(f"{_join(where, shown)}: unknown key{near(shown, keys)}")
    return {k: v for k, v in x.items() if v is not None}


def _kind(x: Any) -> str:
    return "nothing" if x is None else f"{type(x).__name__} {str(x)[:60]!r}"


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _listed(x: Any, where: str) -> list[Any]:
    if not isinstance(x, list) or not x:
        raise ValueError(f"{where}: got {_kind(x)}, expected a list with entries")
    return x


def _text(x: Any, where: str) -> str:
    if not isinstance(x, str) or not x.strip():
        raise ValueError(f"{where}: got {_kind(x)}, expected text")
    if problem := name_problem(x):
        raise ValueError(f"{where}: got {x[:80]!r}: {problem}")
    return x.strip()


def _model(x: Any, where: str) -> str:
    """A path; mergekit also writes {model: {path: ...}, lora: ...}."""
    if isinstance(x, dict):
        keys = ("model", "path", "lora", "revision", "override_architecture")
        inner = _mapping(x, where, keys)
        for key in inner:
            if key not in ("model", "path"):
                raise ValueError(
                    f"{where}.{key}: not supported; give the path of a checkpoint on"
                    " disk (merge a LoRA into it first)"
                )
        if len(inner) != 1:
            raise ValueError(f"{where}: expected one path, got {sorted(inner)}")
        ((key, value),) = inner.items()
        return _model(value, f"{where}.{key}")
    return _text(x, where)


_TOP = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "parameters",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)


def _recipe(content: Any, text: str) -> Recipe:
    top = _mapping(content, "", _TOP)
    if "merge_method" not in top:
        raise ValueError(f"merge_method: got nothing{near('', tuple(methods.SPECS))}")
    method = _text(top["merge_method"], "merge_method")
    if method not in methods.SPECS:
        raise ValueError(
            f"merge_method: got {method[:80]!r}"
            f"{near(method[:80], tuple(methods.SPECS))}"
        )
    if "modules" in top:
        raise ValueError(
            "modules: not supported; `models` merges the modules of a model as well,"
            " each stack of layers with its own gradient"
        )
    if ("models" in top) == ("slices" in top):
        got = "both" if "models" in top else "neither"
        raise ValueError(f"models, slices: got {got}, expected one of them")
    notes: list[str] = []
    for key in ("chat_template", "name"):
        if key in top:
            notes.append(f"{key}: {_IGNORED[key]}.")

    def settings(x: Mapping[str, Any], where: str) -> Settings:
        at = _join(where, "parameters")
        return _settings(x.get("parameters"), at, method, "model" in x, notes)

    if "models" in top:
        sources = []
        for i, x in enumerate(_listed(top["models"], "models")):
            at = f"models[{i}]"
            m = _mapping(x, at, ("model", "parameters"))
            model = _model(m.get("model"), f"{at}.model")
            sources.append(Source(model, None, settings(m, at), at))
        slices = [Slice(tuple(sources), {}, None, "models")]
    else:
        slices = [
            _slice(x, f"slices[{i}]", settings)
            for i, x in enumerate(_listed(top["slices"], "slices"))
        ]
    base = top.get("base_model")
    tokenizer, padding = _tokenizer(top)
    return Recipe(
        method=method,
        slices=tuple(slices),
        parameters=settings(top, ""),
        base_model=None if base is None else _model(base, "base_model"),
        dtype=_optional_text(top, "dtype"),
        out_dtype=_optional_text(top, "out_dtype"),
        tokenizer=tokenizer,
        pad_to_multiple_of=padding,
        notes=tuple(dict.fromkeys(notes)),
        text=text,
    )


def _optional_text(x: Mapping[str, Any], key: str) -> str | None:
    return _text(x[key], key) if key in x else None


def _slice(x: Any, where: str, settings: Any) -> Slice:
    keys = ("sources", "parameters", "base_model", "residual_weight")
    content = _mapping(x, where, keys)
    if "residual_weight" in content:
        raise ValueError(f"{where}.residual_weight: not supported; leave it out")
    sources = []
    for i, source in enumerate(_listed(content.get("sources"), f"{where}.sources")):
        at = f"{where}.sources[{i}]"
        s = _mapping(source, at, ("model", "layer_range", "parameters"))
        model = _model(s.get("model"), f"{at}.model")
        layers = _layer_range(s.get("layer_range"), f"{at}.layer_range")
        sources.append(Source(model, layers, settings(s, at), at))
    lengths = [s.layers[1] - s.layers[0] for s in sources if s.layers]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{where}.sources: layer_range of {lengths} layers; the sources of a slice"
            " are merged layer by layer, so all need as many"
        )
    base = content.get("base_model")
    base = None if base is None else _model(base, f"{where}.base_model")
    return Slice(tuple(sources), settings(content, where), base, where)


def _layer_range(x: Any, where: str) -> tuple[int, int]:
    natural = isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)
    if not natural or len(x) != 2 or x[0] >= x[1]:
        raise ValueError(
            f"{where}: got {brief(x)}, expected [first, stop): two layer numbers from"
            " 0, such as [0, 8] for the first eight"
        )
    return x[0], x[1]


def _tokenizer(top: Mapping[str, Any]) -> tuple[str | None, int | None]:
    if "tokenizer" not in top:
        source = top.get("tokenizer_source")
        return None if source is None else _model(source, "tokenizer_source"), None
    if "tokenizer_source" in top:
        raise ValueError("tokenizer_source, tokenizer: got both, expected one of them")
    x = _mapping(
        top["tokenizer"], "tokenizer", ("source", "tokens", "pad_to_multiple_of")
    )
    if x.get("tokens"):
        raise ValueError(
            "tokenizer.tokens: not supported; embeddings follow tokenizer.source (a"
            " token that a model lacks gets the base's row, else the others' mean)"
        )
    padding = x.get("pad_to_multiple_of")
    if padding is not None and (type(padding) is not int or padding < 1):
        raise ValueError(
            f"tokenizer.pad_to_multiple_of: got {padding!r}, expected a natural number"
        )
    return _model(x.get("source", "union"), "tokenizer.source"), padding


# -- parameters ------------------------------------------------------------------------


def _settings(
    x: Any, where: str, method: str, of_model: bool, notes: list[str]
) -> Settings:
    if x is None:
        return {}
    spec = methods.SPECS[method]
    known = tuple(sorted(methods.ALL_PARAMETERS | _IGNORED.keys()))
    out = {}
    for name, value in _mapping(x, where, known).items():
        at = f"{where}.{name}"
        if name in _IGNORED:
            notes.append(f"{name}: has no effect; {_IGNORED[name]}.")
        elif name not in spec.parameters or (of_model and name in spec.per_tensor):
            what = "one model in" if name in spec.parameters else "the method"
            notes.append(
                f"{at}: not a parameter of {what} {method}; no effect, as in mergekit."
            )
        else:
            switch = name in methods.SWITCHES
            out[name] = Setting(at, _entries(value, at, switch))
    return out


def _entries(
    x: Any, where: str, switch: bool
) -> tuple[tuple[str | None, tuple[Value, ...]], ...]:
    conditions = x if isinstance(x, list) else [x]
    if not any(isinstance(c, dict) for c in conditions):
        return ((None, _values(x, where, switch)),)
    out = []
    for i, c in enumerate(conditions):
        at = f"{where}[{i}]" if isinstance(x, list) else where
        entry = _mapping(c, at, ("filter", "value"))
        if "value" not in entry:
            raise ValueError(f"{at}.value: got nothing, expected a number or a list")
        text = entry.get("filter")
        text = None if text in (None, "*") else _text(text, f"{at}.filter")
        out.append((text, _values(entry["value"], f"{at}.value", switch)))
    return tuple(out)


def _values(x: Any, where: str, switch: bool) -> tuple[Value, ...]:
    if switch:
        spelled = {"true": True, "false": False, "1": True, "0": False}
        text = str(x).lower().removesuffix(".0")
        if text not in spelled:
            raise ValueError(f"{where}: got {_kind(x)}, expected true or false")
        return (spelled[text],)
    if x == []:
        raise ValueError(f"{where}: got an empty gradient, expected numbers")
    return tuple(_number(v, where) for v in (x if isinstance(x, list) else [x]))


def _number(x: Any, where: str) -> float:
    """YAML reads 1e-6 (without a dot) as text."""
    try:
        number = math.nan if isinstance(x, (bool, list, dict)) else float(x)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{where}: got {_kind(x)}, expected a number, a gradient like [0, 0.5, 1],"
            " or a list of {filter: text, value: ...}"
        )
    return number
