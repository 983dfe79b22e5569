"""What a long script does when told to end, or when an input is cut short under it."""

import ctypes
import os
import signal
from typing import Any

_handlers: list[Any] = []  # ctypes callbacks that must outlive their installation


def as_interruption() -> None:
    """SIGTERM (a scheduler's warning, a time limit) ends the script as ctrl-c does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def say_on_bus_error(message: str) -> None:
    """Ends the script with a message where a memory-mapped file has become shorter.

    The kernel answers a read beyond the end of a mapped file with SIGBUS, which ends
    the process without a word. Python's own handlers run after the read has succeeded,
    which it never does, so this one is set below them. Only the message and the exit
    are left to do: nothing is cleaned up, as after a kill.
    """

    def handler(number: int) -> None:
        os.write(2, f"{message}\n".encode())
        os._exit(1)

    try:
        set_handler = ctypes.CDLL(None).signal
    except (OSError, AttributeError):  # no libc to be found by this way
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _handlers.append(kind(handler))
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, kind), ctypes.c_void_p
    set_handler(signal.SIGBUS, _handlers[-1])
