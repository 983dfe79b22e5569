import subprocess
import sys
import typing

import pytest

from experiments import moe_plan
from multitask_jax import moe

SMALL = {"tokens": 16, "width": 8, "hidden": 12, "experts": 4, "kind": "mlp"}


def test_bytes_and_flops_of_a_device(tmp_path):
    config = moe_plan.Config(
        mesh="data=2,expert=4", dtype="float32", output_dir=str(tmp_path), **SMALL
    )
    plan = moe_plan.run(config)
    # One expert (no biases) and the gate; 16 tokens.
    assert plan.parameters == 4 * (2 * 8 * 12 + 8 * 4)
    assert plan.inputs == 4 * 16 * 8
    # Gradients, and a table of where they lie.
    assert 0 <= plan.outputs - plan.parameters - plan.inputs <= 64
    assert plan.useful == 6 * 16 * 2 * (2 * 8 * 12)
    assert plan.flops > plan.useful  # rooms are larger than what comes
    # Tokens go and come back, forward and backward; each time [E, C, D] floats.
    room = 10  # ceil(1.25 * 16 * 2 / 4)
    assert plan.exchanged["all-to-all"] == (4, 4 * 4 * 4 * room * 8)
    assert "all-gather" not in plan.exchanged
    # Gradients of what devices of one expert share, and of the gate, are summed.
    size = plan.exchanged["all-reduce"][1]
    assert 0 <= size - plan.parameters <= 64
    assert plan.asked == plan.exchanged["all-to-all"][1]


def test_bytes_in_bfloat16_are_told_although_a_cpu_widens_them():
    config = moe_plan.Config(**SMALL | {"kind": "gelu", "mesh": "data=2,expert=4"})
    assert moe_plan.make(config).asked == 4 * 2 * 4 * 10 * 8


def test_every_kind_of_expert_can_be_planned():
    kinds = typing.get_type_hints(moe_plan.Config)["kind"]
    assert set(typing.get_args(kinds)) == set(moe.EXPERTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "data=8"}, "expected an axis called expert"),
        ({"mesh": "expert=8"}, "4 experts, expected a multiple of 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        moe_plan.make(moe_plan.Config(**SMALL | options))


def test_a_mesh_of_256_compiles_where_there_is_one_device(tmp_path):
    command = [sys.executable, "-m", "experiments.moe_plan", f"--output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of one device of 256" in done.stdout
