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
    "qwen3_moe": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
}
_THETA = {"llama": 1e4, "mistral": 1e4, "mixtral": 1e6, "qwen3_moe": 1e4}
# transformers' mixtures that have a dense class of the same other tensors, and names of
# the two classes. Qwen2-MoE's shared expert has no place in one; OLMoE's has none.
_DENSE = {
    "mixtral": ("mistral", "Mixtral", "Mistral"),
    "qwen3_moe": ("qwen3", "Qwen3Moe", "Qwen3"),
}
_OF_MIXTURES = (
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
# What tells transformers a model's class. A mixture that it has no class for keeps the
# dense model's under another key: it would be loaded as that, with new layers.
_CLASS = ("model_type", "architectures", "auto_map")
_ORIGIN = "upcycled_from"


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
        origin = {key: config[key] for key in _CLASS if key in config}
        out = {key: x for key, x in config.items() if key not in origin}
        if "model_type" in origin:
            out["model_type"] = f"upcycled_{origin['model_type']}"
        out |= {"num_experts": experts, "num_experts_per_tok": k}
        return out | {_ORIGIN: origin}
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


def config_of_dense(config: Mapping[str, object]) -> dict[str, object] | None:
    """config.json of the dense model: the inverse.

    Returns:
      None for a mixture whose dense model transformers has no class for, as far as is
      known here.
    """
    if _ORIGIN in config:
        gone = (*_OF_MIXTURES, *_CLASS, _ORIGIN)
        out = {key: x for key, x in config.items() if key not in gone}
        return out | dict(config[_ORIGIN])
    kind = str(config.get("model_type"))
    if kind not in _DENSE:
        return None
    full = _complete(config, kind)
    out = {key: x for key, x in full.items() if key not in _OF_MIXTURES}
    dense, there, here = _DENSE[kind]
    if kind == "qwen3_moe":
        width = full["moe_intermediate_size"]
        some = full.get("mlp_only_layers") or full.get("decoder_sparse_step", 1) != 1
        if some and width != full["intermediate_size"]:
            return None  # some layers are dense there, and of another width
        out |= {"intermediate_size": width, "max_window_layers": 0}  # windows in all
        heads = full["hidden_size"] // full["num_attention_heads"]
        out.setdefault("head_dim", heads)
    names = config.get("architectures") or [f"{there}ForCausalLM"]
    out["architectures"] = [name.replace(there, here) for name in names]
    return out | {"model_type": dense}
