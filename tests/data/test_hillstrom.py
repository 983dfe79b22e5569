import csv
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from multitask_jax.data import hillstrom, hillstrom_builder, trial_table
from multitask_jax.data.hillstrom import SCHEMA
from multitask_jax.data.trial_features import Encoder, encode, fit_encoder, trial_of
from multitask_jax.data.uplift import Trial

HEADER = (*SCHEMA.features, SCHEMA.arm, *SCHEMA.outcomes)
ROWS = [
    # recency, history, mens, womens, newbie, history_segment, zip_code, channel, ...
    ["1", "10", "1", "0", "0", "a", "Rural", "Web", "No E-Mail", "0", "0", "0"],
    ["3", "20", "1", "0", "1", "a", "Urban", "Web", "Mens E-Mail", "1", "1", "29.9"],
    ["8", "99", "0", "1", "0", "b", "Urban", "Phone", "Womens E-Mail", "1", "0", "0"],
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def inner(rows: list[list[str]], header: tuple[str, ...] = HEADER) -> Path:
        path = tmp_path / "given.csv"
        with path.open("w", newline="") as f:
            csv.writer(f).writerows([header, *rows])
        return path

    return inner


def encoder_of(path: Path) -> Encoder:
    return fit_encoder(SCHEMA.features, hillstrom.read(path).columns)


def trial(path: Path) -> Trial:
    return trial_of(SCHEMA, hillstrom.read(path), encoder_of(path))


def changed(row: int, column: str, value: str) -> list[list[str]]:
    rows = [list(r) for r in ROWS]
    rows[row][HEADER.index(column)] = value
    return rows


def test_trial_by_hand(write: Callable[..., Path]) -> None:
    t = trial(write(ROWS))
    assert t.features == (
        *("recency", "log1p(history)", "mens", "womens", "newbie"),
        *("history_segment=a", "history_segment=b", "zip_code=Rural"),
        *("zip_code=Urban", "channel=Phone", "channel=Web"),
    )
    recency = np.array([1, 3, 8])
    history = np.log1p([10, 20, 99])
    np.testing.assert_allclose(t.x[:, 0], (recency - 4) / recency.std(), rtol=1e-6)
    np.testing.assert_allclose(
        t.x[:, 1], (history - history.mean()) / history.std(), rtol=1e-6
    )
    assert t.x[:, 2:].tolist() == [
        [1, 0, 0, 1, 0, 1, 0, 0, 1],
        [1, 0, 1, 1, 0, 0, 1, 0, 1],
        [0, 1, 0, 0, 1, 0, 1, 1, 0],
    ]
    assert t.x.dtype == np.float32
    assert t.arm.tolist() == [0, 1, 2]
    np.testing.assert_allclose(t.y, [[0, 0, 0], [1, 1, 29.9], [1, 0, 0]], rtol=1e-6)
    assert t.segments["zip_code"].tolist() == ["Rural", "Urban", "Urban"]
    assert t.segments["newbie"].tolist() == ["no", "yes", "no"]


def test_unknown_and_missing_are_counted(write: Callable[..., Path]) -> None:
    encoder = encoder_of(write(ROWS))
    rows = changed(0, "zip_code", "Mars")
    rows[1][HEADER.index("recency")] = " "
    rows[1][HEADER.index("channel")] = "NA"
    rows[2][HEADER.index("mens")] = ""
    text, where = trial_table.read_text(write(rows))
    found = encode(encoder, trial_table.features_of(encoder.kinds, text, where))
    assert {k: n for k, n in found.unknown.items() if n} == {"zip_code": 1}
    missing = {k: n for k, n in found.missing.items() if n}
    assert missing == {"recency": 1, "channel": 1, "mens": 1}
    zips = [encoder.features.index(f"zip_code={z}") for z in ("Rural", "Urban")]
    assert found.x[0, zips].tolist() == [0, 0]
    recency = np.array([1, 3, 8])
    assert found.x[1, 0] == np.float32((3 - 4) / recency.std())  # the median
    assert found.x[1, encoder.features.index("channel=Web")] == 1  # the mode
    assert found.x[2, encoder.features.index("mens")] == 1


def test_encoder_survives_json(write: Callable[..., Path]) -> None:
    encoder = encoder_of(write(ROWS[:2]))
    table = hillstrom.read(write(ROWS))
    again = Encoder.from_json(encoder.to_json())
    np.testing.assert_array_equal(
        encode(again, table.columns).x, encode(encoder, table.columns).x
    )
    assert again.features == encoder.features
    assert "channel=Phone" not in again.features  # in the third row only
    odd = json.dumps({"kinds": {"age": "word"}, "fill": {"age": 1}})
    old = json.dumps({k: v for k, v in encoder._asdict().items() if k != "constant"})
    for text in ("", "[]", json.dumps({"fill": {}}), odd, old):
        with pytest.raises(ValueError, match="what Encoder"):
            Encoder.from_json(text)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("segment", "Fax", "one of"),
        ("segment", "", "one of"),
        ("visit", "2", "0 or 1"),
        ("conversion", "", "0 or 1"),
        ("spend", "-1", "not negative"),
        ("spend", "nan", "not negative"),
        ("history", "inf", "not negative"),
        ("history", "much", "not negative"),
        ("mens", "yes", "0 or 1"),
    ],
)
def test_bad_value_is_named(
    write: Callable[..., Path], column: str, value: str, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected) as e:
        hillstrom.read(write(changed(1, column, value)))
    assert f"row 2, column {column}: got {value!r}" in str(e.value)


