"""adapter_config.json of a PEFT LoRA adapter: scaling, ranks, and what is refused."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from multitask_jax.checkpoints.safetensors_file import parse_json
from multitask_jax.checkpoints.types import CheckpointError

CONFIG = "adapter_config.json"
MAX_BYTES = 1 << 24
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


class Config(NamedTuple):
    """What adapter_config.json says about the weights."""

    rank: int
    alpha: float
    rslora: bool
    transposed: bool  # fan_in_fan_out
    ranks: dict[str, int]  # by pattern of module names
    alphas: dict[str, float]
    targets: tuple[str, ...]  # () where a regex or a shorthand names them

    def rank_of(self, module: str) -> int:
        """The rank that the config states for a module."""
        return _matching(self.ranks, module, self.rank)

    def scaling(self, module: str) -> float:
        """s = alpha / r, or alpha / sqrt(r)."""
        alpha, r = _matching(self.alphas, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(r) if self.rslora else alpha / r


def read_config(path: Path) -> Config:
    """Reads and checks adapter_config.json.

    Raises:
      CheckpointError: not LoRA, a variant that changes weights in another way, or a
        value of another type than expected; names the key.
    """
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: more than {MAX_BYTES} bytes: no config")
    raw = parse_json(path.read_bytes(), path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: got peft_type {raw.get('peft_type')!r}, expected 'LORA'; merge"
            " other adapters into their base with PEFT's merge_and_unload first"
        )
    for key in sorted(set(raw) - _KNOWN):
        if raw[key] not in (None, False, [], {}, ""):
            raise CheckpointError(
                f"{path}: {key} = {str(raw[key])[:80]} is not supported: it may change"
                " weights otherwise than by B A; merge the adapter into its base with"
                " PEFT's merge_and_unload and pass that model"
            )
    start = raw.get("init_lora_weights", True)
    if not any(start is s or (isinstance(s, str) and start == s) for s in _STARTS):
        raise CheckpointError(
            f"{path}: init_lora_weights = {start!r} changed the base's weights, which"
            " the adapter is relative to; save it with PEFT's"
            " path_initial_model_for_weight_conversion, or merged"
        )

    def get(key: str, kind: Any, default: Any) -> Any:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, kind) or (kind is not bool and value is True):
            raise CheckpointError(f"{path}: {key}: got {str(value)[:80]!r}")
        return value

    def positive(key: str, x: Any, whole: bool) -> Any:
        kinds = int if whole else (int, float)
        if isinstance(x, bool) or not isinstance(x, kinds) or not 0 < x < 1e9:
            expected = "a positive whole number" if whole else "a positive number"
            raise CheckpointError(f"{path}: {key}: got {x!r}, expected {expected}")
        return x

    def patterns(key: str, whole: bool) -> dict[str, Any]:
        found = get(key, dict, {})
        return {
            _safe(path, key, k): positive(f"{key}[{k!r}]", x, whole)
            for k, x in found.items()
        }

    targets = get("target_modules", (str, list), [])
    if not all(isinstance(t, str) for t in targets):
        raise CheckpointError(f"{path}: target_modules: expected names, got {targets}")
    return Config(
        positive("r", raw.get("r"), True),
        positive("lora_alpha", raw.get("lora_alpha"), False),
        get("use_rslora", bool, False),
        get("fan_in_fan_out", bool, False),
        patterns("rank_pattern", True),
        patterns("alpha_pattern", False),
        () if isinstance(targets, str) else tuple(targets),
    )


def _safe(path: Path, key: str, pattern: str) -> str:
    """Patterns are regexes by strangers: no nested or many repetitions, so no hang."""
    many = len(re.findall(r"[*+{]", pattern)) > 3
    if len(pattern) > 1000 or many or re.search(r"\)\s*[*+?{]", pattern):
        raise CheckpointError(
            f"{path}: {key}: got the pattern {pattern[:80]!r}, expected a module's name"
            " or a simple regex; spell the names out"
        )
    try:
        re.compile(pattern)
    except re.error as e:
        raise CheckpointError(f"{path}: {key}: {pattern!r} is no regex: {e}") from None
    return pattern


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that is the module's name or its end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
