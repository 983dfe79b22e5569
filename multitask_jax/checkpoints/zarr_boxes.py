"""Flat ranges of an array as boxes to read, and as places in zarr chunks to write."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

# A zarr chunk is what is read, decoded and, when written, one file.
CHUNK_BYTES = 8 << 20


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[slice, ...]]:
    """Cuts flat entries [start, stop) of an array into boxes, in C order.

    There are at most 2 * rank - 1 of them: part of a row, whole rows, part of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # rows [first, last) are whole
    if first > last:
        for box in boxes(shape[1:], start - last * row, stop - last * row):
            yield (slice(last, first), *box)
        return
    for box in boxes(shape[1:], start - (first - 1) * row, row * (start % row > 0)):
        yield (slice(first - 1, first), *box)
    if first < last:
        yield (slice(first, last), *(slice(0, n) for n in shape[1:]))
    for box in boxes(shape[1:], 0, stop - last * row):
        yield (slice(last, last + 1), *box)


def decoded_bytes(shape: Sequence[int], chunk: Sequence[int], itemsize: int) -> int:
    """Bytes of the chunks that a short flat range of an array may touch."""
    chunk = [*map(min, chunk, shape)]
    axis = next((i for i, n in enumerate(chunk) if n > 1), 0)
    return math.prod([*chunk[axis : axis + 1], *shape[axis + 1 :]]) * itemsize


def chunk_shape(shape: Sequence[int], itemsize: int, limit: int) -> tuple[int, ...]:
    """Zarr chunks of at most `limit` bytes that are flat ranges of the array.

    (1, ..., 1, some rows, all, ..., all); rows are spread evenly, for a chunk at the
    edge takes as much room as the others.
    """
    chunk, room = [1] * len(shape), max(1, limit // itemsize)
    for axis in reversed(range(len(shape))):
        n = max(1, shape[axis])
        if n > room:
            chunk[axis] = -(-n // -(-n // room))
            break
        chunk[axis], room = n, room // n
    return tuple(chunk)


def spans(
    shape: Sequence[int], chunk: Sequence[int], start: int, stop: int
) -> Iterator[tuple[str, int, int, int]]:
    """The chunks of `chunk_shape` that hold flat entries [start, stop).

    Yields:
      (file name, entries before, from, to): entries [from, to) lie in that file after
      `entries before` others.
    """
    axis = next((i for i, n in enumerate(chunk) if n > 1), len(chunk) - 1)
    outer = shape[: max(axis, 0)]
    inner = math.prod(shape[axis + 1 :]) if shape else 1
    plane = shape[axis] * inner if shape else 1
    block = math.prod(chunk)
    while start < stop:
        above, rest = divmod(start, plane)
        k, before = divmod(rest, block)
        end = min(stop, above * plane + min((k + 1) * block, plane))
        index = (*np.unravel_index(above, outer), k, *[0] * (len(shape) - axis - 1))
        yield ".".join(map(str, index)), before, start, end
        start = end
