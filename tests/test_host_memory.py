"""Kept memory is not asked for again: counted by page faults, in a process apart."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from multitask_jax import host_memory

if sys.argv[1] == "keep":
    assert host_memory.keep_freed_memory()

@jax.jit
def step(x):  # temporary memory of 64 MB
    return jnp.outer(x, x) @ x

x = jnp.arange(4096.0)
for _ in range(30):  # until gaps of all sizes that a step needs are there
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def faults(how: str) -> float:
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_steps_cause_a_tenth_of_the_page_faults() -> None:
    given_back = faults("give back")
    if given_back < 1000:
        pytest.skip("memory comes in huge pages here: nothing to save")
    assert faults("keep") < given_back / 10
