"""Command lines from frozen dataclasses: one definition for scripts, tests, notebooks.

A script ends with

    if __name__ == "__main__":
        flags.main(Config, run)

so that importing it defines no flag (two modules that define one flag clash), and tests
and notebooks call `run(Config(...))`. A field and its help:

    steps: int = flag("Steps.", 100)
"""

import dataclasses
import logging as python_logging
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging

C = TypeVar("C")
# `--help` shows the flags as those of the script that calls `define`.
absl_flags.disclaim_key_flags()

_DEFINE: dict[Any, Callable[..., Any]] = {
    bool: absl_flags.DEFINE_bool,
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    str: absl_flags.DEFINE_string,
}


def flag(text: str, default: Any = None) -> Any:
    """A field of a Config with its `--help`."""
    return dataclasses.field(default=default, metadata={"help": text})


def _plain_type(name: str, hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The flag's type and, of a Literal, its choices: `int | None` -> (int, ())."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        hint = inner[0] if len(inner) == 1 else hint
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint)
    if hint not in _DEFINE:
        raise TypeError(
            f"field {name}: got type {hint}, expected bool, int, float, str, a Literal"
            " of strings, or one of these with None; write lists as comma strings"
        )
    return hint, ()


def define(
    config_class: type[Any], values: absl_flags.FlagValues = absl_flags.FLAGS
) -> None:
    """Defines one absl flag a field; a field without a default is required.

    Args:
      config_class: a dataclass of bools, ints, floats, strings, Literals of strings,
        and these with None.
      values: where to define them.

    Raises:
      TypeError: a field of another type; names it.
    """
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        kind, choices = _plain_type(f.name, hints[f.name])
        required = f.default is dataclasses.MISSING
        default = None if required else f.default
        text = f.metadata.get("help", f.name.replace("_", " "))
        if choices:
            absl_flags.DEFINE_enum(
                f.name, default, list(choices), text, flag_values=values
            )
        else:
            _DEFINE[kind](f.name, default, text, flag_values=values)
        if required:
            absl_flags.mark_flag_as_required(f.name, flag_values=values)


def read(config_class: type[C], values: absl_flags.FlagValues = absl_flags.FLAGS) -> C:
    """The config that the parsed flags describe; call it after parsing."""
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    return config_class(**{f.name: values[f.name].value for f in fields})


def main(
    config_class: type[C], run: Callable[[C], Any], argument: str | None = None
) -> None:
    """Parses the command line and runs the script.

    `argument`: the field that an argument without a flag's name gives.
    """
    define(config_class)

    def start(argv: Sequence[str]) -> None:
        if (
            argument is not None
            and len(argv) == 2
            and not absl_flags.FLAGS[argument].present
        ):
            absl_flags.FLAGS[argument].value = argv.pop()
        if len(argv) > 1:
            raise app.UsageError(
                f"got stray arguments {argv[1:]}; write --name=value (--helpfull lists"
                " every flag)"
            )
        # Orbax tells of each of its files; --verbosity=0 shows that.
        if not absl_flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.WARNING)
        run(read(config_class))

    # JAX tells at INFO which accelerators it did not find: not worth a line.
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    app.run(start)


def plain_errors(
    run: Callable[[C], Any],
    interrupted: str | Callable[[C], str] = "nothing was written",
) -> Callable[[C], None]:
    """The script for `main`: errors of input end in one message, without a traceback.

    Args:
      run: raises ValueError or OSError for what the user got wrong, FloatingPointError
        where training diverged.
      interrupted: what to say after ctrl-c, of a config perhaps.
    """

    def script(config: C) -> None:
        try:
            run(config)
        except (ValueError, OSError, FloatingPointError) as e:
            sys.exit(f"error: {e}")
        except KeyboardInterrupt:
            said = interrupted(config) if callable(interrupted) else interrupted
            sys.exit(f"interrupted: {said}")

    return script
