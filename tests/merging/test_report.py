"""The interference analysis: its numbers, its words, its files."""

import json

import numpy as np
import pytest

from multitask_jax import merging, tree
from multitask_jax.merging import interference
from tests.merging.common import make_models, save

pytestmark = pytest.mark.usefixtures("figures")


def merge_with_report(folder, method, base, models, names=None, **kwargs):
    base_path = save(folder / "base", base)
    names = names or [f"m{t}" for t in range(len(models))]
    paths = [folder / n for n in names]
    for path, m in zip(paths, models, strict=True):
        if not path.exists():
            save(path, m)
    result = merging.merge_checkpoints(
        method, base_path, paths, folder / "out", progress=False, **kwargs
    )
    report = json.loads((folder / "out" / "merge_report.json").read_text())
    return result, report


def flat(params):
    return np.concatenate(
        [np.asarray(x, np.float64).reshape(-1) for x in tree.flatten(params).values()]
    )


def test_numbers_of_a_trimming_merge_are_exact(tmp_path):
    base, models = make_models(3)
    _, report = merge_with_report(tmp_path, merging.ties(density=0.3), base, models)
    assert not report["sampled"]
    total = report["total"]
    theta = flat(base)
    taus = [(flat(m).astype(np.float32) - theta.astype(np.float32)) for m in models]
    kept = []
    for tau in taus:
        k = int(len(tau) * 0.3) + 1
        threshold = np.sort(np.abs(tau))[len(tau) - k]
        kept.append(np.where(np.abs(tau) >= threshold, tau, 0).astype(np.float64))
    taus = [t.astype(np.float64) for t in taus]
    norms = [np.linalg.norm(t) for t in taus]
    np.testing.assert_allclose(total["norms"], norms, rtol=1e-5)
    np.testing.assert_allclose(
        total["relative_norms"], norms / np.linalg.norm(theta), rtol=1e-5
    )
    cosines = [
        [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in taus] for a in taus
    ]
    np.testing.assert_allclose(total["cosines"], cosines, atol=1e-5)
    redundant = [1 - np.mean(k != 0) for k in kept]
    np.testing.assert_allclose(total["redundant"], redundant, atol=1e-7)
    mass = [1 - k @ k / (t @ t) for k, t in zip(kept, taus, strict=True)]
    np.testing.assert_allclose(total["trimmed_mass"], mass, atol=1e-5)
    signs = np.sign(kept)
    contested = np.sum(signs != 0, axis=0) >= 2
    both = np.any(signs > 0, axis=0) & np.any(signs < 0, axis=0)
    rate = np.sum(both) / np.sum(contested)
    np.testing.assert_allclose(total["conflict_rate"], rate, atol=1e-7)
    angle = [
        (theta + t) @ theta / np.linalg.norm(theta + t) / np.linalg.norm(theta)
        for t in taus
    ]
    np.testing.assert_allclose(total["base_cosines"], angle, atol=1e-5)
    # In memory: the same numbers.
    memory, depths = merging.analyse(base, models, density=0.3)
    assert list(depths) == ["block 0", "block 1", "block 2", "outside blocks"]
    assert list(report["depths"]) == list(depths)
    np.testing.assert_allclose(memory.redundant, total["redundant"], atol=1e-7)
    np.testing.assert_allclose(
        depths["block 1"].conflict_rate,
        report["depths"]["block 1"]["conflict_rate"],
        atol=1e-7,
    )


