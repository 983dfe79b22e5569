"""What the tests of the uplift study share."""

from typing import Any

import sklearn.ensemble  # noqa: F401, loads OpenMP, whose threads are to be limited
from threadpoolctl import threadpool_limits


def one_thread() -> Any:
    """Around boosting: its threads wait for each other, for minutes on a busy machine.

    With the few people of tests a second thread gains nothing.
    """
    return threadpool_limits(1, "openmp")
