import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from multitask_jax import checkpoints
from multitask_jax.sharding import make_mesh
from multitask_jax.training import Step, fit, init_state, loop, make_step, writers
from tests.training.common import (
    batch_at,
    evaluate,
    loss_fn,
    noisy_loss,
    params,
    same_bits,
)

STEPS = 12
OPTIMIZER = optax.adam(1e-2)
STEP = make_step(noisy_loss, OPTIMIZER)


class Killed(BaseException):
    pass


def start(seed=0, impl="unsafe_rbg", **freezing):
    # JAX's default generator takes a second longer to compile, in each step.
    key = jax.random.key(seed, impl=impl)
    return init_state(params(), OPTIMIZER, key, **freezing)


def run(workdir, *, batches=batch_at, step=STEP, state=None, **changed):
    options = {
        "steps": STEPS,
        "config": {"rate": 3e-2, "sizes": (1, 2)},
        "eval_fn": evaluate,
        "eval_every": 2,
        "checkpoint_every": 5,
        "log_every": 3,
        "progress": False,
    }
    if workdir is not None:
        options["writer"] = writers.jsonl(workdir / "metrics.jsonl")
    state = start() if state is None else state
    return fit(step, state, batches, workdir=workdir, **options | changed)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), written(folder)


def written(folder):
    """The records, but for what is of time."""
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row.pop("waiting") <= 1 for row in rows)
    return rows


def killing(at):
    def batches(step):
        if step == at:
            raise Killed
        return batch_at(step)

    return batches


# Before the first checkpoint, at one, between, and at the last step.
@pytest.mark.parametrize("points", [(3,), (5,), (9, 11), (6, 7, 10)])
def test_killed_and_resumed_is_the_same_bit_for_bit(points, whole_run, tmp_path):
    expected, metrics = whole_run
    assert expected.best.step < 5  # of the first checkpoint, and kept in later ones
    for at in points:
        with pytest.raises(Killed):
            run(tmp_path, batches=killing(at))
    # Another process would have compiled anew.
    result = run(tmp_path, step=make_step(noisy_loss, OPTIMIZER))
    assert same_bits(result.state, expected.state)
    assert same_bits(result.best.params, expected.best.params)
    assert result.best[1:] == expected.best[1:]
    assert result.history == expected.history
    assert written(tmp_path) == metrics


@pytest.mark.parametrize("moment", ["evaluation", "write", "save", "prune"])
def test_killed_amid_an_evaluation_or_a_save(moment, whole_run, tmp_path, monkeypatch):
    changed = {}
    count = iter(range(100))

    def third(*args, **kwargs):
        if next(count) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        if moment == "evaluation":
            changed["eval_fn"] = lambda p: third() or evaluate(p)
        elif moment == "write":
            writer = writers.jsonl(tmp_path / "metrics.jsonl")
            both = writers.combine(writer, writers.Writer(third))
            changed["writer"] = both
        elif moment == "save":
            from orbax.checkpoint import v1 as ocp

            def torn(path, *args, **kwargs):
                half = path.with_name(f"{path.name}.orbax-checkpoint-tmp-1")
                (half / "state").mkdir(parents=True)
                raise Killed

            patch.setattr(ocp, "save", torn)
        else:
            patch.setattr("shutil.rmtree", third)
            third(), third()
            changed["checkpoint_every"] = 3
        with pytest.raises(Killed):
            run(tmp_path, **changed)
    result = run(tmp_path)
    assert same_bits(result.state, whole_run[0].state)
    assert same_bits(result.best, whole_run[0].best)
    if moment != "prune":  # which saved at other steps, where records end, too
        assert result.history == whole_run[0].history
        assert written(tmp_path) == whole_run[1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_what_others_put_beside_checkpoints_stays(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "notes").mkdir(parents=True)
    (folder / ".DS_Store").write_text("x")
    run(tmp_path)
    assert len(list(folder.iterdir())) == 4
    assert (folder / ".DS_Store").read_text() == "x"


def test_nothing_is_trained_again_once_done(whole_run, tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, batches=killing(at=0))
    assert same_bits(again.state, first.state)
    assert same_bits(again.best.params, first.best.params)
    assert again.history == first.history == whole_run[0].history
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "12"]
    longer = run(tmp_path, steps=14)
    assert int(longer.state.step) == 14
    with pytest.raises(ValueError, match="has done 14 steps already, steps is 12"):
        run(tmp_path)


