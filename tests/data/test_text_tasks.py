"""Tasks from folders of TSV files: what is read, and what is refused."""

import numpy as np
import pytest

from multitask_jax.data import text_tasks


def write(folder, *, header="label\tsentence", lines=("1\ta b", "0\tc"), **parts):
    folder.mkdir(parents=True)
    for part in text_tasks.PARTS:
        rows = parts.get(part, lines)
        (folder / f"{part}.tsv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_labels_are_in_order_and_shared_by_the_parts(tmp_path):
    lines = ("10\tten", "9\tnine", "zebra\tz", "9\tagain")
    task = text_tasks.read(write(tmp_path / "x", lines=lines, test=("zebra\tq",)))
    assert task.labels == ("9", "10", "zebra")
    np.testing.assert_array_equal(task.train.labels, [1, 0, 2, 0])
    np.testing.assert_array_equal(task.test.labels, [2])
    assert task.train.sentences[0] == ("ten",)
    assert task.width == 1


@pytest.mark.parametrize("first", ["sentence", "sentence1"])
def test_pairs_and_quotes_are_kept_as_they_are(tmp_path, first):
    lines = ('1\t"a" said\tb', "0\tc\td")
    folder = write(tmp_path / "x", header=f"label\t{first}\tsentence2", lines=lines)
    task = text_tasks.read(folder)
    assert task.width == 2
    assert task.train.sentences == [('"a" said', "b"), ("c", "d")]


def test_samples_are_repeatable_and_without_repetition(tmp_path):
    lines = tuple(f"{i % 2}\tsentence {i}" for i in range(50))
    rows = text_tasks.read(write(tmp_path / "x", lines=lines)).train
    first, again, other = (text_tasks.take(rows, 20, seed=s) for s in (0, 0, 1))
    assert first.sentences == again.sentences != other.sentences
    assert len(set(first.sentences)) == 20
    places = [rows.sentences.index(s) for s in first.sentences]
    assert places == sorted(places)
    np.testing.assert_array_equal(first.labels, rows.labels[places])
    assert len(text_tasks.take(rows, 99, seed=0).labels) == 50


def test_find(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / name)
    (tmp_path / "no_task").mkdir()
    assert text_tasks.find(tmp_path) == ["a", "b"]
    assert text_tasks.find(tmp_path, ["b"]) == ["b"]
    with pytest.raises(ValueError, match=r"got tasks \['c'\], expected some of"):
        text_tasks.find(tmp_path, ["c"])
    with pytest.raises(ValueError, match="each once"):
        text_tasks.find(tmp_path, ["a", "a"])
    with pytest.raises(ValueError, match="got no task, expected folders"):
        text_tasks.find(tmp_path / "no_task")
    (tmp_path / "a" / "validation.tsv").rename(tmp_path / "a" / "dev.tsv")
    there = r"\['dev\.tsv', 'test\.tsv', 'train\.tsv'\]"
    for names in ([], ["a", "b"]):
        with pytest.raises(ValueError, match=f"/a: got {there}, expected"):
            text_tasks.find(tmp_path, names)
    assert text_tasks.find(tmp_path, ["b"]) == ["b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"header": "sentence\tlabel"}, r"train\.tsv:1: got header"),
        (
            {"header": "label\tsentence\tid", "lines": ("1\ta\t5", "0\tb\t6")},
            r"train\.tsv:1: got header \['label', 'sentence', 'id'\], expected label",
        ),
        (
            {"header": "label\tsentence\t", "lines": ("1\ta\t", "0\tb\t")},
            r"train\.tsv:1: got header \['label', 'sentence', ''\], expected label",
        ),
        ({"lines": ("1\ta", "0\tb\tc")}, r"train\.tsv:3: got 3 columns, expected 2"),
        ({"test": ("7\tx",)}, r"test\.tsv:2: got label '7'"),
        ({"lines": ("1\ta", "1\tb")}, "one label only"),
        ({"validation": ()}, r"validation\.tsv: got no rows"),
    ],
)
def test_errors_name_file_and_line(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        text_tasks.read(write(tmp_path / "x", **options))


def test_other_encodings_are_refused(tmp_path):
    folder = write(tmp_path / "x")
    lines = ["label\tsentence", "1\ta", "0\tcaf\xe9"]
    (folder / "validation.tsv").write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(ValueError, match=r"validation\.tsv:3: got bytes that are not"):
        text_tasks.read(folder)
