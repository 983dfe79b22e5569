"""Text tasks through tensorflow-datasets' records and back."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitask_jax.data import text_builder, text_tasks
from multitask_jax.data.text_tasks import PARTS, Rows, Task

ONE = Task(
    "mood",
    ("bad", "good"),
    Rows(np.array([1, 0, 1, 0, 0], np.int32), [(f"row {i}, été",) for i in range(5)]),
    Rows(np.array([0, 1], np.int32), [("so so",), ('a "quoted" one',)]),
    Rows(np.array([1], np.int32), [("fine",)]),
)
# Labels in the order of numbers (10 after 9), sentences that must not change places.
TWO = Task(
    "pairs",
    ("9", "10"),
    Rows(np.array([1, 0], np.int32), [("b", "a"), ("c", "d")]),
    Rows(np.array([0], np.int32), [("z", "y")]),
    Rows(np.array([1, 1, 0], np.int32), [("1", "2"), ("4", "3"), ("5", "5")]),
)


def assert_same_task(a: Task, b: Task) -> None:
    assert (a.name, a.labels) == (b.name, b.labels)
    for part in PARTS:
        x, y = getattr(a, part), getattr(b, part)
        assert x.labels.dtype == y.labels.dtype == np.int32
        np.testing.assert_array_equal(x.labels, y.labels)
        assert x.sentences == y.sentences


@pytest.mark.parametrize("task", [ONE, TWO], ids=lambda t: t.name)
def test_folders_round_trip_through_records(task: Task, tmp_path: Path) -> None:
    folder = tmp_path / task.name
    text_builder.write(folder, task)
    assert_same_task(text_tasks.read(folder), task)
    made = text_builder.builder(folder, tmp_path / "records")
    assert_same_task(text_builder.read(made), task)
    assert list((tmp_path / "records").rglob("*array_record*"))
    assert "tensorflow" not in sys.modules
    with pytest.raises(FileExistsError):
        text_builder.write(folder, task)


def test_changed_files_make_new_records(tmp_path: Path) -> None:
    folder, records = tmp_path / "mood", tmp_path / "records"
    text_builder.write(folder, ONE)
    text_builder.builder(folder, records)
    test = folder / "test.tsv"
    test.write_text(test.read_text().replace("fine", "finer"))
    again = text_builder.read(text_builder.builder(folder, records))
    assert again.test.sentences == [("finer",)]


def test_tabs_and_lines_within_sentences_become_spaces(tmp_path: Path) -> None:
    odd = Rows(np.array([0], np.int32), [("a\tb\nc",)])
    text_builder.write(tmp_path / "mood", ONE._replace(test=odd))
    assert text_tasks.read(tmp_path / "mood").test.sentences == [("a b c",)]


class Glue:
    """As much of tensorflow-datasets' builder as is used."""

    def __init__(self, splits: dict[str, list[dict[str, Any]]]):
        self.as_data_source = splits.__getitem__
        label = type("Label", (), {"names": ["no", "yes"]})
        self.info = type("Info", (), {"features": {"label": label}})

    def download_and_prepare(self) -> None:
        pass


def records(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"label": i % 2, "question1": b"q%d" % i, "question2": b"r%d" % i, "idx": i}
        for i in range(start, start + count)
    ]


def test_glue_keeps_its_validation_for_the_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = {"train": records(20), "validation": records(4, start=100)}
    monkeypatch.setattr(text_builder.tfds, "builder", lambda *_, **__: Glue(splits))
    task = text_builder.glue("qqp", validation=0.25)
    assert (task.name, task.labels, task.width) == ("qqp", ("no", "yes"), 2)
    assert len(task.validation.labels) == 5
    both = task.train.sentences + task.validation.sentences
    assert sorted(both) == sorted((f"q{i}", f"r{i}") for i in range(20))
    assert task.test.sentences == [(f"q{i}", f"r{i}") for i in range(100, 104)]
    for part in PARTS:
        given = getattr(task, part)
        numbers = [int(a[1:]) for a, _ in given.sentences]
        np.testing.assert_array_equal(given.labels, np.array(numbers) % 2)
    assert_same_task(task, text_builder.glue("qqp", validation=0.25))
    other = text_builder.glue("qqp", validation=0.25, seed=1)
    assert other.validation.sentences != task.validation.sentences


def test_names_of_glue_are_those_of_tensorflow_datasets() -> None:
    from tensorflow_datasets.text.glue import Glue as Theirs

    for name, columns in text_builder.GLUE.items():
        assert tuple(Theirs.builder_configs[name].text_features) == columns


def test_glue_without_internet_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise ConnectionError("no route")

    there = Glue({})
    monkeypatch.setattr(there, "download_and_prepare", refuse)
    monkeypatch.setattr(text_builder.tfds, "builder", lambda *_, **__: there)
    with pytest.raises(OSError, match=r"glue/sst2.*no route.*internet.*train\.tsv"):
        text_builder.glue("sst2")


def test_other_names_and_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'stsb'.*sst2"):
        text_builder.glue("stsb")
    with pytest.raises(ValueError, match="validation=1"):
        text_builder.glue("sst2", validation=1)