def test_the_best_is_the_highest_on_validation():
    values = iter([0.1, 0.7, float("nan"), 0.7, 0.2])
    seen = []

    def eval_fn(p):
        seen.append(jax.tree.map(np.array, p))
        return {"score": next(values), "other": 0}

    result = run(None, steps=5, eval_fn=eval_fn, eval_every=1, best_by="score")
    assert result.best.step == 2  # the first of equals
    assert result.best.value == 0.7
    assert same_bits(result.best.params, seen[1])
    assert [r["eval/score"] for r in result.history][:2] == [0.1, 0.7]
    with pytest.raises(
        ValueError, match=r"best_by: got None, expected one of.*score, o"
    ):
        run(None, eval_fn=lambda p: {"score": 0, "other": 1})


def test_records_are_means_since_the_one_before():
    state = start()
    losses = []
    for s in range(7):
        state, metrics = STEP(state, batch_at(s))
        losses.append(float(metrics["loss"]))
    result = run(None, steps=7, eval_fn=None, log_every=3)
    assert [r["step"] for r in result.history] == [3, 6, 7]
    for record, part in zip(
        result.history, (losses[:3], losses[3:6], losses[6:]), strict=True
    ):
        assert record["loss"] == pytest.approx(np.mean(part), rel=1e-6)
    assert result.best is None
    assert losses[-1] < losses[0]


def test_a_batch_that_says_nothing_of_a_metric_does_not_count():
    def loss(params, batch, key):
        even = batch % 2 == 0
        told = {"even": jnp.where(even, batch, jnp.nan), "never": jnp.nan}
        return jnp.sum(params**2), told

    state = init_state(jnp.ones(()), OPTIMIZER, jax.random.key(0))
    step = make_step(loss, OPTIMIZER)
    found = fit(step, state, jnp.float32, steps=5, log_every=5, progress=False)
    assert found.history[0]["even"] == 2  # of 0, 2 and 4
    assert set(found.history[0]) == {"step", "loss", "gradient_norm", "even"}


def test_metrics_leave_the_device_only_where_they_are_recorded(monkeypatch):
    made, fetched = [], []

    def device_get(rows):
        fetched.append((len(made), len(rows)))
        return [{"loss": 1.0}] * len(rows)

    def run_step(state, frozen, batch):
        made.append(object())  # a metric that nothing but device_get can read
        return state, {"loss": made[-1]}

    monkeypatch.setattr(jax, "device_get", device_get)
    step = Step(run_step)
    fit(step, start(), batch_at, steps=7, log_every=3, progress=False)
    assert fetched == [(3, 3), (6, 3), (7, 1)]


def test_waiting_is_the_share_of_batches_in_the_time_of_steps(monkeypatch):
    """By a clock that goes on as batches are made (3), steps (1) and evaluations.

    The first step takes longer, for it is compiled: it does not count.
    """
    now, rows, took = [0.0], [], iter([50, 1, 1, 1, 1])

    def after(seconds, made):
        def tick(*args):
            now[0] += seconds(*args) if callable(seconds) else seconds
            return made(*args)

        return tick

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    result = run(
        None,
        batches=after(lambda step: 3 if step < 3 else 7, batch_at),
        step=STEP._replace(run=after(lambda *_: next(took), STEP.run)),
        eval_fn=after(100, evaluate),
        writer=writers.Writer(lambda step, row: rows.append(row)),
        steps=5,
        eval_every=3,
    )
    assert [row["waiting"] for row in rows] == [3 / 4, 7 / 8]
    assert result.waiting == (2 * 3 + 2 * 7) / (2 * 4 + 2 * 8)
    assert not any("waiting" in row for row in result.history)


