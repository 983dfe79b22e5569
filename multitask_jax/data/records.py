"""What builders of tensorflow-datasets share: how records are kept and read."""

from typing import Any

FORMAT = "array_record"  # random access, without TensorFlow


def plain(x: Any) -> Any:
    """A value of a record: text, which is read as bytes, is text again."""
    return x.decode("utf-8") if isinstance(x, bytes) else x