def test_bad_tables_are_named(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hillstrom.read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"expected \['recency'\] too"):
        hillstrom.read(write([r[1:] for r in ROWS], HEADER[1:]))
    with pytest.raises(ValueError, match="'profit'"):
        hillstrom.read(write([[*r, "1"] for r in ROWS], (*HEADER, "profit")))
    with pytest.raises(ValueError, match="twice"):
        hillstrom.read(write(ROWS, (HEADER[1], *HEADER[1:])))
    with pytest.raises(ValueError, match="row 3: got 11 values, expected 12"):
        hillstrom.read(write([*ROWS[:2], ROWS[2][1:]]))
    with pytest.raises(ValueError, match="no rows"):
        hillstrom.read(write([]))
    (tmp_path / "latin.csv").write_bytes(b"recency\n\xe9\n")
    with pytest.raises(ValueError, match="UTF-8"):
        hillstrom.read(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match="column zip_code: got no value"):
        trial(write(changed(0, "zip_code", "")[:1]))


def test_builder_gives_the_table(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(changed(0, "recency", ""))
    expected = hillstrom.read(path)
    made = hillstrom_builder.builder(path, tmp_path / "records")
    found = hillstrom_builder.read(made)
    for name, column in expected.columns.items():
        assert found.columns[name].dtype.kind == column.dtype.kind
        if SCHEMA.features[name] == "category":
            assert found.columns[name].tolist() == column.tolist()
        else:
            np.testing.assert_allclose(found.columns[name], column, rtol=1e-6)
    np.testing.assert_array_equal(found.arm, expected.arm)
    np.testing.assert_array_equal(found.y, expected.y)
    with pytest.raises(ValueError, match="0 or 1"):
        hillstrom_builder.builder(write(changed(1, "visit", "3")), tmp_path / "records")


def test_builder_says_that_it_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def urlopen(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError, match="give its path"):
        hillstrom_builder.builder(data_dir=tmp_path)


def test_experiment_as_published(shared: Path) -> None:
    path = shared / "data/uplift/hillstrom.csv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    t = trial(path)
    assert t.x.shape == (48_000, 18)
    visits = [t.y[t.arm == a, 0].mean() for a in range(3)]
    np.testing.assert_allclose(visits, [0.106, 0.183, 0.151], atol=0.004)  # of 64,000
    np.testing.assert_allclose(t.x[:, :2].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(t.x[:, :2].std(axis=0), 1, atol=1e-3)
    hot = t.x[:, 5:]
    np.testing.assert_array_equal(hot.sum(axis=1), 3)
