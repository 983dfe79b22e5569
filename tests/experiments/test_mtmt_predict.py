import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import mtmt_model, mtmt_predict
from multitask_jax.data import trial_table
from multitask_jax.data.hillstrom import SCHEMA
from multitask_jax.data.trial_features import Encoder, fit_encoder
from multitask_jax.models import mtmt

NAMES = ("customer", *SCHEMA.features)
PEOPLE = [
    ["a,1", "1", "10", "1", "0", "0", "low", "Rural", "Web"],
    ["b", "3", "20", "1", "0", "1", "low", "Urban", "Web"],
    ["c", "8", "99", "0", "1", "0", "high", "Urban", "Phone"],
]


def save(path: Path, rows: list[list[str]], names: tuple[str, ...] = NAMES) -> Path:
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([names, *rows])
    return path


def load(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def about(path: Path) -> dict[str, Any]:
    text, where = trial_table.read_text(path)
    columns = trial_table.features_of(SCHEMA.features, text, where)
    encoder = fit_encoder(SCHEMA.features, columns)
    return {
        "encoder": encoder.to_json(),
        "arms": list(SCHEMA.arms),
        "outcomes": ["visit", "spend"],
        "policy_outcome": "spend",
    }


def model(x: np.ndarray) -> np.ndarray:
    """[n, F] -> [n, 3, 2]: the first feature decides between both e-mails."""
    z = np.zeros((len(x), 3, 2), np.float32)
    z[:, 1, 1], z[:, 2, 1] = x[:, 0], -x[:, 0]
    z[:, 1, 0] = 0.25
    return z + 1


def test_scores_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = save(tmp_path / "in.csv", PEOPLE)
    out = tmp_path / "new" / "out.csv"
    mtmt_predict.predict("model", given, out, model, about(given))
    found = load(out)
    recency = np.array([1, 3, 8])
    z = (recency - 4) / recency.std()
    for row, person, value in zip(found, PEOPLE, z, strict=True):
        assert [row[name] for name in NAMES] == person  # passed through
        assert float(row["expected_visit_no_e_mail"]) == 1
        assert float(row["uplift_visit_mens_e_mail"]) == 0.25
        assert float(row["uplift_visit_womens_e_mail"]) == 0
        assert float(row["expected_spend_mens_e_mail"]) == pytest.approx(
            1 + value, abs=1e-5
        )
        assert float(row["uplift_spend_womens_e_mail"]) == pytest.approx(
            -value, abs=1e-5
        )
    best = [row["best_arm"] for row in found]
    assert best == ["Womens E-Mail", "Womens E-Mail", "Mens E-Mail"]
    assert len(found[0]) == len(NAMES) + 6 + 4 + 1
    said = capsys.readouterr().out
    assert "3 people" in said
    assert "unknown (no category): none" in said
    assert "best for spend: Womens E-Mail, 66.7%" in said
    assert list(out.parent.iterdir()) == [out]  # no temporary file is left
    mtmt_predict.predict("model", given, out, model, about(given), "visit")
    assert {row["best_arm"] for row in load(out)} == {"Mens E-Mail"}


def test_less_may_be_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = save(tmp_path / "in.csv", PEOPLE), tmp_path / "out.csv"
    facts = about(given)
    best = ["Mens E-Mail", "Mens E-Mail", "Womens E-Mail"]
    for changes, told in (
        (facts | {"policy_outcome": "-spend"}, None),
        (facts, "-spend"),
    ):
        mtmt_predict.predict("model", given, out, model, changes, told)
        assert [row["best_arm"] for row in load(out)] == best
        assert "best for less spend: Mens E-Mail, 66.7%" in capsys.readouterr().out
    # An outcome's own name comes first.
    named = facts | {"outcomes": ["visit", "-spend"], "policy_outcome": "-spend"}
    mtmt_predict.predict("model", given, out, model, named)
    assert [row["best_arm"] for row in load(out)] == [*best[2:] * 2, best[0]]


def test_unknown_and_missing_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = save(tmp_path / "in.csv", PEOPLE)
    facts = about(given)
    rows = [[*PEOPLE[0]], [*PEOPLE[1]]]
    rows[0][-1], rows[1][1], rows[1][2] = "Pigeon", "", ""
    save(given, rows)
    mtmt_predict.predict("model", given, tmp_path / "out.csv", model, facts)
    said = capsys.readouterr().out
    assert "unknown (no category): channel 1" in said
    assert "missing (filled in): recency 1, history 1" in said
    assert "never varied in the trial (left out): none" in said


def test_what_never_varied_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first feature of 0 for all: it decides nothing, whatever a new file has."""
    same = [[*row] for row in PEOPLE]
    for row in same:
        row[1], row[3], row[-1] = "0.1", "1", "Web"
    facts = about(save(tmp_path / "trial.csv", same))
    same[0][1], same[1][3], same[2][-1] = "0.2", "0", "Phone"
    given, out = save(tmp_path / "in.csv", same), tmp_path / "out.csv"
    mtmt_predict.predict("model", given, out, model, facts)
    for row in load(out):
        assert float(row["uplift_spend_mens_e_mail"]) == 0
    said = capsys.readouterr().out
    assert "unknown (no category): none" in said
    never = "values of columns that never varied in the trial (left out):"
    assert f"{never} recency 1, mens 1, channel 1\n" in said


@pytest.mark.parametrize("people", [1, 7, 8, 9, 20])
def test_blocks_have_one_size(
    people: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All are scored, in the file's order; rows in errors are the file's."""
    monkeypatch.setattr(mtmt_predict, "BATCH", 8)
    sizes = set()

    def one(x: np.ndarray) -> np.ndarray:
        sizes.add(len(x))
        return model(x)

    rows = [[str(i), str(i % 5), *PEOPLE[0][2:]] for i in range(people)]
    given = save(tmp_path / "in.csv", rows)
    out = tmp_path / "out.csv"
    mtmt_predict.predict("model", given, out, one, about(given))
    found = load(out)
    assert [row["customer"] for row in found] == [str(i) for i in range(people)]
    gains = [float(row["uplift_spend_mens_e_mail"]) for row in found]
    for i, gain in enumerate(gains):
        assert gain == gains[i % 5]
    assert len(set(gains)) == min(people, 5)
    assert sizes == {min(people, 8)}
    facts = about(given)
    rows[-1][1] = "never"
    with pytest.raises(ValueError, match=f"row {people}, column recency: got 'never'"):
        mtmt_predict.predict("model", save(given, rows), out, one, facts)


def test_64000_people_by_a_saved_model(tmp_path: Path) -> None:
    """Of MTMT's own sizes (README has the time it takes): whole, in order, as alone."""
    given = save(tmp_path / "in.csv", PEOPLE)
    facts = about(given)
    features = len(Encoder.from_json(facts["encoder"]).features)
    sizes = mtmt.Sizes(3, 2, mtmt.tiered(3))
    params = jax.jit(lambda key: mtmt.init(key, features, sizes))(jax.random.key(0))
    mtmt_model.save(
        tmp_path / "model",
        params,
        sizes=sizes,
        features=features,
        mean=np.array([0.1, 5.0]),
        spread=np.array([0.3, 20.0]),
        about=facts,
    )
    many = save(tmp_path / "many.csv", (PEOPLE * 21_334)[:64_000])
    for name, file in (("few", given), ("all", many)):
        mtmt_predict.run(tmp_path / "model", file, tmp_path / f"{name}.csv")
    few, found = load(tmp_path / "few.csv"), load(tmp_path / "all.csv")
    assert len(found) == 64_000
    numbers = [n for n in found[0] if n.startswith(("expected_", "uplift_"))]
    for i in (0, 1, 2, 31_999, 63_999):
        for name in numbers:
            here, alone = float(found[i][name]), float(few[i % 3][name])
            assert here == pytest.approx(alone, rel=1e-4, abs=1e-4), (i, name)


def test_small_effects_on_large_outcomes_keep_their_digits(tmp_path: Path) -> None:
    """Of a saved model; in float32, 12,345,678 has no tenths."""
    given, out = save(tmp_path / "in.csv", PEOPLE), tmp_path / "out.csv"
    facts = about(given)
    features = len(Encoder.from_json(facts["encoder"]).features)
    sizes = mtmt.Sizes(3, 2, mtmt.tiered(3))
    params = jax.jit(lambda key: mtmt.init(key, features, sizes))(jax.random.key(0))
    plain, large = [], []
    for found, mean, spread in ((plain, 0, 1), (large, 12_345_678, 2)):
        mtmt_model.save(
            tmp_path / "model",
            params,
            sizes=sizes,
            features=features,
            mean=np.full(2, mean),
            spread=np.full(2, spread),
            about=facts,
        )
        mtmt_predict.run(tmp_path / "model", given, out)
        found += load(out)
    for a, b in zip(plain, large, strict=True):
        for name in (n for n in a if n.startswith("uplift")):
            assert float(b[name]) == pytest.approx(2 * float(a[name]), rel=1e-6)
        for name in (n for n in a if n.startswith("expected")):
            assert float(b[name]) == pytest.approx(
                12_345_678 + 2 * float(a[name]), abs=0.06
            )


def test_errors_leave_the_output_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = save(tmp_path / "in.csv", PEOPLE), tmp_path / "out.csv"
    out.write_text("before")
    facts = about(given)

    def fails(match: str, path: Path = given, **changes: Any) -> None:
        kwargs = {"model": model, "about": facts} | changes
        with pytest.raises(ValueError, match=match):
            mtmt_predict.predict("model", path, out, **kwargs)
        assert out.read_text() == "before"

    fails("without an encoder", about=facts | {"encoder": None})
    fails("policy_outcome='profit'", policy_outcome="profit")
    fails("expected .*, all finite", model=lambda x: model(x)[:, :2])
    fails("expected .*, all finite", model=lambda x: model(x) * np.nan)
    other = tmp_path / "other.csv"
    fails(r"expected \['channel'\]", save(other, [r[:-1] for r in PEOPLE], NAMES[:-1]))
    clash = save(other, [[*r, ""] for r in PEOPLE], (*NAMES, "best_arm"))
    fails("which scoring adds", clash)
    fails("both are 'visit_1'", about=facts | {"arms": ["0", "1", "-1"]})
    with pytest.raises(ValueError, match="two files"):
        mtmt_predict.predict("model", given, given, model, facts)
    with pytest.raises(FileNotFoundError):
        mtmt_predict.predict("model", tmp_path / "none.csv", out, model, facts)

    def replace(a: str, b: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(mtmt_predict.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        mtmt_predict.predict("model", given, out, model, facts)
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("in.csv", "other.csv", "out.csv")
    ]
