"""mergekit recipes: the YAML files of mergekit, run by this library's methods."""

from multitask_jax.merging.mergekit.run import merge_mergekit

__all__ = ["merge_mergekit"]
