"""Several processes that do one merge together: who they are, and what they exchange.

Every process runs the same program on the same flags and does its share of the tensors.
What they must know of each other (counts, sums, notes) goes through the key-value store
of JAX's coordination service; process 0 is the hub. `join` starts all that; a process
on its own is `ALONE`, to which every exchange is trivial.

    with processes.join("host0:1234", num_processes=4, process_id=2) as group:
        merging.merge_checkpoints(method, base, models, output, group=group)
"""

import contextlib
import hashlib
import json
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from multitask_jax.merging.liveness import PATIENCE, Watch

_PIECE = 1 << 20  # bytes of a message at most; longer values go in pieces
_WEEK = 7 * 24 * 3600 * 1000  # ms: a peer may be busy for long; if it dies, Watch tells


class Store(Protocol):
    """A key-value store that all processes see."""

    def set(self, key: str, value: bytes) -> None:
        """Sets a key that has no value yet."""

    def get(self, key: str) -> bytes:
        """Waits until the key has a value."""

    def delete(self, key: str) -> None:
        """Forgets a key."""


class Group:
    """The processes of one merge. Each calls the same methods in the same order."""

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        store: Store | None = None,
        watch: Watch | None = None,
    ):
        self.index, self.count = index, count
        self.watch = watch
        self.neighbours = 1  # processes on this host, this one included
        self._store = store
        self._calls = 0

    def combine(self, value: Any, function: Callable[[list[Any]], Any]) -> Any:
        """function([value of process 0, of process 1, ...]), the same for everyone.

        Waits for all. Values are what JSON has: numbers (exact), strings, lists,
        dictionaries. The function is called by process 0 alone.
        """
        if self.count == 1:
            return function([value])
        assert self._store is not None
        self._calls += 1
        key = f"multitask_jax/{self._calls}"
        if self.index:
            self._send(f"{key}/{self.index}", value)
            return self._receive(f"{key}/all")
        others = range(1, self.count)
        values = [value, *(self._receive(f"{key}/{i}", forget=True) for i in others)]
        # Everybody is here, so nobody still reads the result of the call before.
        self._forget(f"multitask_jax/{self._calls - 1}/all")
        result = function(values)
        self._send(f"{key}/all", result)
        return json.loads(json.dumps(result))

    def add(self, values: Sequence[int]) -> list[int]:
        """Sums over the processes of each integer."""
        return self.combine(
            [int(x) for x in values],
            lambda rows: [sum(column) for column in zip(*rows, strict=True)],
        )

    def barrier(self) -> None:
        """Waits for all."""
        self.combine(None, lambda values: None)

    def agree(self, what: str, value: Any) -> None:
        """Raises ValueError unless `value` is the same everywhere, going by its repr.

        Args:
          what: it is, for the message.
          value: of this process.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256(repr(value).encode()).hexdigest()
        digests = self.combine(digest, list)
        other = [i for i, d in enumerate(digests) if d != digests[0]]
        if other:
            raise ValueError(
                f"processes {', '.join(map(str, other))} got other {what} than process"
                " 0; start all with the same command (but for --process_id), the same"
                " files and the same version"
            )

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """The failure of another process ends this one before or after, not inside."""
        with contextlib.nullcontext() if self.watch is None else self.watch.ending:
            yield

    def _send(self, key: str, value: Any) -> None:
        assert self._store is not None
        data = json.dumps(value).encode()
        pieces = [data[i : i + _PIECE] for i in range(0, len(data), _PIECE)]
        for n, piece in enumerate(pieces[1:], 1):
            self._store.set(f"{key}/{n}", piece)
        self._store.set(key, b"%d " % len(pieces) + pieces[0])

    def _receive(self, key: str, forget: bool = False) -> Any:
        assert self._store is not None
        head, _, data = self._store.get(key).partition(b" ")
        for n in range(1, int(head)):
            data += self._store.get(f"{key}/{n}")
        if forget:
            self._forget(key)
        return json.loads(data)

    def _forget(self, key: str) -> None:
        assert self._store is not None
        self._store.delete(key)  # and the pieces below it


ALONE = Group()


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
        # It would swallow SIGTERM, so that nothing short of SIGKILL stops a merge.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=timeout,
                # The second line: Watch is quicker (JAX notices after 10 to 20 s, by
                # aborting) and says more.
                heartbeat_timeout_seconds=20,
            )
        except (ValueError, RuntimeError) as e:
            raise ValueError(
                "the processes did not find each other: pass --coordinator=HOST:PORT"
                " (of process 0, reachable from all, a free port), --num_processes and"
                " --process_id to each; --distributed finds them by itself on TPU pods"
                f" and under Slurm or Open MPI only ({str(e).splitlines()[0]})"
            ) from None
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
