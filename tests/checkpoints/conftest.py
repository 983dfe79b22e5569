"""Checkpoints that several files of tests read."""

import pytest

from tests.checkpoints.orbax_common import SAVERS


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> dict:
    """A checkpoint by each of Orbax's ways to save."""
    home = tmp_path_factory.mktemp("saved")
    for save in SAVERS:
        save(home / save.__name__)
    return {save.__name__: home / save.__name__ for save in SAVERS}
