"""What a parameter is for one tensor: levels, filters and gradients, as in mergekit.

Levels: the source model, the slice, the whole recipe; the first that gives a value
wins. Filters: the first entry whose text is in the tensor's name wins; if none is, the
next level is asked. Gradients: at position p in [0, 1] of a slice, linear between the
entries of a list. Layer i of n is at i / (n - 1), a single layer at 1; tensors outside
the layers (the last norm and the head too, as in mergekit) are at 0.
"""

from collections.abc import Sequence

from multitask_jax.merging.mergekit.recipe import Setting, Settings, Value


def layer_position(index: int, count: int) -> float:
    """Where layer `index` of `count` lies, in [0, 1]."""
    return index / (count - 1) if count > 1 else 1.0


def interpolate(values: Sequence[Value], position: float) -> Value:
    """A gradient at a position: [0, 1, 0] at 1/4 is 1/2."""
    if len(values) == 1:
        return values[0]
    scaled = position * (len(values) - 1)
    below = min(int(scaled), len(values) - 2)
    share = scaled - below
    return (1 - share) * values[below] + share * values[below + 1]


def evaluate(setting: Setting, tensor: str, position: float) -> Value | None:
    """The value for a tensor, None if no filter finds it."""
    for text, values in setting.entries:
        if text is None or text in tensor:
            return interpolate(values, position)
    return None


def lookup(
    name: str, levels: Sequence[Settings], tensor: str, position: float
) -> Value | None:
    """The value of a parameter from the first level that has one."""
    for level in levels:
        if name in level:
            value = evaluate(level[name], tensor, position)
            if value is not None:
                return value
    return None


def check_filters(settings: Sequence[Setting], tensors: Sequence[str]) -> None:
    """Refuses a filter that is in no tensor's name: a typo, most likely.

    Raises:
      ValueError: names the filter by its place in the recipe, and some tensors.
    """
    for setting in settings:
        for text, _ in setting.entries:
            if text is not None and not any(text in t for t in tensors):
                step = max(1, len(tensors) // 6)
                raise ValueError(
                    f"{setting.where}: the filter {text!r} is in none of"
                    f" {len(tensors)} names, among them"
                    f" {', '.join(list(tensors)[::step][:6])}"
                )
