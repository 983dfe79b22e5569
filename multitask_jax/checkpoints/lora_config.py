"""adapter_config.json of a PEFT LoRA adapter: scaling, ranks, and what is refused."""

import functools
import math
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from multitask_jax.checkpoints.json_file import read_json
from multitask_jax.checkpoints.types import CheckpointError, brief

CONFIG = "adapter_config.json"
MAX_BYTES = 1 << 24
# Steps that matching all patterns with all modules may take: some seconds at most.
_MAX_STEPS, _MAX_PATTERNS = 1e9, 5000
# What PEFT writes that says nothing about the weights, or is read below. Anything else
# that is set means another method (DoRA, QALoRA, ...) or a newer one.
_KNOWN = frozenset(
    re.findall(
        r"\w+",
        """
        alpha_pattern auto_mapping base_model_name_or_path bias corda_config
        ensure_weight_tying ephemeral_gpu_offload eva_config exclude_modules
        fan_in_fan_out inference_mode init_lora_weights layers_pattern
        layers_to_transform loftq_config lora_alpha lora_bias lora_dropout
        lora_ga_config megatron_core modules_to_save peft_type peft_version
        qalora_group_size r rank_pattern revision runtime_config target_modules
        task_type use_rslora
        """,
    )
)
# Ways to start that leave the base's weights as they are.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Patterns(NamedTuple):
    """Values by pattern of module names; of those that match, the first counts."""

    names: dict[str, tuple[int, Any]]  # place and value, of whole names: "^a\\.b"
    others: tuple[tuple[int, str, Any], ...]  # place, regex and value

    def of(self, module: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that is the module's name or its end."""
        found = self.names.get(module, (len(self.names) + len(self.others), default))
        for place, pattern, value in self.others:
            if place > found[0]:
                break
            if _compiled(pattern).match(module):
                return value
        return found[1]


class Config(NamedTuple):
    """What adapter_config.json says about the weights."""

    rank: int
    alpha: float
    rslora: bool
    transposed: bool  # fan_in_fan_out
    ranks: Patterns
    alphas: Patterns
    targets: tuple[str, ...]  # () where a regex or a shorthand names them

    def rank_of(self, module: str) -> int:
        """The rank that the config states for a module."""
        return self.ranks.of(module, self.rank)

    def scaling(self, module: str) -> float:
        """s = alpha / r, or alpha / sqrt(r)."""
        alpha, r = self.alphas.of(module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(r) if self.rslora else alpha / r


def read_config(path: Path) -> Config:
    """Reads and checks adapter_config.json.

    Raises:
      CheckpointError: not LoRA, a variant that changes weights in another way, or a
        value of another type than expected; names the key.
    """
    raw = read_json(path, MAX_BYTES)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: got peft_type {brief(raw.get('peft_type'))}, expected 'LORA';"
            " merge other adapters into their base with PEFT's merge_and_unload first"
        )
    for key in sorted(set(raw) - _KNOWN):
        if raw[key] not in (None, False, [], {}, ""):
            shown = key if key.isidentifier() else repr(key)[:80]
            raise CheckpointError(
                f"{path}: {shown} = {brief(raw[key])} is not supported: it may change"
                " weights otherwise than by B A; merge the adapter into its base with"
                " PEFT's merge_and_unload and pass that model"
            )
    start = raw.get("init_lora_weights", True)
    if not any(start is s or (isinstance(s, str) and start == s) for s in _STARTS):
        raise CheckpointError(
            f"{path}: init_lora_weights = {brief(start)} changed the base's weights,"
            " which the adapter is relative to; save it with PEFT's"
            " path_initial_model_for_weight_conversion, or merged"
        )

    def get(key: str, kind: Any, default: Any) -> Any:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, kind) or (kind is not bool and value is True):
            raise CheckpointError(f"{path}: {key}: got {brief(value)}")
        return value

    def positive(key: str, x: Any, whole: bool) -> Any:
        kinds = int if whole else (int, float)
        if isinstance(x, bool) or not isinstance(x, kinds) or not 0 < x < 1e9:
            expected = "a positive whole number" if whole else "a positive number"
            raise CheckpointError(f"{path}: {key}: got {brief(x)}, expected {expected}")
        return x

    def patterns(key: str, whole: bool) -> Patterns:
        names, others = {}, []
        for i, (k, x) in enumerate(get(key, dict, {}).items()):
            value = positive(f"{key}[{k[:80]!r}]", x, whole)
            name = _whole_name(k)
            if name is None:
                others.append((i, _safe(path, key, k), value))
            else:
                names[name] = i, value
        return Patterns(names, tuple(others))

    targets = get("target_modules", (str, list), [])
    if not all(isinstance(t, str) for t in targets):
        raise CheckpointError(
            f"{path}: target_modules: expected names, got {brief(targets)}"
        )
    return Config(
        positive("r", raw.get("r"), True),
        positive("lora_alpha", raw.get("lora_alpha"), False),
        get("use_rslora", bool, False),
        get("fan_in_fan_out", bool, False),
        patterns("rank_pattern", True),
        patterns("alpha_pattern", False),
        () if isinstance(targets, str) else tuple(targets),
    )


def _whole_name(pattern: str) -> str | None:
    """The only name that a pattern matches, if it says so: "^", then escaped."""
    name = re.sub(r"\\(.)", r"\1", pattern[1:])
    return name if pattern == f"^{re.escape(name)}" else None


def _safe(path: Path, key: str, pattern: str) -> str:
    """A pattern of modest size that compiles; `check_cost` sees to what it may take."""
    if len(pattern) > 1000 or re.search(r"\)\s*[*+?{]", pattern):
        raise CheckpointError(
            f"{path}: {key}: got the pattern {pattern[:80]!r}, expected a module's name"
            " or a simple regex; spell the names out"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _compiled(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as e:
        raise CheckpointError(
            f"{path}: {key}: {pattern[:80]!r} is no regex: {e}"
        ) from None
    return pattern


def _steps(pattern: str, length: int) -> float:
    """More steps than a match with a name of this length takes, of any regex.

    Every repetition may end anywhere, everything optional be there or not, and every
    alternative (one and the number of bars, in each group) be tried. Repetitions are
    not nested (`_safe`).
    """
    repeats = len(re.findall(r"[*+{]", pattern))
    ways = float(length + 1) ** min(repeats + 1, 50) / math.factorial(repeats)
    for part in pattern.split(")"):
        ways *= 1 + part.count("|")
        ways *= 2.0 ** part.count("?")
        ways = min(ways, 1e300)
    return len(pattern) + ways


def check_cost(path: Path, config: Config, modules: Collection[str]) -> None:
    """Refuses patterns by strangers that would take too long to match.

    Raises:
      CheckpointError: too many patterns, or too much backtracking.
    """
    patterns = [p for _, p, _ in (*config.ranks.others, *config.alphas.others)]
    longest = max(map(len, modules), default=0)
    steps = sum(_steps(p, longest) for p in patterns) * len(modules)
    if steps > _MAX_STEPS or len(patterns) > _MAX_PATTERNS:
        worst = max(patterns, key=lambda p: _steps(p, longest))
        raise CheckpointError(
            f"{path}: rank_pattern, alpha_pattern: matching {len(patterns)} patterns"
            f" with {len(modules)} modules may take too long; spell the names out,"
            f" instead of {worst[:80]!r}"
        )


@functools.lru_cache(_MAX_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
