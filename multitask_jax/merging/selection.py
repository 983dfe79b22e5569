"""The exact k-th largest magnitude of a stream, in one pass and bounded memory.

A sample brackets the answer; the pass counts what lies above the bracket and keeps what
lies inside. The count says whether the bracket held the answer: if not, another pass
with a wider one does. The sample decides the cost, never the result.

Magnitudes are compared as uint32 keys, a float32's bits without the sign.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from multitask_jax.merging.processes import ALONE, Group

LARGEST = 0x7FFFFFFF
INFINITE = 0x7F800000  # keys from here on are infinities and NaNs
_SMALLEST_NORMAL = 0x00800000
_LIMIT = 1 << 22  # keys that are kept before the bracket is narrowed (16 MiB)
_BIN_BITS = 11  # after a miss: 31 bits in three rounds of bins


def keys_of(values: np.ndarray, *, overwrite: bool = False) -> np.ndarray:
    """uint32 keys that order like |values| in float32; `overwrite` saves a copy."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.bitwise_and(bits, np.uint32(LARGEST), out=bits if overwrite else None)


def row_ranks(values: np.ndarray) -> np.ndarray:
    """Place of each |value| in its row, 0 for the smallest; of equals, the first.

    Subnormals count as 0.

    Args:
      values: (rows, n) float32.

    Returns:
      (rows, n) uint16 or, for n > 2**16, uint32.
    """
    rows, n = values.shape
    keys = keys_of(values)
    np.multiply(keys, keys >= _SMALLEST_NORMAL, out=keys)
    places = _order_in_32_bits(keys) if 1 << 8 <= n <= 1 << 12 else _order(keys)
    out = np.empty(rows * n, np.uint16 if n <= 1 << 16 else np.uint32)
    out[places.reshape(-1)] = np.tile(np.arange(n, dtype=out.dtype), rows)
    return out.reshape(rows, n)


def _order(keys: np.ndarray) -> np.ndarray:
    """Flat places of keys, each row from its smallest on; of equals, the first leads.

    NumPy sorts integers several times as fast as indices (or XLA on a CPU), so they
    hold key and column.
    """
    rows, n = keys.shape
    packed = keys.astype(np.uint64)
    packed <<= np.uint64(32)
    packed |= np.arange(n, dtype=np.uint64)
    packed.sort(axis=-1)
    packed &= np.uint64(0xFFFFFFFF)  # the columns
    places = packed.view(np.int64)
    places += np.arange(rows)[:, None] * n
    return places


def _order_in_32_bits(keys: np.ndarray) -> np.ndarray:
    """`_order` by integers of half the size, which takes half the time.

    They lack the last bits of keys: those are 0 in most task vectors of 16-bit models.
    Rows that this leaves in the wrong order are sorted again.
    """
    rows, n = keys.shape
    bits = (n - 1).bit_length()
    lacking = bits - 1  # of 31
    packed = keys & np.uint32((1 << lacking) - 1)
    if 16 * np.count_nonzero(packed) > keys.size:  # float32 models: most rows
        return _order(keys)
    np.right_shift(keys, np.uint32(lacking), out=packed)
    packed <<= np.uint32(bits)
    packed |= np.arange(n, dtype=np.uint32)
    packed.sort(axis=-1)
    packed &= np.uint32((1 << bits) - 1)
    places = packed + np.arange(rows)[:, None] * n
    ordered = np.take(keys, places)
    wrong = np.flatnonzero((ordered[:, 1:] < ordered[:, :-1]).any(axis=1))
    places[wrong] = _order(keys[wrong]) + (wrong - np.arange(len(wrong)))[:, None] * n
    return places


def magnitude(key: int) -> np.float32:
    """The float32 of a key; subnormals count as 0, as XLA computes on a CPU."""
    key = 0 if key < _SMALLEST_NORMAL else key
    return np.uint32(key).view(np.float32)


