import numpy as np
import pytest

from multitask_jax import evaluation
from multitask_jax.evaluation import uplift

# Two pairs: the first person of each is treated. Treatment helps the first pair only.
Y = np.array([1.0, 0.0, 0.0, 0.0])
TREATED = np.array([True, False, True, False])
PERFECT = np.array([2.0, 2.0, 1.0, 1.0])


# What scikit-uplift finds of `example`: people, seed and ties of it, then
# qini_auc_score, uplift_auc_score and uplift_at_k (scikit-learn 1.9.1, NumPy 2.4.6).
# In a clone of this project, where it is installed:
#
#   pip install scikit-uplift==0.5.1 pandas
#   python -W ignore -c "
#   from sklift.metrics import qini_auc_score, uplift_at_k, uplift_auc_score
#   from tests.evaluation.test_uplift import SCIKIT_UPLIFT, example
#   for case in SCIKIT_UPLIFT:
#       score, y, treated = example(*case)
#       args = y, score, treated.astype(int)
#       print(case, float(qini_auc_score(*args)), float(uplift_auc_score(*args)),
#             float(uplift_at_k(*args, strategy='overall', k=0.3)))"
SCIKIT_UPLIFT = {
    (400, 0, True): (0.1889221068855634, 0.14030788061515292, 0.265993265993266),
    (300, 1, True): (0.14940156055788728, 0.1274930946553162, 0.2172191984166254),
    (300, 2, False): (0.14427948694281792, 0.10199507109160781, 0.26669965363681347),
    (1000, 3, False): (0.07484751306963278, 0.05724653688472867, 0.13414905450500558),
}


def example(people: int, seed: int = 0, ties: bool = True) -> tuple[np.ndarray, ...]:
    """Scores, binary outcomes, treated."""
    rng = np.random.default_rng(seed)
    treated = rng.random(people) < 0.5
    score = rng.normal(size=people)
    score = np.round(score, 1) if ties else score
    y = (rng.random(people) < 0.2 + 0.15 * treated * (score > 0)).astype(int)
    return score, y, treated


def test_perfect_order_of_four_by_hand() -> None:
    """The curve is (0, 0), (1/2, 1/2), (1, 1/2): the first half has all of it.

    Qini: 3/8 less the triangle 1/4. The uplift curve is the same but for its height.
    """
    found = evaluation.ranking(PERFECT, Y, TREATED)
    assert found.qini == pytest.approx(1 / 8)
    assert found.auuc == pytest.approx(3 / 8)
    assert found.top == pytest.approx(1)
    curve = evaluation.qini_curve(PERFECT, Y, TREATED)
    assert curve.share.tolist() == [0, 0.5, 1]
    assert curve.gain.tolist() == [0, 0.5, 0.5]
    worst = evaluation.ranking(-PERFECT, Y, TREATED)
    assert worst.qini == pytest.approx(-1 / 8)
    assert worst.top == pytest.approx(0)
    none = evaluation.ranking(np.zeros(4), Y, TREATED)
    assert none == pytest.approx((0, 1 / 4, 1 / 2))  # the mean effect is 1/2


@pytest.mark.parametrize(("case", "numbers"), SCIKIT_UPLIFT.items())
def test_equals_scikit_uplift(
    case: tuple[int, int, bool], numbers: tuple[float, ...]
) -> None:
    qini, auuc, top = numbers
    score, y, treated = example(*case)
    best_qini, best_uplift = evaluation.perfect(y, treated)
    found = evaluation.ranking(score, y, treated)
    whole = evaluation.ranking(best_qini, y, treated).qini
    assert found.qini / whole == pytest.approx(qini, rel=1e-12)
    chord = (y[treated].mean() - y[~treated].mean()) / 2
    best = evaluation.ranking(best_uplift, y, treated).auuc - chord
    assert (found.auuc - chord) / best == pytest.approx(auuc, rel=1e-12)
    # A cut within equal scores takes a part of each here, some of them there.
    ties = case[2]
    assert found.top == pytest.approx(top, **{"abs": 2e-2} if ties else {"rel": 1e-12})


def test_curve_has_the_area_of_qini() -> None:
    score, y, treated = example(300, seed=3)
    curve = evaluation.qini_curve(score, y, treated)
    area = np.trapezoid(curve.gain - curve.share * curve.gain[-1], curve.share)
    assert area == pytest.approx(evaluation.ranking(score, y, treated).qini)


