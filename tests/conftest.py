"""A strict environment: 8 CPU devices, no broadcasting of ranks, fixed examples."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import pytest
from absl import flags
from jax._src import compiler

from multitask_jax.merging import report

# Before anything touches a device: afterwards JAX refuses to change their number.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Every merge jits anew what another test may have compiled already. One folder for this
# run, its workers and the scripts and notebooks they start; empty at first: no run sees
# what another one compiled.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="multitask-jax-tests-")
    atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Experiments read absl flags only as scripts, but libraries beneath them want them.
flags.FLAGS.mark_as_parsed()
# Compilation makes first calls slow, so no deadline; the same examples in every run.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def older_emitters() -> dict[str, bool]:
    """XLA's older way from fusions to LLVM, which takes half the newer one's time.

    Nothing where XLA no longer knows the option: it would refuse all programs.
    """
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


@pytest.fixture(scope="module", autouse=True)
def compile_briefly(
    request: pytest.FixtureRequest, older_emitters: dict[str, bool]
) -> Iterator[None]:
    """Programs are not optimised, here or in scripts: they compile in a quarter of it.

    Those of a module marked `optimised` are, as outside of tests: bits depend on it.
    """
    brief = request.node.get_closest_marker("optimised") is None
    if not brief:
        jax.clear_caches()  # of what other modules compiled briefly
    with pytest.MonkeyPatch.context() as m:
        m.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(brief)))
        jax.config.update("jax_disable_most_optimizations", brief)
        if brief and older_emitters:
            m.setattr(*_with_options(older_emitters))
            given = [f"--{k}={str(v).lower()}" for k, v in older_emitters.items()]
            m.setenv("XLA_FLAGS", " ".join([os.environ.get("XLA_FLAGS", ""), *given]))
        yield
        jax.config.update("jax_disable_most_optimizations", False)
    if not brief:
        jax.clear_caches()


def _with_options(options: dict[str, bool]) -> tuple[Any, str, Callable[..., Any]]:
    """What to set so that all programs are compiled with these options of XLA's.

    XLA reads XLA_FLAGS once a process, and JAX has no setting for a part of one.
    """
    inner, key = compiler.get_compile_options, "env_options_overrides"

    def get_compile_options(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs | {key: options | (kwargs.get(key) or {})})

    return compiler, "get_compile_options", get_compile_options


@pytest.fixture(scope="session", autouse=True)
def draw() -> Iterator[Callable[..., None]]:
    """Draws a report's figures, which no test gets that does not ask for `figures`.

    They are four fifths of the time of a small merge, and nothing depends on them.
    """
    inner = report._figures
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, "_figures", lambda *args, **kwargs: None)
        yield inner


@pytest.fixture
def figures(draw: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with their figures, as outside of tests."""
    monkeypatch.setattr(report, "_figures", draw)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data and golden files kept outside the repository; skips where there are none."""
    path = Path(os.environ.get("MULTITASK_DATA", REPOSITORY.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no {path}; set MULTITASK_DATA to the folder of data and goldens")
    return path
