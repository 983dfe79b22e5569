"""Values of flags: lists of numbers and paths, sizes, choices."""

import dataclasses
import math
import os
import re
from typing import Any, TypeVar

C = TypeVar("C")


def numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers, comma-separated; ValueError names the flag."""
    if text is None:
        return None
    try:
        out = [float(x) for x in str(text).split(",")]
        if all(map(math.isfinite, out)):
            return out
        raise ValueError
    except ValueError:
        raise ValueError(
            f"--{name}: got {text!r}, expected numbers like 0.5,0.3"
        ) from None


def seeds(text: str) -> list[int]:
    """--seeds: different whole numbers; ValueError names the flag."""
    found = [s.strip() for s in text.split(",")]
    if not all(map(str.isdigit, found)) or len(set(map(int, found))) < len(found):
        raise ValueError(
            f"--seeds: got {text!r}, expected different numbers like 0,1,2"
        )
    return [int(s) for s in found]


def paths(text: str | None) -> list[str] | None:
    """Paths, comma-separated."""
    if text is None:
        return None
    return [p.strip() for p in text.split(",") if p.strip()]


def expanded(config: C, *names: str) -> C:
    """A config with ~ written out in fields that are paths, if they are set.

    Once for all: not everything that is given a path knows what ~ is.
    """
    paths = {n: os.path.expanduser(p) for n in names if (p := getattr(config, n))}
    return dataclasses.replace(config, **paths)  # type: ignore[type-var]


def rate_of_learning(rate: float) -> None:
    """Raises ValueError for a --rate that would teach nothing."""
    if not 0 < rate < math.inf:
        raise ValueError(f"--rate: got {rate}, expected a number above 0")


def one_of(name: str, value: str, options: tuple[str, ...]) -> Any:
    """The value, if it is one of the options; ValueError names the flag."""
    if value not in options:
        raise ValueError(f"--{name}: got {value!r}, expected one of {options}")
    return value


def at_least(config: Any, **least: float) -> None:
    """Fields of a config that are set and too small; ValueError names the flag."""
    for name, wanted in least.items():
        if (got := getattr(config, name)) is not None and got < wanted:
            raise ValueError(f"--{name}: got {got}, expected at least {wanted}")


def size_in_bytes(name: str, text: str | None) -> int | None:
    """Bytes of a size, before/after: 5GB -> 5 * 10**9, 512MiB -> 512 * 2**20."""
    if not text:
        return None
    m = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", str(text).strip())
    if m is None or float(m[1]) == 0:
        raise ValueError(f"--{name}: got {text!r}, expected a size like 5GB or 512MiB")
    unit = 1024 if m[3] else 1000
    return int(float(m[1]) * unit ** " KMGT".index(m[2].upper() or " "))