@pytest.mark.parametrize("ties", [True, False])
def test_counts_are_as_people_written_out(ties: bool) -> None:
    score, y, treated = example(200, seed=4)
    if not ties:
        score = np.random.default_rng(4).normal(size=200)
    counts = evaluation.resample(200, 5, seed=0)
    assert counts.sum(axis=1).tolist() == [200] * 5
    found = evaluation.ranking(score, y, treated, counts)
    for i, count in enumerate(counts):
        rows = np.repeat(np.arange(200), count)
        expected = evaluation.ranking(score[rows], y[rows], treated[rows])
        np.testing.assert_allclose([x[i] for x in found], expected, rtol=1e-10)


def test_scale_of_outcome_and_score() -> None:
    score, y, treated = example(200, seed=5)
    a = evaluation.ranking(score, y, treated)
    b = evaluation.ranking(7 * score - 3, 10.0 * y, treated)
    np.testing.assert_allclose(b, 10 * np.array(a))


def test_random_order_is_worth_nothing() -> None:
    rng = np.random.default_rng(6)
    _, y, treated = example(4000, seed=6)
    counts = evaluation.resample(4000, 200, seed=1)
    draws = evaluation.ranking(rng.normal(size=4000), y, treated, counts)
    low, high = evaluation.interval(draws.qini)
    assert low < 0 < high
    assert high - low < 0.05


def test_interval_covers() -> None:
    """Qini of a known effect: 95% intervals hold the true value about that often."""
    rng = np.random.default_rng(7)

    def world(people: int) -> tuple[np.ndarray, ...]:
        x = rng.uniform(size=people)
        treated = rng.random(people) < 0.5
        return x, rng.normal(size=people) + x * treated, treated

    # Effect x, best order: gain of the first share s is s - s^2/2, of the chord s/2.
    true = 1 / 12
    assert evaluation.ranking(*world(400_000)).qini == pytest.approx(true, abs=3e-3)
    inside = 0
    for i in range(120):
        people = world(600)
        counts = evaluation.resample(600, 200, seed=i)
        low, high = evaluation.interval(evaluation.ranking(*people, counts).qini)
        inside += low <= true <= high
    assert 0.88 <= inside / 120 <= 1


def test_paired_difference_is_narrower() -> None:
    score, y, treated = example(2000, seed=8)
    near = score + 0.1 * np.random.default_rng(0).normal(size=2000)
    counts = evaluation.resample(2000, 200, seed=0)
    a = evaluation.ranking(score, y, treated, counts).qini
    b = evaluation.ranking(near, y, treated, counts).qini
    assert (a - b).std() < 0.5 * a.std()


def test_calibration_by_hand() -> None:
    found = evaluation.calibration(
        np.repeat([0.2, 0.1], 4),
        np.array([1.0, 3, 0, 0, 2, 2, 1, 1]),
        np.array([True, True, False, False] * 2),
        groups=2,
    )
    assert found.predicted == pytest.approx([0.1, 0.2])
    assert found.observed == pytest.approx([1, 2])
    # Variances over 2 people each, of all treated (2/3) or untreated (1/3) where 0.
    assert found.error**2 == pytest.approx([(2 / 3 + 1 / 3) / 2, (2 + 1 / 3) / 2])
    assert found.people.tolist() == [4, 4]
    assert found.distance == pytest.approx((0.9 + 1.8) / 2)


def test_calibration_does_not_depend_on_the_order_of_rows() -> None:
    """Equal predictions, which most tenths' ends lie within, are in one tenth."""
    score, y, treated = example(500, seed=2)
    score = np.round(score)
    order = np.random.default_rng(0).permutation(500)
    found = evaluation.calibration(score, y, treated)
    again = evaluation.calibration(score[order], y[order], treated[order])
    np.testing.assert_allclose(again, found, rtol=1e-12)
    there = found.people > 0
    assert {-1, 0, 1} <= set(found.predicted[there])  # whole, and by themselves
    assert np.isnan(found.predicted[~there]).all()
    assert found.people.sum() == 500
    assert np.isfinite(found.distance)


def test_tenths_are_equal_without_ties() -> None:
    score, y, treated = example(503, seed=2, ties=False)
    found = evaluation.calibration(score, y, treated)
    assert set(found.people) == {50, 51}
    assert (np.diff(found.predicted) > 0).all()
    constant = evaluation.calibration(np.zeros(503), y, treated)
    assert np.flatnonzero(constant.people).tolist() == [5]


def test_a_rare_outcome_that_nobody_has_is_not_known_for_certain() -> None:
    treated = np.arange(80) % 2 == 0
    outcome = np.zeros(80)
    outcome[0] = 1  # of the second group, the higher one
    uplift = np.repeat([0.2, 0.1], 40)
    found = evaluation.calibration(uplift, outcome, treated, groups=2)
    assert found.observed == pytest.approx([0, 1 / 20])
    # Shares of 1 / 22 and 2 / 22 (Agresti and Caffo).
    none, one = 21 / 22**3, 2 * 20 / 22**3
    assert found.error**2 == pytest.approx([2 * none, none + one])


