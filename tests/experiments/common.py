"""What the tests of experiments share."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from absl import flags as absl_flags

from experiments import flags

C = TypeVar("C")
FLAGFILES = Path(flags.__file__).parent / "flagfiles"


def from_flagfile(config_class: type[C], name: str, **changes: Any) -> C:
    """The config of a flagfile such as "mtmt/smoke", as a command line reads it."""
    values = absl_flags.FlagValues()
    flags.define(config_class, values)
    absl_flags.DEFINE_multi_string("flagfile", [], "Flags.", flag_values=values)
    file = f"--flagfile={FLAGFILES / name}.flags"
    values(["test", *values.read_flags_from_files([file])])
    return dataclasses.replace(flags.read(config_class, values), **changes)
