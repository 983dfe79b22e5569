"""The study from end to end on a tiny base and *synthetic* tasks, and its pieces."""

import dataclasses
import json
import runpy
import shutil

import numpy as np
import pytest

from experiments import (
    flags,
    merging_study,
    signals,
    study_analysis,
    study_candidates,
    study_data_driven,
    study_merges,
    study_rows,
    study_state,
    study_tasks,
    study_training,
)
from experiments.merging_study import Config
from experiments.study_stand_in import SHAPE, make_base, make_tasks
from multitask_jax import checkpoints, host_memory, merging
from multitask_jax.data import text_tasks, tokens
from multitask_jax.models import bert
from tests.experiments.common import from_flagfile

ABLATED, FITTED = ("TIES", "oracle signs"), "AdaMerging, by leaf"
ROWS = "task_arithmetic,ties,ties + LiNeS,EMR,TALL masks"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    return make_base(root / "base"), make_tasks(root / "tasks"), root / "out"


def smoke(places, **changes):
    """The smoke flagfile's config, on these files."""
    base, tasks, out = places
    return from_flagfile(
        Config,
        "study/smoke",
        model_dir=str(base),
        data_dir=str(tasks),
        workdir=str(out),
        progress=False,
        **changes,
    )


@pytest.fixture(scope="module")
def config(places):
    fitted = f"{FITTED},{FITTED} + LiNeS"
    parts = ",".join(merging_study.PARTS)
    return smoke(places, parts=parts, methods=f"{ROWS},{fitted}")


@pytest.fixture(scope="module")
def fewer():
    """Fewer ablations, whose candidates belong to the protocol."""
    ablations = study_candidates.ablations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            study_candidates,
            "ablations",
            lambda *a: [e for e in ablations(*a) if e.label in ABLATED],
        )
        yield


@pytest.fixture(scope="module")
def result(config, fewer):
    """One run of all parts, with fewer rows in the longer ones."""
    in_memory = study_data_driven.in_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_rows, "COUNTED", ("ties",))
        patch.setattr(study_analysis, "DENSITIES", (1.0, 0.2))
        patch.setattr(study_analysis, "ALPHAS", (0.0, 0.5, 1.0))
        patch.setattr(
            study_data_driven,
            "in_memory",
            lambda *a, **k: {FITTED: in_memory(*a, **k)[FITTED]},
        )
        return merging_study.run(config)


def rows(result, part):
    return {r["row"]: r for r in result.records if r["part"] == part}


def test_every_part_is_there(result, config, places):
    for part in (*merging_study.PARTS, "references", "training"):
        if part not in ("data_driven",):
            assert rows(result, part), part
    assert set(rows(result, "methods")) >= {
        "ties",
        "EMR",
        FITTED,
    }
    out = places[2]
    for name in ("methods", "tasks", "forgetting", "conflicts", "redundancy"):
        assert (out / f"{name}.png").stat().st_size > 5_000
    assert (out / "report.md").read_text() == result.report
    assert "| *base* |" in result.report
    assert "Left out: slerp (two models)" in result.report
    assert f"| {FITTED} + LiNeS |" in result.report


def test_specialists_learn_and_heads_fit_the_base(result, places):
    reference = rows(result, "references")
    for name in ("first", "second", "third"):
        own = reference[f"expert: {name}"]["test"][name]
        assert own >= reference["base"]["test"][name] - 0.1
        assert own > 0.6
    base = checkpoints.read_tensors(places[0])
    for name in rows(result, "training"):
        found = checkpoints.read_tensors(places[2] / "seed_0" / name)
        key = "encoder.layer.0.output.dense.weight"
        assert np.abs(found[key] - base[key]).max() > 1e-4


def test_fine_tuning_is_traced_once_a_shape_whatever_the_task(result, config):
    """Three tasks, one of pairs: a program for each number of sentences and length."""
    steps = tokens.steps_an_epoch(config.train_rows, config.batch_size)
    step, _ = study_training.step_and_optimizer(
        SHAPE, config.rate, config.epochs * steps
    )
    shapes = [batch["ids"] for batch in step.traced]
    assert {s[1] for s in shapes} == {1, 2}
    assert len(set(shapes)) == len(shapes)


def test_tuned_in_memory_is_what_the_command_line_writes(result):
    compared = [r for r in rows(result, "methods").values() if "difference" in r]
    assert len(compared) >= 3
    assert [r["row"] for r in compared if r["difference"] > 0] == []


