"""A strict environment: 8 CPU devices, no broadcasting of ranks, fixed examples."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import jaxlib
import pytest
from absl import flags

from multitask_jax.merging import report

# XLA's older way from fusions to LLVM takes half the newer one's time, and several
# threads for a small program cost more than they save. In versions that were tried
# only: XLA ends a process for an option that it does not know.
if jaxlib.__version__.startswith("0.10."):
    _FLAGS = os.environ.get("XLA_FLAGS", "").split()
    for _FLAG in (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ):
        if _FLAG not in _FLAGS:  # a worker has its parent's
            _FLAGS.append(_FLAG)
    os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
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


@pytest.fixture(scope="module", autouse=True)
def compile_briefly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs are not optimised, here or in scripts: they compile in a quarter of it.

    Those of a module marked `optimised` are, as outside of tests: bits depend on it.
    """
    brief = request.node.get_closest_marker("optimised") is None
    if not brief:
        jax.clear_caches()  # of what other modules compiled briefly
    with pytest.MonkeyPatch.context() as m:
        m.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(brief)))
        jax.config.update("jax_disable_most_optimizations", brief)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
    if not brief:
        jax.clear_caches()


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
