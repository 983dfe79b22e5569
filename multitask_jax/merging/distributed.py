"""Joining the processes of a merge, by JAX's distributed runtime.

with distributed.join("host0:1234", num_processes=4, process_id=2) as group:
    merging.merge_checkpoints(method, base, models, output, group=group)
"""

import contextlib
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

from multitask_jax.merging.liveness import PATIENCE, Watch
from multitask_jax.merging.processes import Group

_WEEK = 7 * 24 * 3600 * 1000  # ms: a peer may be busy for long; if it dies, Watch tells


class _Service:
    """The store of JAX's coordination service."""

    def __init__(self, client: Any):
        self._client = client

    def set(self, key: str, value: bytes) -> None:
        self._client.key_value_set_bytes(key, value)

    def get(self, key: str) -> bytes:
        return self._client.blocking_key_value_get_bytes(key, _WEEK)

    def delete(self, key: str) -> None:
        self._client.key_value_delete(key)


_WHERE = (
    "pass --coordinator=HOST:PORT (of process 0, reachable from all, a free port),"
    " --num_processes and --process_id (0 to one less than that) to each; --distributed"
    " finds them by itself on TPU pods and under Slurm or Open MPI only"
)


def _initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int,
) -> None:
    """`jax.distributed.initialize`, with reasons where it would abort."""
    import jax

    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator: got {coordinator!r}, expected HOST:PORT")
    # It would swallow SIGTERM, so that nothing short of SIGKILL stops a merge.
    jax.config.update("jax_enable_preemption_service", False)

    def give_up() -> None:
        print(
            f"error: not all processes came within {timeout} s: {_WHERE}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout + 10,
            # The second line: Watch is quicker (JAX notices after 10 to 20 s, by
            # aborting) and says more.
            heartbeat_timeout_seconds=20,
        )
    except (ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"no group of processes ({reason}): {_WHERE}") from None
    finally:
        timer.cancel()


@contextlib.contextmanager
def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    patience: float = PATIENCE,
    timeout: int = 300,
) -> Iterator[Group]:
    """Joins the other processes by `jax.distributed`; they end or fail together.

    Where this process raises, the others learn the reason, print it and end; where
    another one fails or disappears, this one prints why and ends. Ending is
    `os._exit(1)`: JAX's own shutdown would wait for processes that are gone.

    Args:
      coordinator: "host:port" of process 0, any free port. All three arguments are
        found by JAX on TPU pods and under Slurm or Open MPI, if None.
      num_processes, process_id: how many there are, and which this is, from 0.
      patience: seconds without a sign of life before a process counts as dead.
      timeout: seconds to wait for all processes to come.

    Raises:
      ValueError: nothing tells who the processes are; they can't find each other.
    """
    import jax
    from jax._src import distributed  # the client has no public name

    started_here = not jax.distributed.is_initialized()
    if started_here:
        _initialize(coordinator, num_processes, process_id, timeout)
    state = distributed.global_state
    index, count = state.process_id, state.num_processes
    watch = Watch(state.client, index, count, patience)
    group = Group(index, count, _Service(state.client), watch)
    watch.start()
    try:
        # Devices are found by all processes together: also by one without tensors.
        jax.local_devices()
        hosts = group.combine(socket.gethostname(), list)
        group.neighbours = hosts.count(hosts[index])
        yield group
        group.barrier()
    except BaseException as e:
        if not isinstance(e, (ValueError, OSError, KeyboardInterrupt, SystemExit)):
            traceback.print_exc()
        interrupted = isinstance(e, KeyboardInterrupt)
        reason = "interrupted" if interrupted else str(e) or type(e).__name__
        print(f"error: {reason}", file=sys.stderr)
        watch.fail(reason)
    watch.stop()
    if started_here:
        jax.distributed.shutdown()
