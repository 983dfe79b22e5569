"""Several processes that do one merge together: who they are, and what they exchange.

Every process runs the same program on the same flags and does its share of the tensors.
What they must know of each other (counts, sums, notes) goes through a key-value store;
process 0 is the hub. A process on its own is `ALONE`, to which every exchange is
trivial; `distributed.join` makes groups of several.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from multitask_jax.merging.liveness import Watch

_PIECE = 1 << 20  # bytes of a message at most; longer values go in pieces


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
