import re
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from experiments import mtmt_figures, mtmt_policy, mtmt_report
from multitask_jax import evaluation
from multitask_jax.data.uplift import Trial

ONE_TWO = ("one", "two")
PNG = b"\x89PNG\r\n\x1a\n"


def make(people: int = 3000, seed: int = 0) -> Trial:
    """Arm 1 helps those of a high x, arm 2 those of a low one; the second is noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(people, 1)).astype(np.float32)
    arm = rng.integers(3, size=people).astype(np.int32)
    effects = np.zeros((people, 3, 2), np.float32)
    effects[:, 1, 0], effects[:, 2, 0] = x[:, 0], -x[:, 0]
    spend = rng.normal(size=people) + effects[np.arange(people), arm, 0]
    visit = rng.random(people) < 0.3
    return Trial(
        x,
        arm,
        np.stack([spend, visit], axis=1).astype(np.float32),
        ("x",),
        ("none", *ONE_TWO),
        ("spend", "visit"),
        (False, True),
        {"side": np.where(x[:, 0] > 0, "right", "left")},
        effects,
    )


@pytest.fixture(scope="module")
def trial() -> Trial:
    return make()


def lucky(trial: Trial) -> np.ndarray:
    """Far off with one seed, right with the other: seeds tell nothing."""
    return trial.effects[None] * np.float32([3, 1])[:, None, None, None]


@pytest.fixture(scope="module")
def predictions(trial: Trial) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(2, *trial.effects.shape)).astype(np.float32)
    return {
        "S-learner": noise,
        "MTMT": trial.effects[None] + np.float32([0.01, 0.02])[:, None, None, None],
        "GBM S-learner": trial.effects[None] + noise,
        "wrong": -trial.effects[None] * np.float32([1, 0.9])[:, None, None, None],
        "by luck": lucky(trial),
    }


def write(workdir: Path, trial: Trial, predictions: dict, **given: object) -> str:
    kwargs = {"policy_outcome": "spend", "bootstrap": 60, "seed": 0}
    return mtmt_report.write(workdir, trial, predictions, **(kwargs | given))


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The first table below a heading, by its first cell."""
    part = text[text.index(heading) :].split("\n| ", 1)[1].split("\n\n")[0]
    cells = [line[2:-2].split(" | ") for line in part.split("\n")[2:]]
    return {row[0]: row[1:] for row in cells}


