"""config.json of a mixture, made of a dense model's, and back."""

from collections.abc import Mapping
from pathlib import Path

from multitask_jax.checkpoints import CheckpointError

# What transformers takes for a key that config.json lacks, by model_type; where they
# differ, the mixture needs the key.
_DEFAULTS: dict[str, dict[str, object]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": None,
    },
}
_THETA = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6}


def _complete(config: Mapping[str, object], kind: str) -> dict[str, object]:
    """config.json with its model_type's defaults written out."""
    out = _DEFAULTS[kind] | dict(config)
    if kind == "llama" and "num_key_value_heads" not in out:
        out["num_key_value_heads"] = out.get("num_attention_heads", 32)
    if "rope_parameters" not in out:
        out.setdefault("rope_theta", _THETA[kind])
    return out


def config_of_mixture(
    config: Mapping[str, object], layout: str, experts: int, k: int, path: Path
) -> dict[str, object]:
    """config.json of the mixture.

    Raises:
      CheckpointError: transformers' Mixtral has no such model.
    """
    if layout != "mixtral":
        return {**config, "num_experts": experts, "num_experts_per_tok": k}
    kind = config.get("model_type")
    biases = [k for k in ("attention_bias", "mlp_bias") if config.get(k)]
    if kind not in ("llama", "mistral") or biases:
        raise CheckpointError(
            f"{path}: got model_type {kind!r} {' '.join(biases)}, expected llama or"
            " mistral without biases for --layout=mixtral; or choose --layout=names"
        )
    return {
        **_complete(config, str(kind)),
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": k,
    }


def config_of_dense(config: Mapping[str, object]) -> dict[str, object]:
    """config.json of the dense model: the inverse."""
    ours = ("num_local_experts", "num_experts", "num_experts_per_tok")
    out = {key: x for key, x in config.items() if key not in ours}
    if out.get("model_type") == "mixtral":
        out = _complete(out, "mixtral")
        out |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return out