def test_frozen_leaves_are_not_saved_but_checked(tmp_path):
    freezing = {"include": "head"}
    expected = run(None, state=start(**freezing))
    with pytest.raises(Killed):
        run(tmp_path, state=start(**freezing), batches=killing(8))
    saved = checkpoints.open(tmp_path / "checkpoints" / "5").tensors
    assert "state/params/head/kernel" in saved
    assert not [name for name in saved if "layers_0" in name]
    other = start(**freezing)
    kernel = np.array(other.frozen["layers_0"]["kernel"])
    kernel[0, 0] += 1e-3
    other.frozen["layers_0"]["kernel"] = kernel
    with pytest.raises(ValueError, match=r"frozen's CRC-32: .* there, .* here"):
        run(tmp_path, state=other)
    result = run(tmp_path, state=start(**freezing))
    assert same_bits(result.state, expected.state)
    assert same_bits(result.best.params, expected.best.params)
    assert jax.tree.structure(result.best.params) == jax.tree.structure(params())


def test_a_run_on_a_mesh_resumes_bit_for_bit_and_elsewhere_to_rounding(tmp_path):
    step = make_step(loss_fn, OPTIMIZER, mesh=make_mesh({"data": 8}))

    def resume(folder, step=step, batches=batch_at):
        return run(folder, step=step, state=start(impl=None), batches=batches)

    expected = resume(None)
    with pytest.raises(Killed):
        resume(tmp_path, batches=killing(8))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere" / "checkpoints")
    with pytest.raises(Killed):
        resume(tmp_path, batches=killing(8))
    result = resume(tmp_path)
    assert same_bits(result.state, expected.state)
    assert len(result.state.params["head"]["kernel"].sharding.device_set) == 8
    one = resume(tmp_path / "elsewhere", step=make_step(loss_fn, OPTIMIZER))
    assert len(one.state.params["head"]["kernel"].sharding.device_set) == 1
    for a, b in zip(
        jax.tree.leaves(one.state.params),
        jax.tree.leaves(expected.state.params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_another_runs_checkpoint_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"config/rate: 0.03 there, 0.1 here.*workdir"):
        run(tmp_path, config={"rate": 0.1, "sizes": [1, 2]})
    with pytest.raises(ValueError, match="config/extra: 'nothing' there, 1 here"):
        run(tmp_path, config={"rate": 3e-2, "sizes": [1, 2], "extra": 1})
    with pytest.raises(ValueError, match="key's words"):
        run(tmp_path, state=start(seed=1))
    with pytest.raises(
        ValueError, match=r"params/head/kernel: .* there, 'nothing' here"
    ):
        run(tmp_path, state=start(exclude="head"))
    with pytest.raises(ValueError, match="config: rate is a function"):
        run(tmp_path, config={"rate": run})
    with pytest.raises(ValueError, match="log_every: got 0"):
        run(tmp_path, log_every=0)


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    run(tmp_path)
    (tmp_path / "checkpoints" / "12" / "state" / "_METADATA").write_text("{")
    with pytest.raises(checkpoints.CheckpointError, match="_METADATA"):
        run(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path):
    def batches(step):
        scale = np.float32("inf") if step == 8 else 1
        return jax.tree.map(lambda x: x * scale, batch_at(step))

    with pytest.raises(FloatingPointError, match="the loss is nan at step 9"):
        run(tmp_path, batches=batches, eval_every=5, log_every=5)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["5"]


def test_metrics_of_some_batches_only(tmp_path):
    def loss(p, batch, key):
        return jnp.sum(p**2), {f"task_{len(batch)}": jnp.float32(len(batch))}

    optimizer = optax.sgd(0.1)
    result = fit(
        make_step(loss, optimizer),
        init_state(jnp.ones(2), optimizer, jax.random.key(0)),
        lambda s: np.zeros(1 + s % 2),
        steps=4,
        progress=False,
    )
    (record,) = result.history
    assert (record["task_1"], record["task_2"]) == (1, 2)
    json.dumps(record)