def test_without_trimming_shares_are_a_labelled_sample(tmp_path):
    base, models = make_models(2)
    _, report = merge_with_report(tmp_path, merging.task_arithmetic(), base, models)
    assert report["sampled"]
    text = (tmp_path / "out" / "merge_report.md").read_text()
    assert "*estimated from a sample*, as if trimmed to density 0.2" in text
    memory, _ = merging.analyse(base, models, density=0.2)
    # This model is small enough for the sample to be all of it.
    np.testing.assert_allclose(
        report["total"]["redundant"], memory.redundant, atol=1e-4
    )
    np.testing.assert_allclose(
        report["total"]["conflict_rate"], memory.conflict_rate, atol=1e-3
    )
    for name in ("merge_report_depth.png", "merge_report_cosines.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_sample_of_a_larger_model_is_near_the_truth(tmp_path, monkeypatch):
    from multitask_jax.merging import streaming

    monkeypatch.setattr(streaming, "_SMALL", 1 << 12)
    monkeypatch.setattr(streaming, "_SLICES", 512)
    monkeypatch.setattr(streaming, "_SLICE", 16)
    base, models = make_models(2)
    _, report = merge_with_report(tmp_path, merging.task_arithmetic(), base, models)
    memory, _ = merging.analyse(base, models, density=0.2)
    got = report["total"]
    np.testing.assert_allclose(got["trimmed_mass"], memory.trimmed_mass, atol=0.05)
    np.testing.assert_allclose(got["conflict_rate"], memory.conflict_rate, atol=0.08)


def test_words_for_what_looks_wrong(tmp_path):
    rng = np.random.default_rng(0)
    base = {"layers.0.mlp.w": rng.standard_normal((64, 64)).astype(np.float32)}

    def near(size):
        noise = rng.standard_normal((64, 64)).astype(np.float32)
        return {k: v + np.float32(size) * noise for k, v in base.items()}

    def words(names, *models):
        folder = tmp_path / names.replace(",", "-")
        result, report = merge_with_report(
            folder, merging.linear(), base, models, names.split(",")
        )
        assert set(report["warnings"]) <= set(result.notes)
        return "\n".join(report["warnings"])

    fine = near(0.01)
    assert words("a,b", fine, near(0.01)) == ""
    same_as_base = words("a,copy", fine, base)
    assert "copy equals the base" in same_as_base
    stranger = {k: rng.standard_normal(v.shape).astype("f4") for k, v in base.items()}
    assert "stranger and the base look unrelated" in words("a,stranger", fine, stranger)
    assert "no shared base?" in words("b,stranger", fine, stranger)
    twice = words("a,a,b", fine, fine, near(0.01))
    assert "is given more than once" in twice
    assert "a and twin make the same changes" in words("a,twin", fine, fine)
    large = words("a,b,large", near(0.01), near(0.01), near(0.1))
    assert "large's task vector is out of line" in large
    assert "dominates" in large
    heavy = words("x,y", near(0.5), near(0.5))
    assert "Heavy interference" in heavy
    undo = {k: 2 * base[k] - v for k, v in fine.items()}
    assert "a and undo undo each other" in words("a,undo", fine, undo)


def test_sums_over_parts_add_up():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(30)
    deltas = [rng.standard_normal(30) for _ in range(3)]
    whole = interference.leaf_statistics(base, deltas, [0.5, 0.6, 0.7])
    parts = [
        interference.leaf_statistics(base[s], [d[s] for d in deltas], [0.5, 0.6, 0.7])
        for s in (slice(0, 11), slice(11, 30))
    ]
    together = interference.add(parts)
    for field in (
        "gram",
        "kept",
        "mass",
        "kept_mass",
        "contested",
        "conflicts",
        "size",
    ):
        np.testing.assert_allclose(getattr(together, field), getattr(whole, field))


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_textgenrnn_is_warned_of(shared, tmp_path, method):
    """Fine-tunes that every method merges badly: the report must say so."""
    folder = shared / "checkpoints" / "textgenrnn"
    models = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "base")
    result = merging.merge_checkpoints(
        merging.METHODS[method](),
        folder / "base",
        models,
        tmp_path / "out",
        progress=False,
    )
    text = (tmp_path / "out" / "merge_report.md").read_text()
    assert any(n.startswith("Heavy interference") for n in result.notes)
    assert "**Heavy interference" in text
    for m in models:
        assert m.name in text