class Bracket(NamedTuple):
    """Keys low..high, both included, that should hold the answer, near `centre`."""

    low: int = 0
    high: int = LARGEST
    centre: int = 0


def bracket(keys: np.ndarray, share: float, *, margin: float = 6.0) -> Bracket:
    """Where the key that `share` of all entries reach lies, judged by a sample.

    Args:
      keys: (slices, length) keys of a systematic sample. Entries of a slice are alike,
        so the error of the share is taken from the spread between slices.
      share: k / size.
      margin: half width of the bracket in standard errors.
    """
    flat = np.sort(keys, axis=None)

    def at(share: float) -> int:
        place = int((1 - share) * len(flat))
        return int(flat[min(max(place, 0), len(flat) - 1)])

    centre = at(share)
    shares = np.mean(keys >= centre, axis=1)
    error = margin * (np.std(shares) / np.sqrt(len(shares)) + 1 / len(flat))
    low = 0 if share + error >= 1 else at(share + error)
    high = LARGEST if share <= error else at(share - error)
    return Bracket(low, high, centre)


class Selection:
    """Finds the k-th largest of the keys it is given; `add` is thread-safe."""

    def __init__(self, k: int, start: Bracket | None = None):
        if k < 1:
            raise ValueError(f"got k = {k}, expected at least 1")
        self.k = k
        self._limit = _LIMIT if start else None
        self._lock = threading.Lock()
        self._begin(start or Bracket(), bins=False)

    def _begin(self, bracket: Bracket, *, bins: bool) -> None:
        """Starts a pass that keeps the keys in the bracket, or counts them in bins."""
        self.bracket = bracket
        self._above = 0
        self._count = 0
        self._inside: list[np.ndarray] = []
        self._shift = max(0, (bracket.high - bracket.low).bit_length() - _BIN_BITS)
        self._bins = np.zeros(1 << _BIN_BITS, np.int64) if bins else None

    def add(self, keys: np.ndarray) -> None:
        """Counts the keys above the bracket, keeps (or counts) those inside."""
        seen = self.bracket
        if (seen.low, seen.high) == (0, LARGEST):
            above, inside = 0, keys
        else:
            higher = keys > np.uint32(seen.high)
            above = int(np.count_nonzero(higher))
            higher ^= keys >= np.uint32(seen.low)  # now: inside
            inside = keys[np.flatnonzero(higher)]
        if self._bins is not None:
            bins = (inside - np.uint32(seen.low)) >> np.uint32(self._shift)
            counted = np.bincount(bins, minlength=len(self._bins))
            with self._lock:
                self._above += above
                self._bins += counted
            return
        with self._lock:
            if seen != self.bracket:  # narrowed by another thread meanwhile
                above += int(np.count_nonzero(inside > np.uint32(self.bracket.high)))
                inside = _within(inside, self.bracket)
            self._above += above
            self._count += len(inside)
            if self.bracket.low < self.bracket.high:
                self._inside.append(inside)
                if self._limit is not None and self._count > self._limit:
                    self._narrow(self._limit // 2)

    def _narrow(self, size: int) -> None:
        """Keeps about `size` of the keys, those nearest to the expected answer."""
        kept = np.concatenate(self._inside)
        middle = int(np.count_nonzero(kept < np.uint32(self.bracket.centre)))
        first = max(0, min(middle - size // 2, len(kept) - size))
        last = min(len(kept) - 1, first + size)
        kept.partition((first, last))
        low, high = int(kept[first]), int(kept[last])
        # A crowd of equal keys at an end (zeros, mostly) is counted, or is all we keep.
        centre = self.bracket.centre
        if low < high and np.count_nonzero(kept == np.uint32(low)) > size // 2:
            low, high = (low, low) if centre <= low else (low + 1, high)
        if low < high and np.count_nonzero(kept == np.uint32(high)) > size // 2:
            low, high = (high, high) if centre >= high else (low, high - 1)
        narrower = self.bracket._replace(low=low, high=high)
        self._above += int(np.count_nonzero(kept > np.uint32(high)))
        kept = _within(kept, narrower)
        self.bracket, self._count = narrower, len(kept)
        self._inside = [kept] if low < high else []

    def result(self, group: Group = ALONE) -> int | None:
        """The key, or None if the bracket missed it: then go over the stream again.

        With a group: the k-th largest of the keys that all its processes were given.
        """
        if self._bins is not None:
            self._above, *bins = group.add([self._above, *self._bins])
            return self._from_bins(np.array(bins, np.int64))
        if group.count > 1 and not self._agree(group):
            return None
        above, count = group.add([self._above, self._count])
        rank = self.k - above  # among those inside, from the largest
        if 1 <= rank <= count:
            if self.bracket.low == self.bracket.high:
                return self.bracket.low
            kept = np.concatenate([np.empty(0, np.uint32), *self._inside])
            if group.count > 1:
                return _kth_of_all(kept, self.bracket, rank, group)
            return int(np.partition(kept, count - rank)[count - rank])
        if rank < 1:
            missed = Bracket(self.bracket.high + 1, LARGEST)
        else:
            missed = Bracket(0, self.bracket.low - 1)
        if missed.low > missed.high:
            raise ValueError(f"got k = {self.k}, but fewer entries")
        self._begin(missed, bins=True)
        return None

    def _agree(self, group: Group) -> bool:
        """Narrows to the bracket that all processes share, if there is one."""
        ends = group.combine([self.bracket.low, self.bracket.high], list)
        shared = self.bracket._replace(
            low=max(low for low, _ in ends), high=min(high for _, high in ends)
        )
        if shared.low > shared.high:
            self._begin(Bracket(), bins=True)
            return False
        if shared != self.bracket:
            kept = np.concatenate([np.empty(0, np.uint32), *self._inside])
            self._above += int(np.count_nonzero(kept > np.uint32(shared.high)))
            kept = _within(kept, shared)
            self.bracket, self._count, self._inside = shared, len(kept), [kept]
        return True

    def _from_bins(self, bins: np.ndarray) -> int | None:
        """Chooses the bin that holds the answer; at most two more passes follow."""
        below = np.cumsum(bins[::-1])  # keys in this bin or a higher one
        place = int(np.searchsorted(below, self.k - self._above))
        chosen = len(bins) - 1 - place
        low = self.bracket.low + (chosen << self._shift)
        if self._shift == 0:
            return low
        high = min(self.bracket.high, low + (1 << self._shift) - 1)
        self._begin(Bracket(low, high), bins=bool(bins[chosen] > _LIMIT // 2))
        return None


def _within(keys: np.ndarray, b: Bracket) -> np.ndarray:
    # One unsigned comparison for low <= key <= high.
    return keys[np.flatnonzero(keys - np.uint32(b.low) <= np.uint32(b.high - b.low))]


def _kth_of_all(keys: np.ndarray, b: Bracket, rank: int, group: Group) -> int:
    """The rank-th largest of all processes' keys, which lie in the bracket.

    At most three rounds of bins: messages are small, however many keys there are.
    """
    low, high = b.low, b.high
    while low < high:
        shift = max(0, (high - low).bit_length() - _BIN_BITS)
        bins = (keys - np.uint32(low)) >> np.uint32(shift)
        counts = group.add(np.bincount(bins, minlength=1 << _BIN_BITS).tolist())
        chosen = len(counts) - 1
        while counts[chosen] < rank:
            rank -= counts[chosen]
            chosen -= 1
        low += chosen << shift
        high = min(high, low + (1 << shift) - 1)
        keys = _within(keys, Bracket(low, high))
    return low


def kth_largest(values: Sequence[np.ndarray], k: int) -> np.float32:
    """The k-th largest magnitude of arrays that are in memory."""
    selection = Selection(k)
    for x in values:
        selection.add(keys_of(x.reshape(-1)))
    key = selection.result()
    assert key is not None  # the bracket is everything
    return magnitude(key)