def test_a_seed_is_added_under_the_first_ones_coefficients(places, fewer, tmp_path):
    """A method that ends in parameters, too, is merged as the command line does."""
    config = smoke(
        places,
        parts="methods",
        methods="ties,karcher,TALL masks",
        tune_every_seed=False,
    )
    config = dataclasses.replace(config, workdir=str(tmp_path / "out"))
    first = merging_study.run(config)
    moved = tmp_path / "moved"
    shutil.copytree(places[1], moved)  # where the data lie says nothing
    both = dataclasses.replace(config, seeds="0,1", data_dir=str(moved))
    result = merging_study.run(both)
    assert result.records[: len(first.records)] == first.records
    second = {
        r["row"]: r for r in result.records if r["part"] == "methods" and r["seed"] == 1
    }
    for row, record in rows(first, "methods").items():
        assert second[row]["coefficients"] == record["coefficients"]
        assert second[row].get("validation", []) == []
    assert rows(first, "methods")["TALL masks"]["difference"] == 0
    with pytest.raises(ValueError, match=r"another run .*'first_seed': \(0, 1\)"):
        merging_study.run(dataclasses.replace(both, seeds="1,0"))


def test_budget(result, config):
    for record in rows(result, "methods").values():
        assert len(record.get("validation", [])) <= config.budget


def test_a_second_run_does_nothing_again(result, config, places, monkeypatch):
    """Under whatever name its folders are known, ~ among them."""
    path = merging_study.Path(config.workdir) / "metrics.jsonl"
    before = path.read_bytes()
    monkeypatch.setattr(study_merges, "merge_on_disk", None)
    monkeypatch.setattr(study_tasks.Evaluator, "scores", None)
    small = dataclasses.replace(
        config, parts="methods,redundancy,forgetting", methods=ROWS
    )
    monkeypatch.setenv("HOME", str(places[0].parent))
    home = {"model_dir": "~/base", "data_dir": "~/tasks", "workdir": "~/out"}
    again = merging_study.run(dataclasses.replace(small, **home))
    assert path.read_bytes() == before
    assert again.report == result.report


