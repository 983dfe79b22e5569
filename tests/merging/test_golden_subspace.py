"""Parity of subspace methods and EMR with their references (see the data's README)."""

import pytest

from multitask_jax import merging
from tests.merging.test_golden import cases, check


@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
def test_singular_vectors(shared, name):
    for case, f in cases(shared, name).items():
        method = merging.METHODS[name](scale=f["params"]["lambda"])
        check(name, case, method, f)


def test_iso_cts(shared):
    for case, f in cases(shared, "iso_cts").items():
        p = f["params"]
        method = merging.iso_cts(
            common_fraction=p["common_space_fraction"], scale=p["lambda"]
        )
        check("iso_cts", case, method, f)


def test_knots(shared):
    for case, f in cases(shared, "knots").items():
        p = f["params"]
        ties = merging.knots(density=p["ties_density"], eps=p["eps"])
        check("knots", case, ties, f)
        mean = merging.knots(combine_by="mean", eps=p["eps"])
        want = f["base"] + f["expected_delta_mean"]
        check("knots", case, mean, f | {"expected": want})


def test_wudi(shared):
    for case, f in cases(shared, "wudi").items():
        p = f["params"]
        method = merging.wudi(
            iterations=p["iterations"], learning_rate=p["learning_rate"]
        )
        check("wudi", case, method, f)
