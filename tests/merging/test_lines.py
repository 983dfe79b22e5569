"""LiNeS: the norm rule, the choice of alpha for one task, rewarded soups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from multitask_jax import merging
from multitask_jax.merging import lines_selection
from tests.merging.common import merged, save, stream
from tests.merging.test_golden import cases

GOLDEN = {
    "ties_mean": lambda **k: merging.ties(**k),
    "ties_sum": lambda **k: merging.ties(combine="sum", **k),
    "task_arithmetic": lambda **k: merging.task_arithmetic(**k),
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_norm_rule_as_the_reference(shared, tmp_path, name):
    f = cases(shared, "lines_alpha")[name]
    base = f["base"]
    models = [{k: v[t] for k, v in f["models"].items()} for t in range(3)]
    for scale in (1.0, 1.7):  # lambda comes after: alpha does not depend on it
        method = merging.with_lines(
            GOLDEN[name](scale=scale), alpha="norm", beta=f["params"]["beta"]
        )
        merge = jax.jit(lambda b, m, method=method: merging.merge(method, b, m))
        streamed = stream(tmp_path / str(scale), method, base, models)
        for out in (merge(base, models), streamed):
            for k, delta in f["expected_delta"].items():
                want = base[k] + scale * delta
                np.testing.assert_allclose(out[k], want, atol=1e-6, rtol=1e-5)
    total = {k: np.sum(v, 0) - 3 * base[k] for k, v in f["models"].items()}
    alpha = merging.norm_rule(total, f["expected_multi_task_delta"], 3)
    np.testing.assert_allclose(alpha, f["expected_alpha"], rtol=1e-5)
    # The first block's factor is alpha itself.
    kernel = "layers.0.kernel"
    np.testing.assert_allclose(
        f["expected_delta"][kernel],
        f["expected_alpha"] * f["expected_multi_task_delta"][kernel],
        rtol=1e-5,
        atol=1e-7,
    )


def blocks(*values):
    """A model of a block a value, and an embedding of the first."""
    layers = {f"layers_{i}": {"w": jnp.full(2, v)} for i, v in enumerate(values)}
    return {"embed": jnp.full(2, values[0]), **layers}


def test_norm_rule_by_hand():
    base = blocks(1.0, 1.0, 1.0)
    models = [blocks(2.0, 1.0, 3.0), blocks(1.0, 5.0, 1.0)]
    # |sum tau| = 2 (1 + 1 + 4 + 2) = 16 with the embedding; the same for their mean is
    # 8, so alpha = 16 / 8 / 2 = 1 for linear, and 1 / 2 for the sum, at any scale.
    for method, alpha, factor in (
        (merging.linear(), 1.0, 0.5),
        (merging.task_arithmetic(), 0.5, 1.0),
        (merging.task_arithmetic(scale=2.0), 0.5, 2.0),
    ):
        out = merged(merging.with_lines(method, alpha="norm", beta=0.4), base, models)
        for i, tau in enumerate((1.0, 4.0, 2.0)):
            want = 1 + (alpha + 0.4 * i / 2) * factor * tau
            np.testing.assert_allclose(out[f"layers_{i}"]["w"], want, rtol=1e-6)
        np.testing.assert_allclose(out["embed"], 1 + alpha * factor, rtol=1e-6)
    # Weights choose between models; the rule's sum does not know them.
    out = merged(
        merging.with_lines(merging.task_arithmetic(), alpha="norm", beta=0.0),
        base,
        models,
        weights=[1.0, 0.0],
    )
    np.testing.assert_allclose(out["layers_0"]["w"], 1 + 16 / 8 / 2, rtol=1e-6)


def test_norm_rule_where_nothing_changed():
    base = blocks(1.0, 2.0)
    method = merging.with_lines(merging.ties(), alpha="norm", beta=1.0)
    out = merged(method, base, [base, base])
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), out, base))


def test_norm_rule_of_whole_tensor_methods(tmp_path):
    """What a method must see at once is still seen at once, streamed too."""
    rng = np.random.default_rng(0)
    base, *models = (
        {f"layers.{i}.w": rng.standard_normal((6, 5)).astype("f") for i in range(2)}
        for _ in range(3)
    )
    inner = merging.nuslerp(flatten=False, row_wise=True)
    method = merging.with_lines(inner, alpha="norm", beta=0.3)
    assert method.transforms[0].needs == "tensor"
    want = merged(method, base, models)
    got = stream(tmp_path, method, base, models)
    for k, v in want.items():
        np.testing.assert_allclose(got[k], v, atol=1e-6)


def test_the_norm_rule_tells_its_alpha(tmp_path):
    """|sum tau| = 1 + 2, twice |tau| = mean: alpha = 2 / T = 1."""
    base = {"layers.0.w": np.zeros(2, "f"), "layers.1.w": np.zeros(2, "f")}
    models = [{k: v + np.float32(x) for k, v in base.items()} for x in (1, 2)]
    paths = [save(tmp_path / f"{t}", m) for t, m in enumerate((base, *models))]
    method = merging.with_lines(
        merging.task_arithmetic(normalise=True), alpha="norm", beta=0.5
    )
    result = merging.merge_checkpoints(
        method, paths[0], paths[1:], tmp_path / "out", progress=False
    )
    assert "LiNeS: alpha = 1 by the norm rule." in result.notes
    report = (tmp_path / "out" / "merge_report.md").read_text()
    assert "alpha = 1 by the norm rule" in report


def test_other_words_than_norm():
    with pytest.raises(ValueError, match="alpha: got 'auto', expected a number or"):
        merging.with_lines(merging.ties(), alpha="auto", beta=1.0)


def test_encoder_and_decoder_have_a_depth_each():
    paths = [
        "shared.weight",
        *(f"encoder.block.{i}.layer.0.SelfAttention.k.weight" for i in range(2)),
        *(f"decoder.block.{i}.layer.1.EncDecAttention.k.weight" for i in range(3)),
    ]
    base = {p: np.zeros(2, np.float32) for p in paths}
    model = {p: np.ones(2, np.float32) for p in paths}
    for alpha in (0.2, "norm"):  # of one model the norm rule gives 1
        method = merging.with_lines(merging.task_arithmetic(), alpha=alpha, beta=0.6)
        out = merged(method, base, [model])
        first = 1.0 if alpha == "norm" else alpha
        factors = [float(out[p][0]) for p in paths]
        want = [0, 0, 0.6, 0, 0.3, 0.6]
        np.testing.assert_allclose(factors, np.array(want) + first, rtol=1e-6)


def test_select_alpha_by_hand():
    target, controls = [0.8, 0.9, 1.0], [[0.6, 0.4], [0.6, 0.2], [0.3, 0.2]]
    known = {"fine_tuned": 1.0, "zero_shot": [0.6, 0.4]}
    got = lines_selection.criterion(target, controls, **known)
    np.testing.assert_allclose(got, [2.6, 2.55, 2.5])
    assert merging.select_alpha((0.0, 0.5, 1.0), target, controls, **known) == 0.0
    # Twice the weight of the target: a loss there must buy twice as much elsewhere.
    controls[2] = [0.6, 0.2]
    assert merging.select_alpha((0.0, 0.5, 1.0), target, controls, **known) == 1.0
    # Of equals, the one that moves less.
    same = [1.0] * 3, [[0.6, 0.4]] * 3
    assert merging.select_alpha((0.5, 0.1, 0.9), *same, **known) == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controls": [[0.5], [0.4]]}, r"expected \[A\], \[A, C\], \[C\]"),
        ({"zero_shot": [], "controls": [[], []]}, "no control tasks"),
        ({"zero_shot": [0.5, 0.0]}, r"zero_shot=\[0.5, 0.0\]; expected positive"),
        ({"fine_tuned": float("nan")}, "fine_tuned=nan"),
        ({"target": [0.5, float("nan")]}, "NaN or infinite"),
        ({"alphas": [0.1]}, "alphas for"),
    ],
)
def test_select_alpha_refuses(change, message):
    given = {"alphas": [0.1, 0.2], "target": [0.5, 0.6], "fine_tuned": 1.0}
    given |= {"controls": [[0.5, 0.5], [0.5, 0.5]], "zero_shot": [0.5, 0.5], **change}
    with pytest.raises(ValueError, match=message):
        merging.select_alpha(
            given.pop("alphas"), given.pop("target"), given.pop("controls"), **given
        )


def test_single_task_keeps_the_head_and_spares_the_first_block():
    """The target hangs on the last block, controls on the first: alpha 0 is best."""
    base, model = blocks(1.0, 1.0, 1.0), blocks(2.0, 2.0, 2.0)

    def closeness(layer, value):
        return lambda params: 1 / (1 + jnp.sum((params[layer]["w"] - value) ** 2))

    target, control = closeness("layers_2", 2.0), closeness("layers_0", 1.0)
    found = merging.lines_single_task(base, model, target, [control, control])
    assert found.alpha == 0.0
    assert found.fine_tuned == 1.0
    assert found.controls.shape == (11, 2)
    np.testing.assert_allclose(found.criterion[0], 3.0)
    np.testing.assert_allclose(found.controls[-1], float(control(model)))
    for i in range(3):
        np.testing.assert_allclose(found.params[f"layers_{i}"]["w"], 1 + i / 2)
    # A target that hangs on the first block wants all of the fine-tuning.
    wanted = merging.lines_single_task(
        base, model, closeness("layers_0", 2.0), [closeness("layers_2", 2.0)]
    )
    assert wanted.alpha == 1.0
    np.testing.assert_allclose(wanted.params["layers_0"]["w"], 2.0)
    with pytest.raises(ValueError, match="alphas: got none"):
        merging.lines_single_task(base, model, target, [control], alphas=())


def test_simplex_grid():
    np.testing.assert_array_equal(
        merging.simplex_grid(2, 2), np.float32([[0, 1], [0.5, 0.5], [1, 0]])
    )
    grid = merging.simplex_grid(4, 10)
    assert grid.shape == (286, 4)  # 13 choose 3
    assert len(np.unique(grid, axis=0)) == 286
    assert grid.min() == 0
    np.testing.assert_allclose(grid.sum(1), 1, rtol=1e-6)
    assert merging.simplex_grid(1, 3).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="steps: got 0"):
        merging.simplex_grid(2, 0)


def test_rewarded_soup():
    base, models = blocks(0.0, 0.0), [blocks(1.0, 1.0), blocks(-1.0, 3.0)]
    weights = merging.simplex_grid(2, 4)
    plain = merging.rewarded_soup(base, models, weights)
    scaled = merging.rewarded_soup(base, models, weights, lines=(0.5, 0.5))
    norm = merging.rewarded_soup(base, models, weights, lines=("norm", 0.5))
    for n, (a, b) in enumerate(weights):
        first, last = a - b, a + 3 * b
        np.testing.assert_allclose(plain["layers_0"]["w"][n], first, atol=1e-6)
        np.testing.assert_allclose(scaled["layers_0"]["w"][n], first / 2, atol=1e-6)
        np.testing.assert_allclose(scaled["layers_1"]["w"][n], last, rtol=1e-6)
        one = merged(
            merging.with_lines(merging.task_arithmetic(), alpha="norm", beta=0.5),
            base,
            models,
            weights=(a, b),
        )
        for x, y in zip(jax.tree.leaves(norm), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(x[n], y, atol=1e-6)
    listed = merging.rewarded_soup(base, models, [[0.5, 0.5], [1, 0]])
    np.testing.assert_allclose(listed["layers_1"]["w"], [[2, 2], [1, 1]])
    with pytest.raises(ValueError, match=r"got shape \(2,\), expected \[N, 2\]"):
        merging.rewarded_soup(base, models, [0.5, 0.5])


def test_pareto_front():
    scores = [[0, 3], [1, 2], [1, 1], [2, 2], [3, 0], [3, 0], [2.5, -1]]
    front = merging.pareto_front(scores)
    assert front.tolist() == [True, False, False, True, True, True, False]
    rng = np.random.default_rng(0)
    points = rng.random((50, 3))
    front = merging.pareto_front(points)
    # The best of any positive mix of rewards is on it.
    for mix in rng.dirichlet(np.ones(3), 20):
        assert front[np.argmax(points @ mix)]
    assert merging.pareto_front(np.zeros((0, 2))).shape == (0,)
    with pytest.raises(ValueError, match="NaN in row 1"):
        merging.pareto_front([[0, 1], [np.nan, 1]])
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        merging.pareto_front([0, 1, 2])
