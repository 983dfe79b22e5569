"""Tables of one's own experiments."""

from pathlib import Path

import numpy as np
import pytest

from multitask_jax.data import trial_features, trial_table

TEXT = {
    "age": ["20", "NA", "41", "23"],
    "debt": ["-3", "7", "1e3", "0"],
    "member": ["0", "None", "1", "1"],
    "plan": ["a", "none", "", "a"],
    "wealth": ["0", "1", "99", "1"],
    "group": ["none", "mail", "call", "none"],
    "bought": ["0", "1", "1", "0"],
    "profit": ["-2.5", "0", "4", "0"],
}
NAMED = {
    "features": ["age", "debt", "member", "plan", "wealth:log"],
    "arm": "group",
    "control": "none",
    "outcomes": ["bought", "profit"],
}


def test_kinds_follow_from_values() -> None:
    schema = trial_table.infer(TEXT, **NAMED)
    kinds = ("number", "number", "flag", "category", "log")
    assert schema.features == dict(zip(TEXT, kinds, strict=False))
    assert schema.arms == ("none", "call", "mail")  # an arm may be called none
    assert schema.outcomes == {"bought": "flag", "profit": "number"}
    table = trial_table.table_of(schema, TEXT)
    encoder = trial_features.fit_encoder(schema.features, table.columns)
    trial = trial_features.trial_of(schema, table, encoder)
    names = ["age", "debt", "member", "plan=a", "plan=none", "log1p(wealth)"]
    assert list(trial.features) == names
    assert trial.arm.tolist() == [0, 2, 1, 0]
    assert trial.binary == (True, False)
    np.testing.assert_array_equal(trial.y, [[0, -2.5], [1, 0], [1, 4], [0, 0]])
    # Missing: the median (not the mean, 28), and the most frequent value.
    age = np.array([20, 23, 41, 23])
    np.testing.assert_allclose(trial.x[:, 0], (age - age.mean()) / age.std(), rtol=1e-6)
    assert trial.x[:, 2:5].tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 0]]
    assert trial.segments["plan"].tolist() == ["a", "none", "missing", "a"]


def test_names_may_have_a_colon_and_arms_be_numbers(tmp_path: Path) -> None:
    path = tmp_path / "trial.csv"
    path.write_bytes(b"\xef\xbb\xbfa:b,arm,y\n1.5,1,2\n2.5,0,3\n,1,4\n")  # a BOM
    text, where = trial_table.read_text(path)
    options = {"arm": "arm", "control": "0", "outcomes": ["y"]}
    for name, kind in (("a:b", "number"), ("a:b:log", "log")):
        schema = trial_table.infer(text, where, features=[name], **options)
        assert schema.features == {"a:b": kind}
        assert schema.arms == ("0", "1")


def test_what_never_varied_is_left_out() -> None:
    """Its weights are untrained: of 48,000 people who all have 0.1, 0.2 tells nothing.

    The deviation of these 0.1 is 3e-17, by which 0.2 would be 4e15.
    """
    people = 48_000
    seen = {
        "age": np.arange(people) % 7.0,
        "rate": np.full(people, 0.1),
        "paid": np.full(people, 3.3),
        "member": np.ones(people),
        "shop": np.full(people, "a"),
    }
    assert 0 < seen["rate"].std() < 1e-16
    seen["paid"][5] = np.nan  # a gap is no other value
    kinds = dict(
        zip(seen, ("number", "amount", "log", "flag", "category"), strict=True)
    )
    encoder = trial_features.fit_encoder(kinds, seen)
    assert not trial_features.encode(encoder, seen).x[:, 1:].any()
    encoder = trial_features.Encoder.from_json(encoder.to_json())
    given = {
        "age": np.array([3.0, 30.0, 3.0]),
        "rate": np.array([0.1, 0.2, np.nan]),
        "paid": np.array([3.3, 0.0, 9.0]),
        "member": np.array([1.0, 0.0, 1.0]),
        "shop": np.array(["a", "b", ""]),
    }
    found = trial_features.encode(encoder, given)
    assert found.x[:, 0].tolist() == pytest.approx([0, 13.5, 0], abs=1e-3)
    assert not found.x[:, 1:].any()
    assert found.untrained == {"rate": 1, "paid": 2, "member": 1, "shop": 1}
    assert found.missing["rate"] == found.missing["shop"] == 1


def test_the_order_of_arms_can_be_told() -> None:
    schema = trial_table.infer(TEXT, **NAMED, treated=["mail", "call"])
    assert schema.arms == ("none", "mail", "call")
    assert trial_table.table_of(schema, TEXT).arm.tolist() == [0, 1, 2, 0]
    for treated in (["mail"], ["mail", "mail", "call"], ["none", "mail", "call"], []):
        with pytest.raises(ValueError, match=r"each of \['call', 'mail'\] once"):
            trial_table.infer(TEXT, **NAMED, treated=treated)


def test_people_of_no_known_arm_are_named() -> None:
    text = TEXT | {"group": ["none", "mail", "call", "NA"]}
    schema = trial_table.infer(text, **NAMED)
    assert schema.arms == ("none", "call", "mail")
    with pytest.raises(ValueError, match="row 4, column group: got 'NA'"):
        trial_table.table_of(schema, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ["height"]}, r"expected \['height'\] too"),
        ({"features": ["age", "age"]}, "expected each column once"),
        ({"features": ["age", "profit"]}, "expected each column once"),
        ({"features": ["group"]}, "expected each column once"),
        ({"features": []}, "one feature and one outcome at least"),
        ({"features": ["age:words"]}, "column age: got 'words', expected one of"),
        ({"outcomes": ["plan"], "features": ["age"]}, "column plan: got 'category'"),
        ({"control": "fax"}, "expected the control 'fax' and another arm"),
        ({"features": ["id"]}, "got 101 different values, expected at most 100"),
        ({"features": ["age"], "arm": "id", "control": "p1"}, "got 101 different"),
        ({"features": ["typo"]}, "column typo: got '12,5' among numbers"),
    ],
)
def test_wrong_columns_are_named(changes: dict, message: str) -> None:
    text = TEXT | {"id": [f"p{i}" for i in range(101)]}
    text |= {"typo": ["1", "2", "12,5", ""]}
    with pytest.raises(ValueError, match=message):
        trial_table.infer(text, **NAMED | changes)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("wealth", "-1", "not negative"),
        ("debt", "inf", "a finite number"),
        ("profit", "", "a finite number"),
        ("group", "", "one of"),
    ],
)
def test_wrong_values_are_named(column: str, value: str, message: str) -> None:
    schema = trial_table.infer(TEXT, **NAMED)
    text = TEXT | {column: [*TEXT[column][:2], value, TEXT[column][3]]}
    with pytest.raises(ValueError, match=f"row 3, column {column}.*{message}"):
        trial_table.table_of(schema, text)


@pytest.mark.parametrize("size", [1, 2, 3, 9, None])
def test_blocks_are_the_file(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "given.csv"
    path.write_text("a,b\n1,x\n\n2,y\n3,z\n")
    found = list(trial_table.blocks(path, size))
    assert [b for b, _ in found] == list(range(0, 3, size or 3))
    assert [v for _, columns in found for v in columns["b"]] == ["x", "y", "z"]
    path.write_text("a,b\n1,x\n2\n")
    with pytest.raises(ValueError, match="row 2: got 1 values, expected 2"):
        list(trial_table.blocks(path, size))