def test_a_cut_off_line_is_done_again(result, config, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(config.workdir, work)
    path = work / "metrics.jsonl"
    text = path.read_text()
    last = json.loads(text.splitlines()[-1])
    assert last["part"] == "gradients"
    path.write_text(text[:-20])
    small = dataclasses.replace(
        config, workdir=str(work), parts="gradients", methods=""
    )
    again = merging_study.run(small)
    redone = rows(again, last["part"])[last["row"]]
    assert {k: v for k, v in redone.items() if k != "spent"} == {
        k: v for k, v in last.items() if k != "spent"
    }


def test_a_part_that_fails_leaves_a_report(result, config, tmp_path, monkeypatch):
    work = tmp_path / "work"
    shutil.copytree(config.workdir, work)
    (work / "report.md").unlink()

    def fail(*_):
        raise ValueError("of this part")

    monkeypatch.setattr(study_analysis, "gradients", fail)
    small = dataclasses.replace(
        config, workdir=str(work), parts="gradients", methods=""
    )
    with pytest.raises(ValueError, match="of this part"):
        merging_study.run(small)
    assert "| EMR |" in (work / "report.md").read_text()


def test_other_candidates_are_refused(result, config, monkeypatch):
    monkeypatch.setattr(study_candidates, "SCALES", (0.5, 1.0))
    with pytest.raises(ValueError, match=r"another run .*'protocol': \("):
        merging_study.run(config)


def test_other_settings_are_refused(result, config):
    with pytest.raises(ValueError, match=r"another run .*'epochs': \(1, 5\)"):
        merging_study.run(dataclasses.replace(config, epochs=5))
    with pytest.raises(ValueError, match=r"another run .*'tasks': \("):
        merging_study.run(dataclasses.replace(config, tasks="first,second"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": ""}, "--data_dir: got none"),
        ({"tasks": "first"}, "expected two or more"),
        ({"tasks": "first,nth"}, r"got tasks \['nth'\]"),
        ({"seeds": "1,1"}, "--seeds: got"),
        ({"seeds": "1,01"}, "--seeds: got"),
        ({"methods": "tis"}, r"--methods: got \['tis'\]"),
        ({"parts": "all"}, r"--parts: got \['all'\]"),
        ({"parts": "methods"}, f"got '{FITTED}', a row of the part 'data_driven'"),
        ({"parts": "counts"}, "got 'task_arithmetic', a row of the part 'methods'"),
        ({"model_dir": "nowhere"}, "make minilm"),
        ({"budget": 0}, "--budget: got 0"),
        ({"products": "half"}, "--products: got 'half', expected one of"),
        ({"test_rows": -5}, "--test_rows: got -5"),
        ({"adamerging_steps": -1}, "--adamerging_steps: got -1"),
        ({"budget": 9}, "--budget: got 9, expected 1 to 8"),
        ({"rate": 0.0}, "--rate: got 0.0, expected a number above 0"),
        ({"unlabelled_rows": 20}, "--unlabelled_rows: got 20, expected whole sixteens"),
        ({"fisher_rows": 32}, "--fisher_rows: got 32, more than the 16"),
        ({"max_length": 100}, r"--max_length: got 100, expected at most \d+: the base"),
    ],
)
def test_errors(config, changes, message, tmp_path):
    changed = dataclasses.replace(config, workdir=str(tmp_path / "w"), **changes)
    with pytest.raises(ValueError, match=message):
        merging_study.run(changed)
    assert not (tmp_path / "w").exists()


def test_a_workdir_inside_the_base_is_refused(config, places, tmp_path):
    base, link = places[0], tmp_path / "link"
    link.symlink_to(base)
    for model, work in ((base, link), (link, base / "w"), (base, base / "w" / "w")):
        changed = dataclasses.replace(config, model_dir=str(model), workdir=str(work))
        with pytest.raises(
            ValueError, match=f"--workdir: got {work} inside --model_dir"
        ):
            merging_study.run(changed)
    assert not (base / "w").exists()


def test_what_a_base_lacks_is_told_before_its_weights_are_read(
    config, places, tmp_path
):
    about = json.loads((places[0] / "config.json").read_text())
    changed = dataclasses.replace(config, model_dir=str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(about | {"model_type": "roberta"}))
    with pytest.raises(ValueError, match=f"--model_dir: {file}: model_type is 'robe"):
        merging_study.run(changed)
    file.write_text(json.dumps(about))
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(ValueError, match=r"--model_dir: .*tokenizer\.json: not there"):
        merging_study.run(changed)


def test_a_scheduler_ends_the_script_as_ctrl_c_does(monkeypatch):
    called = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(signals, "as_interruption", lambda: called.append("signals"))
    monkeypatch.setattr(flags, "main", lambda *_: called.append("main"))
    runpy.run_path(merging_study.__file__, run_name="__main__")
    assert called == ["signals", "main"]


def test_unlabelled_rows_are_of_all_labels():
    """Rows that are sorted by label, as files often are."""
    rows = [(np.array([i, i + 1], np.int32),) for i in range(640)]
    head = study_tasks.Head(np.zeros((4, 2), np.float32), np.zeros(2, np.float32))
    found = study_data_driven.unlabelled(
        {"a": tokens.Encoded(rows)}, {"a": head}, rows=64, batch_size=16, length=8
    )
    first = np.concatenate([b["ids"][:, 0, 0] for b in found["a"]])
    assert len(first) == len(set(first)) == 64
    assert 16 < (first < 320).sum() < 48


def test_rows_are_chosen_by_name():
    config = Config(methods="ties,EMR,AdaMerging, by leaf,AdaMerging, by task + LiNeS")
    assert merging_study.chosen_rows(config, merging_study.PARTS) == [
        "ties", "EMR", "AdaMerging, by leaf", "AdaMerging, by task + LiNeS"
    ]  # fmt: skip
    every = study_rows.labels(config.budget)
    for between in (",", ", "):
        config = Config(methods=between.join(every))
        assert merging_study.chosen_rows(config, merging_study.PARTS) == every


def test_other_bytes_are_another_study(places, config, result, tmp_path):
    tasks = tmp_path / "tasks"
    shutil.copytree(places[1], tasks)
    path = tasks / "first" / "test.tsv"
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, f"{first} more", *rest]) + "\n")
    changed = dataclasses.replace(config, data_dir=str(tasks))
    with pytest.raises(ValueError, match=r"another run .*'files': \("):
        merging_study.run(changed)
    base = tmp_path / "base"  # the same weights, read otherwise
    shutil.copytree(places[0], base)
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"layer_norm_eps": 1e-5}))
    changed = dataclasses.replace(config, model_dir=str(base))
    with pytest.raises(ValueError, match=r"another run .*'files': \("):
        merging_study.run(changed)


