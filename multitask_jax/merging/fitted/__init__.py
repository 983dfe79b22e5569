"""Data-driven merging: methods that look at examples of each task.

Model-agnostic: they take a function `apply_fn(params, inputs) -> logits`, not a class.
"""