def test_a_group_without_an_effect_is_left_out_of_the_distance() -> None:
    found = evaluation.calibration(
        np.repeat([0.2, 0.1], 4),
        np.array([1.0, 3, 0, 0, 2, 2, 1, 1]),
        np.array([True, True, False, False, True, True, True, False]),
        groups=2,
    )
    assert np.isnan(found.observed).tolist() == [True, False]
    assert found.distance == pytest.approx(1.8)


def test_calibration_without_enough_people_is_nan() -> None:
    found = evaluation.calibration(PERFECT, Y, TREATED, groups=4)
    assert np.isnan(found.observed).all()


def test_pehe_by_hand() -> None:
    true = np.zeros((2, 3, 1))
    true[:, 1, 0] = 1, 2
    predicted = true + 5.0  # levels do not count, effects do
    predicted[0, 2, 0] += 4
    np.testing.assert_allclose(evaluation.pehe(predicted, true), [[0], [np.sqrt(8)]])
    with pytest.raises(ValueError, match="expected both"):
        evaluation.pehe(predicted[:, :2], true)


def test_policy_value_by_hand() -> None:
    arm, y = np.array([0, 0, 1, 1]), np.array([1.0, 2, 3, 5])
    chosen = np.array([0, 1, 1, 1])
    shares = np.array([0.5, 0.5])
    found = evaluation.policy_value(chosen, arm, y, shares)
    assert found.ips == pytest.approx((1 + 3 + 5) * 2 / 4)
    assert found.normalised == pytest.approx(3)
    counts = np.array([[1, 1, 1, 1], [0, 4, 0, 0], [4, 0, 0, 0]], np.uint8)
    draws = evaluation.policy_value(chosen, arm, y, shares, counts)
    assert draws.ips == pytest.approx([4.5, 0, 2])
    assert draws.normalised == pytest.approx([3, np.nan, 1], nan_ok=True)
    everyone = evaluation.policy_value(np.ones(4, int), arm, y, shares)
    assert everyone.ips == everyone.normalised == pytest.approx(4)
    with pytest.raises(ValueError, match="nobody"):
        evaluation.policy_value(1 - arm, arm, y, shares)
    with pytest.raises(ValueError, match="each"):
        evaluation.policy_value(chosen[:2], arm, y, shares)


def test_policy_value_is_unbiased() -> None:
    rng = np.random.default_rng(9)
    effect = rng.normal(size=50_000)
    arm = rng.integers(2, size=50_000)
    y = rng.normal(size=50_000) + arm * effect
    chosen = (effect > 0).astype(int)
    counts = evaluation.resample(len(y), 100, seed=0)
    draws = evaluation.policy_value(chosen, arm, y, np.array([0.5, 0.5]), counts)
    true = np.maximum(effect, 0).mean()
    for values in draws:
        low, high = evaluation.interval(values, level=0.999)
        assert low < true < high


def test_interval_leaves_out_what_has_no_value() -> None:
    assert evaluation.interval(np.array([np.nan, 1.0, 1.0])) == (1, 1)
    assert np.isnan(evaluation.interval(np.array([np.nan]))).all()
    nobody = np.array([[2, 0, 2, 0]], np.uint8)  # no control at all
    assert np.isnan(evaluation.ranking(PERFECT, Y, TREATED, nobody)).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="some of both groups"):
        evaluation.ranking(PERFECT, Y, np.ones(4, bool))
    with pytest.raises(ValueError, match="expected bool"):
        evaluation.ranking(PERFECT, Y, TREATED.astype(int))
    with pytest.raises(ValueError, match=r"expected \[N\] each"):
        evaluation.ranking(PERFECT[:3], Y, TREATED)
    with pytest.raises(ValueError, match="1 values of uplift that are not finite"):
        evaluation.ranking(np.array([1, 2, 3, np.nan]), Y, TREATED)
    with pytest.raises(ValueError, match=r"expected \[R, 4\]"):
        evaluation.ranking(PERFECT, Y, TREATED, np.ones((2, 3), np.uint8))
    with pytest.raises(ValueError, match="top=1"):
        evaluation.ranking(PERFECT, Y, TREATED, top=1)
    with pytest.raises(ValueError, match="no best curve"):
        evaluation.perfect(np.array([0.5, 1]), np.array([True, False]))
    with pytest.raises(ValueError, match="at least 1"):
        evaluation.resample(0, 1, seed=0)
    with pytest.raises(ValueError, match="groups"):
        evaluation.calibration(PERFECT, Y, TREATED, groups=5)
    assert uplift.TOP == 0.3