def test_likelihood_by_hand():
    evaluator = study_tasks.Evaluator(SHAPE)
    head = study_tasks.Head(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))
    x = np.array([[0.0, 2.0], [1.0, 0.0]], np.float32)
    pool = study_tasks.Pool([], {"a": np.arange(2)[:, None]}, {"a": np.array([1, 1])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "features", lambda *_: {"a": x})
        got = evaluator.scores(None, {"a": head}, pool)["a"]
    wanted = (2 - np.log(1 + np.e**2)) / 2 - np.log(np.e + 1) / 2
    assert got.accuracy == 0.5
    np.testing.assert_allclose(got.likelihood, wanted, rtol=1e-6)
    # A class that no training row had says nothing about candidates.
    unknown = head._replace(bias=np.array([0.0, study_tasks.NEVER], np.float32))
    pool = pool._replace(labels={"a": np.array([1, 0])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "features", lambda *_: {"a": x})
        got = evaluator.scores(None, {"a": unknown}, pool)["a"]
    assert got.accuracy == 0.5
    assert got.likelihood == pytest.approx(0.0)


def test_statistics_files_by_hand(places, tmp_path):
    """One program for all tasks, with each task's own head."""
    base, tasks, _ = places
    tensors = study_tasks.floats_of(checkpoints.read_tensors(base))
    rows = {n: text_tasks.read(tasks / n).train for n in ("first", "second", "third")}
    encoded = {
        n: tokens.encode(str(base), r.sentences, max_length=16) for n, r in rows.items()
    }
    rng = np.random.default_rng(0)
    heads = {
        n: study_tasks.Head(
            rng.standard_normal((64, 2)).astype(np.float32), np.zeros(2, np.float32)
        )
        for n in rows
    }
    batches = study_data_driven.unlabelled(
        encoded, heads, rows=32, batch_size=16, length=8
    )
    for name in rows:
        (tmp_path / name).mkdir()
    files = study_data_driven.save_statistics(
        tmp_path, SHAPE, lambda name: tensors, batches, fisher_rows=16, seed=0
    )
    assert files["gram"].split(",") == [
        str(tmp_path / n / "gram.safetensors") for n in rows
    ]
    # Heads alone differ, which Gram matrices do not know and Fisher does.
    apply = study_data_driven.apply_fn(SHAPE)
    inputs = batches["first"][0]
    x = study_tasks.row_features(
        bert.from_hugging_face(tensors, shape=SHAPE)[0], inputs, SHAPE
    )
    expected = x @ heads["first"].kernel + heads["first"].bias[None]
    np.testing.assert_allclose(apply(tensors, inputs), expected, rtol=1e-4, atol=1e-5)
    assert study_data_driven.apply_fn(SHAPE) is apply  # the same: programs are kept
    word = "embeddings.word_embeddings.weight"
    for name, fisher in zip(rows, files["fisher"].split(","), strict=True):
        gram = merging.load_statistics(tmp_path / name / "gram.safetensors")
        assert "encoder.layer.0.attention.self.query.weight" in gram
        found = merging.load_statistics(fisher)
        seen = np.unique(batches[name][0]["ids"])
        moved = np.flatnonzero(np.asarray(found[word]).any(axis=1))
        assert set(moved) <= set(seen)
        assert len(moved) > 3
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    again = study_data_driven.save_statistics(
        tmp_path, SHAPE, None, batches, fisher_rows=16, seed=0
    )
    assert again == files
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_pareto_front_by_hand():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (1.5, 4.5), (0.5, 5.0)]
    front = [points[i] for i in np.flatnonzero(merging.pareto_front(points))]
    assert front == [(1.0, 5.0), (2.0, 4.0), (1.5, 4.5)]


def test_tasks_of_glue_by_name(places, monkeypatch):
    from multitask_jax.data import text_builder

    base, tasks, _ = places
    made = text_tasks.read(tasks / "first")
    asked = []

    def glue(name):
        asked.append(name)
        return made._replace(name=name)

    monkeypatch.setattr(text_builder, "glue", glue)
    config = Config(model_dir=str(base), tasks="glue/sst2,glue/rte")
    _, names, parts, _ = merging_study.check(config)
    assert names == ["glue/sst2", "glue/rte"]
    assert parts == list(merging_study.PARTS)
    mixed = dataclasses.replace(config, data_dir=str(tasks), tasks="second,glue/sst2")
    _, names, *_ = merging_study.check(mixed)
    assert study_state.read_task(str(tasks), names[0]).name == "second"
    assert study_state.read_task(str(tasks), names[1]).name == "sst2"
    assert asked == ["sst2"]
    twice = dataclasses.replace(config, tasks="glue/sst2,glue/sst2")
    with pytest.raises(ValueError, match="expected each name once"):
        merging_study.check(twice)
    unknown = dataclasses.replace(config, tasks="glue/sst2,glue/sts2")
    with pytest.raises(ValueError, match="got GLUE task 'sts2'"):
        merging_study.check(unknown)


def test_padding_and_batches_do_not_change_accuracy(places):
    base, tasks, _ = places
    evaluator = study_tasks.Evaluator(SHAPE)
    task = text_tasks.read(tasks / "second")
    params = evaluator.params(checkpoints.read_tensors(base))
    encoded = {"second": tokens.encode(str(base), task.test.sentences, max_length=32)}
    pools = [
        study_tasks.make_pool(encoded, {"second": task.test}, batch_size=b)
        for b in (3, 64)
    ]
    a, b = (evaluator.features(params, pool)["second"] for pool in pools)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert evaluator.traces() <= sum(
        len({x.ids.shape for x in p.batches}) for p in pools
    )
