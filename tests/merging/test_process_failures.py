"""Real processes that merge together, and how they end when one of them fails."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import merge
from multitask_jax import checkpoints
from tests.merging.common import make_models, save
from tests.merging.test_processes import digests

ROOT = Path(__file__).resolve().parents[2]

# One process dies while one works on the host, one waits for the others, and one is in
# a collective of XLA. They are forks of one that has imported all but done nothing yet:
# imports are most of the time.
SCENARIO = """
import json, os, signal, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from multitask_jax.checkpoints import TensorInfo
from multitask_jax.merging import distributed, shares

port, victim, how, states, out = sys.argv[1:]
victim = int(victim)
info = [TensorInfo(f"t{i}", (4,), np.dtype(np.float32)) for i in range(4)]

def work(index, state):
    with (
        distributed.join(
            f"localhost:{port}", 4, index, patience=3, timeout=120
        ) as group,
        shares.create(group, out, info, frozenset({f"t{index}"}), {}) as writer,
    ):
        writer.write(f"t{index}", 0, np.ones(2, np.float32))
        group.barrier()
        if index == victim:
            print(os.getpid(), flush=True)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raise":
                raise ValueError("t0: not as it should be")
        if state == "host":
            while True:
                np.sort(np.random.default_rng(0).random(1000))
        if state == "psum":
            multihost_utils.process_allgather(np.ones(3))
        group.barrier()

pids = []
for index, state in enumerate(states.split(",")):
    pids.append(os.fork())
    if not pids[-1]:
        os.dup2(os.open(f"{out}.{index}.err", os.O_CREAT | os.O_WRONLY), 2)
        work(index, state)
        os._exit(0)
statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
print(json.dumps(statuses), file=sys.stderr)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def start(args, **env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it ends with what it forked
    )


def ends(processes, timeout) -> list[tuple[int, str]]:
    """(exit status, stderr) of each; none may outlive the timeout."""
    deadline = time.monotonic() + timeout
    try:
        return [
            (p.returncode, errors)
            for p in processes
            for _, errors in [p.communicate(timeout=deadline - time.monotonic())]
        ]
    finally:
        for p in processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
            p.communicate()


@pytest.mark.parametrize(
    ("victim", "how", "states"),
    [
        (0, "kill", "-,host,wait,psum"),
        (0, "raise", "-,psum,host,wait"),
        (2, "kill", "host,wait,-,psum"),
        (2, "raise", "psum,host,-,wait"),
        (1, "kill inside", "wait,wait,psum,host"),
    ],
)
def test_all_end_when_one_does_and_say_why(tmp_path, victim, how, states):
    port, out = free_port(), tmp_path / "out"
    parent = start(["-c", SCENARIO, port, victim, how, states, out])
    pid = int(parent.stdout.readline())  # as soon as all have begun
    begun = time.monotonic()
    if how == "kill inside":  # a wait for the others
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
    ((_, said),) = ends([parent], 30)
    seconds = time.monotonic() - begun
    statuses = json.loads(said.splitlines()[-1])
    assert len(statuses) == 4
    assert 0 not in statuses
    for i, status in enumerate(statuses):
        file = tmp_path / f"out.{i}.err"
        errors = file.read_text()
        file.unlink()
        if i == victim and how != "raise":
            assert status == -signal.SIGKILL
        elif how == "raise":
            assert status == 1
            who = "" if i == victim else f"process {victim}: "
            assert f"error: {who}t0: not as it should be\n" in errors
        elif victim:
            assert status == 1
            assert f"error: process {victim}: no sign of life for" in errors
        else:  # JAX itself aborts at once without a coordinator
            assert "leader task was preempted/died" in errors
    assert seconds < 15
    # Nothing at the output, and the next start finds nothing in its way.
    left = [p.name for p in tmp_path.iterdir()]
    assert len(left) <= (victim == 0 and how == "kill"), left
    info = [checkpoints.TensorInfo("a", (), "float32")]
    checkpoints.create(out, info).abort()
    assert list(tmp_path.iterdir()) == []


# -- the command line ------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    base, models = make_models(3)
    for name, tree in zip(("base", "m0", "m1", "m2"), [base, *models], strict=True):
        save(folder / name, tree)
    models[0]["scale"] = np.array(np.nan, np.float32)  # the last tensor
    save(folder / "bad", models[0])
    parts = "\n".join(f"- model: m{i}" for i in range(3))
    (folder / "recipe.yml").write_text(
        f"merge_method: ties\nbase_model: base\nmodels:\n{parts}\n"
        "parameters: {density: 0.3, weight: 1.0}\ndtype: float32\n"
    )
    return folder


def by_hand(flags, count, **env):
    port = free_port()
    common = ["-m", "experiments.merge", *flags, "--noprogress"]
    common += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [start([*common, f"--process_id={i}"], **env) for i in range(count)]


def by_slurm(flags, count):
    """As `srun -n COUNT` starts them; the job's number gives the port."""
    command = ["-m", "experiments.merge", *flags, "--noprogress", "--distributed"]
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
    }
    ranks = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
    return [start(command, **job, **rank) for rank in ranks]


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize(
    ("begin", "count", "recipe"), [(by_hand, 2, False), (by_slurm, 4, True)]
)
def test_commands_write_the_bytes_of_one_process(inputs, begin, count, recipe):
    given = (
        {"mergekit_config": str(inputs / "recipe.yml")}
        if recipe
        else {
            "base": str(inputs / "base"),
            "models": ",".join(str(inputs / f"m{i}") for i in range(3)),
            "max_shard_size": "100kB",
        }
    )
    given["output"] = str(inputs / "out")
    # Commands in reports name the output, so that all have the same.
    outcomes = []
    for several in (False, True):
        if several:
            flags = [f"--{k}={v}" for k, v in given.items()]
            assert [s for s, _ in ends(begin(flags, count), 120)] == [0] * count
        else:
            merge.run(merge.Config(**given, progress=False))
        outcomes.append(digests(inputs / "out"))
        shutil.rmtree(inputs / "out")
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0]) > 5


def test_what_one_process_finds_ends_all(inputs):
    models = f"--models={inputs / 'm1'},{inputs / 'bad'}"
    flags = [f"--base={inputs / 'base'}", models, f"--output={inputs / 'bad-out'}"]
    ended = ends(by_hand(flags, 2), 60)
    assert [status for status, _ in ended] == [1, 1]
    errors = [text for _, text in ended]
    assert "tensor 'scale' has nan at flat index 0" in errors[1]
    assert "error: process 1: " in errors[0]
    assert "tensor 'scale' has nan at flat index 0" in errors[0]
    assert [p.name for p in inputs.iterdir() if "out" in p.name] == []


def test_flags_of_processes_are_checked():
    with pytest.raises(ValueError, match="--num_processes, --process_id: got none"):
        merge.run(merge.Config(output="o", coordinator="localhost:1234"))
    with pytest.raises(ValueError, match="--mesh: several processes merge each on one"):
        merge.run(merge.Config(output="o", distributed=True, mesh="model=2"))


def test_a_process_that_stays_alone_says_so():
    code = """
import sys
from multitask_jax.merging import distributed
with distributed.join("localhost:" + sys.argv[1], 2, 1, timeout=1):
    pass
"""
    ((status, errors),) = ends([start(["-c", code, free_port()])], 60)
    assert status == 1
    assert errors.startswith("error: not all processes came within 1 s: pass --coordin")