def test_report_says_what_the_data_decide(
    tmp_path: Path, trial: Trial, predictions: dict[str, np.ndarray]
) -> None:
    text = write(tmp_path, trial, predictions, notes=["A note."])
    assert (tmp_path / "report.md").read_text() == text
    for name in ("qini.png", "deciles.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert "A note." in text
    assert "*synthetic*" in text
    assert "nan" not in text
    better = re.search(r"Better than S-learner: (.*?)\. Worse: (.*?)\.", text)
    assert better
    for arm in ONE_TWO:
        assert f"MTMT (spend, {arm})" in better[1]
        assert f"wrong (spend, {arm})" in better[2]
    assert "intervals decide, not means" in text
    assert "Choosing by MTMT gains over" in text
    shares = rows(text, "## Who should get what, by MTMT")
    assert shares["side"][0] == "right"  # the last of its rows
    assert shares["side"][2:] == ["0%", "100%", "0%"]
    errors = rows(text, "## Error of individual effects")
    assert errors["MTMT"][0] == "0.0 ± 0.0"  # levels differ, effects do not
    two = 2000 * np.sqrt(np.mean(trial.effects[:, 1, 0] ** 2))
    assert float(errors["wrong"][0].split()[0]) == pytest.approx(0.975 * two, abs=0.1)
    paired = rows(text, "In how many of these")
    assert set(paired) == set(predictions) - {"MTMT"}
    columns = len(errors["MTMT"])
    # Two arms have an effect, on the first outcome.
    assert paired["wrong"] == ["2", "0", str(columns - 2)]
    # Decided if people alone are asked, who are many; with other seeds it may differ.
    assert paired["by luck"] == ["0", "0", str(columns)]
    assert "Student's over seeds, paired by seed (2 of them" in text.replace("\n", " ")


def test_one_seed_decides_no_difference_of_errors(
    tmp_path: Path, trial: Trial, predictions: dict[str, np.ndarray]
) -> None:
    one = {name: predictions[name][:1] for name in ("MTMT", "wrong")}
    text = write(tmp_path, trial, one)
    assert rows(text, "In how many of these")["wrong"][:2] == ["0", "0"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_verdict_on_qini_needs_other_seeds_too(tmp_path: Path, seeds: int) -> None:
    """People are enough to tell networks apart: one of two seeds knows all effects."""
    trial = make(1000)
    noise = np.random.default_rng(1).normal(size=(2, *trial.effects.shape))
    once = np.stack([trial.effects, noise[1]])
    text = write(
        tmp_path, trial, {"S-learner": noise[:seeds], "once right": once[:seeds]}
    )
    part = text[text.index("## Qini less that of S-learner") :]
    assert "Better than S-learner: none. Worse: none." in part
    apart = re.search(
        r"tells of these trained networks and of no method: (.*?)\.", part
    )
    assert apart
    assert all(f"once right (spend, {arm})" in apart[1] for arm in ONE_TWO)
    assert f"seeds, paired by seed ({seeds} of them; one alone decides nothing)" in text
    assert "**" not in part.split("\n## ")[0]


def test_numbers_are_those_of_the_measures(
    tmp_path: Path, trial: Trial, predictions: dict[str, np.ndarray]
) -> None:
    text = write(tmp_path, trial, predictions)
    cells = rows(text, "### spend: two")
    inside = trial.arm != 1
    treated, y = trial.arm[inside] == 2, trial.y[inside, 0]
    each = [
        evaluation.ranking((p[:, 2, 0] - p[:, 0, 0])[inside], y, treated).qini
        for p in predictions["S-learner"]
    ]
    assert cells["S-learner"][0].startswith(f"{1000 * np.mean(each):.1f} [")
    assert len(cells["MTMT"]) == 3
    arms = [float(rows(text, f"### spend: {a}")["MTMT"][0].split()[0]) for a in ONE_TWO]
    mean = float(rows(text, "### Qini, mean of arms")["MTMT"][0].split()[0])
    assert mean == pytest.approx(np.mean(arms), abs=0.11)  # rounded
    visit = rows(text, "### visit: one")
    assert len(visit["MTMT"]) == 4  # with the best order in hindsight
    policy = rows(text, "## Policy")
    best = trial.effects[:, :, 0].max(axis=1).mean()
    single = max(trial.y[trial.arm == a, 0].mean() for a in range(3))
    top = [trial.y[trial.arm == a, 0].mean() for a in range(3)].index(single)
    won = 1000 * (best - trial.effects[:, top, 0].mean())
    assert policy["MTMT"][-1] == f"{won:.1f}"


def test_undecided_policy_is_said_plainly(tmp_path: Path, trial: Trial) -> None:
    nothing = trial._replace(effects=None)
    noise = np.random.default_rng(2).normal(size=(1, 3000, 3, 2))
    top = np.argmax([trial.y[trial.arm == a, 1].mean() for a in range(3)])
    noise[0, 300:, top] += 9  # most people get the best single arm
    text = write(tmp_path, nothing, {"other": noise}, policy_outcome="visit")
    assert "includes 0: these data do not show" in text
    assert "synthetic" not in text
    assert "PEHE" not in text
    assert "## Qini less" not in text  # none of the references is there
    assert "## Who should get what, by other" in text


def test_direction_of_an_outcome() -> None:
    names = ("cost", "-cost", "visit")
    assert mtmt_policy.direction(names, None) == (2, 1)
    assert mtmt_policy.direction(names, "cost") == (0, 1)
    assert mtmt_policy.direction(names, "-cost") == (1, 1)  # of that very name
    assert mtmt_policy.direction(names, "--cost") == (1, -1)
    assert mtmt_policy.direction(names, "-visit") == (2, -1)
    for unknown in ("profit", "-profit", "", "-"):
        with pytest.raises(ValueError, match=f"'{unknown}', expected one of .*'visit'"):
            mtmt_policy.direction(names, unknown)


def test_less_is_better(tmp_path: Path) -> None:
    """As of the outcome with the other sign, but for the outcome's own values."""
    trial = make(1000)
    turn = np.float32([-1, 1])
    other = trial._replace(y=trial.y * turn, effects=trial.effects * turn)
    p = trial.effects[None] + np.float32([0.0, 0.3])[:, None, None, None]
    more = write(tmp_path, trial, {"MTMT": p}, bootstrap=20)
    less = write(
        tmp_path, other, {"MTMT": p * turn}, policy_outcome="-spend", bootstrap=20
    )
    assert "## Policy: each person's best arm for spend (less is better)" in less
    assert "Shares of people by their best arm for spend (less is better)" in less
    assert "less is better" not in more
    assert "A gain is how much less there is." in less
    verdict = r"Choosing by MTMT gains over (\w+) for everyone: .*"
    assert re.search(verdict, less)[0] == re.search(verdict, more)[0]
    a, b = (rows(text, "## Policy")["MTMT"] for text in (more, less))
    assert a[:3] == b[:3]  # shares of arms
    assert a[5:] == b[5:]  # gains
    assert float(a[3].split()[0]) == -float(b[3].split()[0])
    of_segments = [text[text.index("| segment") :] for text in (more, less)]
    assert of_segments[0] == of_segments[1]
    top = trial.arms.index(re.search(verdict, less)[1])
    same = np.zeros_like(p) - np.eye(p.shape[2], dtype=np.float32)[top, :, None]
    none = write(tmp_path, other, {"MTMT": same}, policy_outcome="-spend", bootstrap=20)
    assert rows(none, "## Policy")["MTMT"][5:] == [*["0.00 [0.00, 0.00]"] * 2, "0.0"]


def test_people_are_told_apart_by_numbers_where_there_is_nothing_else() -> None:
    trial = make(1000)
    only = trial._replace(segments={})
    table = rows("## \n" + mtmt_policy.segments(only, trial.effects, "MTMT", 0), "##")
    assert table["x"] == ["4th quarter", "250", "0%", "100%", "0%"]  # its last row
    noise = np.random.default_rng(0).normal(size=(1000, 9))
    many = only._replace(
        x=np.concatenate([noise, trial.x, trial.x > 0], axis=1),
        features=(*map(str, range(9)), "x", "flag"),
    )
    text = mtmt_policy.segments(many, trial.effects, "MTMT", 0)
    assert "Of 10 numbers these 5 have quarters that differ most" in text
    assert text.index("| x | 1st quarter (lowest) | 250 | 0% | 0% | 100% |")
    assert text.count("quarter |") == 5 * 3  # the lowest's name is longer
    assert "| flag |" not in text
    nothing = only._replace(x=np.zeros((1000, 1), np.float32))
    text = mtmt_policy.segments(nothing, trial.effects, "MTMT", 0)
    assert "No category, flag or number that varies" in text
    assert "|" not in text


def test_equal_predictions_leave_tenths_without_people(tmp_path: Path) -> None:
    trial = make(600)
    flat = np.zeros((1, *trial.effects.shape))
    text = write(tmp_path, trial, {"MTMT": flat}, bootstrap=5)
    assert rows(text, "### Tenths by effect on spend")["1"] == ["nobody", "unknown"] * 2
    assert "nan" not in text


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_of_the_bootstrap_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: bool
) -> None:
    bars = []

    def bar(**kwargs: object) -> tqdm:
        bars.append(kwargs["disable"])
        return tqdm(**(kwargs | {"disable": True}))

    monkeypatch.setattr(mtmt_report, "tqdm", bar)
    trial = make(200)
    p = {"MTMT": trial.effects[None]}
    write(tmp_path, trial, p, bootstrap=2, progress=progress)
    assert bars == [None if progress else True]  # None: only on a terminal


def test_same_seed_same_report(
    tmp_path: Path, trial: Trial, predictions: dict[str, np.ndarray]
) -> None:
    few = {name: predictions[name] for name in ("MTMT", "S-learner")}
    a = write(tmp_path / "a", trial, few)
    assert a == write(tmp_path / "b", trial, few)
    assert a != write(tmp_path / "c", trial, few, seed=1)


def test_figure_highlights_few(
    trial: Trial, predictions: dict[str, np.ndarray]
) -> None:
    means = {name: p.mean(axis=0) for name, p in predictions.items()}
    figure = mtmt_figures.qini(trial, means, ("MTMT", "S-learner"))
    assert len(figure.axes) == 4
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert sorted(labels) == ["MTMT", "S-learner", "other models", "random order"]
    bars = mtmt_figures.deciles(trial, means["MTMT"], "MTMT").axes[0].patches
    c = mtmt_policy.calibration_of(trial, means["MTMT"], 1, 0)
    np.testing.assert_allclose([b.get_height() for b in bars], 1000 * c.observed)


@pytest.mark.parametrize("outcomes", [1, 2])
def test_legends_are_within_the_figure(outcomes: int) -> None:
    trial = make(300)
    few = trial._replace(
        arm=np.minimum(trial.arm, 1),
        y=trial.y[:, :outcomes],
        arms=("none", "mail"),
        outcomes=trial.outcomes[:outcomes],
    )
    p = trial.effects[:, :2, :outcomes]
    names = ("MTMT", "GBM S-learner", "S-learner", "T-learner")
    for figure in (
        mtmt_figures.qini(few, dict.fromkeys(names, p), names[:3]),
        mtmt_figures.deciles(few, p, "interaction (EFIN-like)"),
    ):
        figure.draw_without_rendering()
        box, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
        assert box.y0 >= figure.axes[0].get_window_extent().y1


def test_errors(tmp_path: Path, trial: Trial) -> None:
    good = np.zeros((1, 3000, 3, 2))
    with pytest.raises(ValueError, match="policy_outcome='profit'"):
        write(tmp_path, trial, {"MTMT": good}, policy_outcome="profit")
    with pytest.raises(ValueError, match="no predictions"):
        write(tmp_path, trial, {})
    with pytest.raises(ValueError, match=r"MTMT: got \(3000, 3, 2\)"):
        write(tmp_path, trial, {"MTMT": good[0]})
    with pytest.raises(ValueError, match="18000 values that are not finite"):
        write(tmp_path, trial, {"MTMT": good * np.nan})
    assert not (tmp_path / "report.md").exists()


def test_models_of_different_folds_are_not_compared() -> None:
    """No effect differs, and each fold is scored by the others' effect: Qini is 0.

    Ranked all together, people of the fold with the larger effect come last.
    """
    rng = np.random.default_rng(0)
    n, seeds = 4000, 20
    together, apart = [], []
    for _ in range(seeds):
        trial = Trial(
            np.zeros((n, 1), np.float32),
            rng.integers(0, 2, n),
            rng.normal(size=(n, 1)).astype(np.float32),
            ("x",),
            ("none", "mail"),
            ("spend",),
            (False,),
            {},
        )
        folds = np.arange(n) % 5
        p = np.zeros((1, n, 2, 1), np.float32)
        for k in range(5):
            rest = folds != k
            y, arm = trial.y[rest, 0], trial.arm[rest]
            effect = y[arm == 1].mean() - y[arm == 0].mean()
            p[0, ~rest, 1, 0] = effect + 1e-3 * rng.normal(size=(~rest).sum())
        once = np.ones((1, n), np.uint8)
        ranked = mtmt_report.within_folds(p, folds[None])
        for found, x in ((together, p), (apart, ranked)):
            measured, _ = mtmt_report.measure(trial, {"one": x}, once)
            found.append(measured["one"].point[0, 0, 0])
    error = np.std(apart, ddof=1) / np.sqrt(seeds)
    assert abs(np.mean(apart)) < 3 * error
    assert np.mean(together) < np.mean(apart) - 3 * error


def test_equal_predictions_have_no_order_though_folds_differ_in_size():
    folds = np.array([[0, 0, 0, 1, 1, 1, 1]])
    prediction = np.ones((1, 7, 2, 1)) * np.array([1.0, 3.0])[None, None, :, None]
    ranked = mtmt_report.within_folds(prediction, folds)
    assert len(np.unique(ranked[0, :, 1, 0])) == 1
