"""What tests of several experiments are given."""

import pytest

from tests.experiments.upcycle_common import llama


@pytest.fixture
def three(tmp_path):
    """Tensors of three Llamas, which are in tmp_path's a, b and c."""
    return {n: llama(tmp_path / n, s) for s, n in enumerate("abc")}
