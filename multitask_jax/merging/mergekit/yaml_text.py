"""Reading YAML that strangers wrote: bounded, no objects, no key lost."""

import itertools
from typing import Any

MAX_BYTES = 200_000
# PyYAML reads some 20,000 values a second, and each slower the deeper it lies.
MAX_VALUES, MAX_DEPTH = 20_000, 50
_MAX_SCALAR = 10_000  # 1:1:1:... is a number in base 60
MAX_NODES = 100_000  # after aliases are expanded
# What PyYAML's constructors raise besides its own errors: for 2024-13-45, a number
# without end, `!!float ''`, `!!bool maybe`, `!!timestamp soon`.
_NO_VALUE = (ValueError, ArithmeticError, LookupError, AttributeError, TypeError)


def read_yaml(text: str, where: str) -> Any:
    """The content of a text, of plain YAML types.

    Args:
      text: YAML.
      where: what errors begin with, followed by the line.

    Raises:
      ValueError: not YAML, a key that occurs twice, too large, or aliases that expand
        to too much (or contain themselves).
    """
    import yaml

    if len(text) > MAX_BYTES:
        raise ValueError(
            f"{where}: got {len(text):,} characters, at most {MAX_BYTES:,}"
        )
    values = sum(map(text.count, ("\n", ",", "[", "{", "- ", "? ")))
    if values > MAX_VALUES:
        raise ValueError(f"{where}: got {values:,} values, at most {MAX_VALUES:,}")
    if _brackets(text) > MAX_DEPTH:
        raise ValueError(f"{where}: nested too deeply for a recipe")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_node(node, {}, where)
        try:
            return None if node is None else _loader().construct_document(node)
        except _NO_VALUE as e:
            line = _unreadable(node)
            raise ValueError(f"{where}:{line}: not a value of YAML: {e}") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        line = f"{where}:{mark.line + 1}" if mark else where
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(e.problem) else ""
        raise ValueError(f"{line}: not valid YAML: {e.problem}{hint}") from None
    except yaml.YAMLError as e:
        raise ValueError(f"{where}: not valid YAML: {e}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for a recipe") from None


def _loader() -> Any:
    import yaml

    return yaml.SafeLoader("")


def _brackets(text: str) -> int:
    """How deep brackets are nested, those in quotes and comments too."""
    steps = (1 if c in "[{" else -1 for c in text if c in "[]{}")
    return max(itertools.accumulate(steps), default=0)


def _unreadable(root: Any) -> int | str:
    """The line of the first scalar whose value can't be made."""
    todo = [root]
    while todo:
        node = todo.pop()
        if node.id == "mapping":
            todo += [x for pair in reversed(node.value) for x in reversed(pair)]
        elif node.id == "sequence":
            todo += reversed(node.value)
        else:
            try:
                _loader().construct_object(node)
            except _NO_VALUE:
                return node.start_mark.line + 1
    return "?"


def _check_node(node: Any, sizes: dict[int, int | None], where: str) -> int:
    """The number of nodes with aliases expanded; refuses bombs and repeated keys."""
    if node is None:
        return 0
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise ValueError(f"{where}:{node.start_mark.line + 1}: contains itself")
        return size
    sizes[id(node)] = None
    children: list[Any] = []
    if node.id == "mapping":
        seen: set[str] = set()
        for key, value in node.value:
            name = key.value if key.id == "scalar" else None
            if name in seen and name != "<<":
                raise ValueError(
                    f"{where}:{key.start_mark.line + 1}: the key {name!r} occurs twice"
                )
            seen.add(str(name))
            children += [key, value]
    elif node.id == "sequence":
        children = node.value
    elif len(node.value) > _MAX_SCALAR:
        raise ValueError(
            f"{where}:{node.start_mark.line + 1}: got a value of {len(node.value):,}"
            f" characters, at most {_MAX_SCALAR:,}"
        )
    size = 1 + sum(_check_node(c, sizes, where) for c in children)
    if size > MAX_NODES:
        raise ValueError(
            f"{where}:{node.start_mark.line + 1}: expands to more than {MAX_NODES:,}"
            " values: too large for a recipe"
        )
    sizes[id(node)] = size
    return size
