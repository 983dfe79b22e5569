"""Rules from leaf paths to PartitionSpecs, in code and in words."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from multitask_jax import sharding

MESH = sharding.make_mesh({"data": 2, "model": 4})


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 24), P(None, ("data", "model"))),  # the largest axis that 8 divides
        ((16, 25), P(("data", "model"), None)),
        ((4, 6), P("model", None)),  # 4 of the 8
        ((12, 20), P(None, "model")),
        ((2, 3), P()),
        ((), P()),
        ((0, 8), P(None, ("data", "model"))),
    ],
)
def test_default(shape, spec):
    assert sharding.leaf_spec("x", shape, MESH) == spec


def test_trees_follow_rules_and_the_first_match_counts():
    tree = {"mlp": {"kernel": np.zeros((8, 6)), "bias": np.zeros(6)}}
    rules = sharding.parse_rules("bias=; mlp = data+model, None")
    shardings = sharding.tree_shardings(tree, MESH, rules)
    assert shardings["mlp"]["kernel"].spec == P(("data", "model"), None)
    assert shardings["mlp"]["bias"].spec == P()
    assert (
        sharding.shard_tree(tree, MESH, rules)["mlp"]["kernel"].sharding
        == (shardings["mlp"]["kernel"])
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("bias=", "kernel: no sharding rule matches"),
        ("kernel=model", r"kernel: axis of 6 in shape \(6, 8\) can't be cut in 4"),
        ("kernel=None,None,model", "kernel: got P.* for the shape"),
        ("kernel=None,expert", "kernel: .* names the axis expert, .* has data, model"),
        ("kernel=data,data", "kernel: .* names an axis of the mesh twice"),
    ],
)
def test_rules_that_do_not_fit_name_the_leaf(rules, message):
    with pytest.raises(ValueError, match=message):
        sharding.leaf_spec("kernel", (6, 8), MESH, sharding.parse_rules(rules))


def test_words():
    assert sharding.parse_axes("data=2, model=4") == {"data": 2, "model": 4}
    assert sharding.parse_rules("a=b=model,None,x+y;.*norm=;") == [
        ("a=b", P("model", None, ("x", "y"))),
        (".*norm", P()),
    ]
    for bad in ("", "model", "model=0", "model=-1", "model=8,", "=8", "a=2,a=2"):
        with pytest.raises(ValueError, match="mesh: got"):
            sharding.parse_axes(bad)
    for bad in ("embed", "=model", "embed=model+", "embed=model,8", "(=model"):
        with pytest.raises(ValueError, match=r"sharding rules: .*(got|no regex)"):
            sharding.parse_rules(bad)
