"""Compiled programs on disk, for runs that compile alike ones hundreds of times."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Programs that are compiled meanwhile are kept in `folder`, and found there.

    A folder that the user has set (JAX_COMPILATION_CACHE_DIR) is used instead.
    """
    if jax.config.jax_compilation_cache_dir:
        yield
        return
    told = {"jax_compilation_cache_dir": str(folder.absolute()), **_SETTINGS}
    before = {name: getattr(jax.config, name) for name in told}
    try:
        for name, value in told.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it may have been looked for before
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
