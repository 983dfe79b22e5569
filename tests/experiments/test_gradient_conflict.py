import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gradient_conflict as conflict
from experiments import gradient_conflict_report


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("conflict")
    config = conflict.Config(
        workdir=str(workdir), angles="0,180", seeds=2, steps=200, batch_size=32
    )
    return conflict.run(config), workdir


def test_experts_of_their_own_share_no_gradient(result):
    np.testing.assert_array_equal(result[0].cosine["expert a task"], 0)


def test_opposite_tasks_agree_less_at_a_shared_trunk(result):
    same, opposite = result[0].cosine["shared bottom"].mean(axis=1)
    assert same > 0.5
    assert opposite < same - 0.3


def test_everything_is_written(result):
    found, workdir = result
    for name in ("config.json", "metrics.jsonl", "gradient_conflict.png"):
        assert (workdir / name).stat().st_size
    assert (workdir / "report.md").read_text() == found.report
    for name in conflict.VARIANTS:
        assert f"| {name} |" in found.report
        assert np.isfinite(found.loss[name]).all()


def test_use_of_experts_is_told(result):
    told = result[0].experts["specialisation"]
    np.testing.assert_allclose(told["expert a task"], 1, rtol=1e-5)
    np.testing.assert_allclose(told["shared bottom"], 0, atol=1e-5)
    for name in ("MMoE", "top-1 + shared"):
        assert (told[name] > -1e-6).all()
        assert (told[name] <= 1).all()
        assert (result[0].experts["entropy"][name] > 0).all()
        assert (result[0].experts["busiest"][name] > 1).all()
    assert "## Specialisation of routed experts" in result[0].report


def test_gates_can_choose_by_the_task_alone():
    """A gate without a bias can't: half of x at most has the same favourite."""
    variant = conflict.VARIANTS["MMoE"]
    gate = {
        "kernel": jnp.zeros((conflict.TASKS, 3, variant.experts)),
        "bias": 50 * jnp.eye(conflict.TASKS, variant.experts),
    }
    made = conflict.init(jax.random.key(0), variant, conflict.Config(inputs=3))
    assert jax.tree.map(jnp.shape, made["gate"]) == jax.tree.map(jnp.shape, gate)
    x = jax.random.normal(jax.random.key(1), (64, 3))
    told = conflict.use_of_experts({"gate": gate}, x, variant)
    assert told["specialisation"] == pytest.approx(1, abs=1e-5)
    assert told["entropy"] == pytest.approx(0, abs=1e-5)
    assert told["busiest"] == pytest.approx(2, abs=1e-5)  # two of four serve all


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    """Killed in the second structure; then with a seed more, and other settings."""
    done = []

    def train(variant, config, runs, advance):
        if len(done) == kill_at:
            raise KeyboardInterrupt
        done.append(runs)
        quantities = ("cosine", "dormant", "loss", *conflict.EXPERTS)
        return [
            dict.fromkeys(quantities, [a + s] * conflict.STRETCHES) for a, s in runs
        ]

    monkeypatch.setattr(conflict, "train", train)
    config = conflict.Config(workdir=str(tmp_path), angles="0,180", seeds=1)
    kill_at = 1
    with pytest.raises(KeyboardInterrupt):
        conflict.run(config)
    kill_at = None
    conflict.run(config)
    count = len(conflict.VARIANTS)
    assert done == [[(0, 0), (180, 0)]] * count
    result = conflict.run(dataclasses.replace(config, seeds=2))
    assert done[count:] == [[(0, 1), (180, 1)]] * count
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 * count
    for by_variant in result[:3]:
        for x in by_variant.values():
            np.testing.assert_array_equal(x, [[0, 1], [180, 181]])
    with pytest.raises(ValueError, match=r"another run .*'hidden': \(16, 8\)"):
        conflict.run(dataclasses.replace(config, hidden=8))
    file = tmp_path / "config.json"  # as of gates without biases
    about = json.loads(file.read_text())
    del about["gates"]
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"'gates': \(None, 'with biases'\)"):
        conflict.run(config)


def test_a_folder_with_other_lines_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(ValueError, match=r"got a line of \['step', 'loss'\], expected"):
        conflict.run(conflict.Config(workdir=str(tmp_path)))


def test_active_parameters_are_equal_but_for_biases():
    config = conflict.Config()
    counts = {n: conflict.active(v, config) for n, v in conflict.VARIANTS.items()}
    kernels = config.hidden * (config.inputs + 2 + config.features)
    assert counts["shared bottom"] == kernels + config.hidden + config.features
    for count in counts.values():
        assert 0 <= count - kernels <= config.hidden + 4 * config.features


def test_the_angle_is_between_the_tasks():
    for degrees in (0.0, 60.0, 180.0):
        angle = jnp.deg2rad(degrees)
        world = conflict.make_world(jax.random.key(0), angle, 7)
        a, b = world.directions
        assert np.dot(a, b) == pytest.approx(np.cos(angle), abs=1e-5)


def test_dormant_units_are_counted():
    """Of one expert's units one never fires; the unused expert's are all dormant."""
    variant = conflict.Variant(2, 1.0, {"k": 1})
    up = {
        "kernel": jnp.zeros((2, 3, 2)).at[:, 0].set(jnp.array([[1.0, 0], [1, 1]])),
        "bias": jnp.array([[5.0, -1.0], [5.0, 5.0]]),
    }
    gate = jnp.zeros((2, 1, 2)).at[:, 0, 0].set(1.0)
    params = {"trunk": {"up": up}, "gate": {"kernel": gate}}
    x = jnp.array([[1.0], [2.0]])  # the gate prefers the first expert
    assert conflict.dormant(params, x, variant) == pytest.approx(3 / 4)


def test_wrong_flags_are_named(tmp_path):
    for options, multiple in (({"hidden": 6}, 4), ({"steps": 39}, 20)):
        with pytest.raises(ValueError, match=f"expected a multiple of {multiple}"):
            conflict.run(conflict.Config(workdir=str(tmp_path), **options))


def test_numbers_out_of_range_are_named(tmp_path):
    for name, value in (
        ("batch_size", 0), ("inputs", 1), ("features", 0), ("rate", 0.0),
    ):  # fmt: skip
        config = conflict.Config(workdir=str(tmp_path / "run"), **{name: value})
        with pytest.raises(ValueError, match=f"--{name}: got {value}, expected"):
            conflict.run(config)
    assert not (tmp_path / "run").exists()


def test_diverged_training_is_told_and_not_stored(tmp_path):
    config = conflict.Config(
        workdir=str(tmp_path), angles="90", seeds=1, steps=40, batch_size=8, rate=1e30
    )
    with pytest.raises(FloatingPointError, match=r"shared bottom, 90 .* lower --rate"):
        conflict.run(config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_paired_differences_have_students_interval():
    # Mean 2, standard deviation 1, three of them: 2 +- 4.303 / sqrt(3).
    assert (
        gradient_conflict_report.paired(np.array([1.0, 2.0, 3.0]))
        == "+2.0 [-0.5, +4.5]"
    )
