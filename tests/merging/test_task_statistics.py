"""Statistics on disk, in both merges and on the command line; what is refused."""

import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments import merge as script
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import CheckpointError
from multitask_jax.merging import task_statistics
from tests.merging.common import load, save

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def apply(p, x):
    h = jax.nn.relu(x @ p["fc.weight"].T + p["fc.bias"][None])
    return h @ p["head.weight"].T


@pytest.fixture(scope="module")
def trained():
    """Base, two models, and their Fishers and Grams."""
    base = {
        "fc.weight": normal(6, 4),
        "fc.bias": normal(6),
        "head.weight": normal(3, 6),
    }
    models = [jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), base) for _ in "ab"]
    batches = [[normal(16, 4)] for _ in models]
    statistics = {
        "fisher": [
            merging.fisher_diagonal(apply, m, b)
            for m, b in zip(models, batches, strict=True)
        ],
        "gram": [
            merging.gram_matrices(apply, m, b)
            for m, b in zip(models, batches, strict=True)
        ],
    }
    return base, models, statistics


@pytest.fixture
def on_disk(trained, tmp_path):
    """The same as paths: base, models, {kind: files}."""
    base, models, statistics = trained
    paths = [save(tmp_path / name, m) for name, m in zip("AB", models, strict=True)]
    files = {
        kind: [
            merging.save_statistics(p / f"{kind}.safetensors", s, examples=16)
            for p, s in zip(paths, each, strict=True)
        ]
        for kind, each in statistics.items()
    }
    return save(tmp_path / "base", base), paths, files


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_saved_and_loaded(trained, tmp_path, kind):
    statistics = trained[2][kind][0]
    path = merging.save_statistics(tmp_path / "s.safetensors", statistics, examples=16)
    assert os.listdir(tmp_path) == ["s.safetensors"]
    loaded = merging.load_statistics(path)
    assert loaded.keys() == statistics.keys()
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(loaded) == jax.tree.structure(dict(statistics))
    metadata = checkpoints.open(path).metadata
    assert (metadata["statistics"], metadata["examples"]) == (kind, "16")


@pytest.mark.parametrize(
    ("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")]
)
def test_command_line_as_in_memory(trained, on_disk, tmp_path, method, kind):
    base, models, statistics = trained
    base_path, paths, files = on_disk
    want = merging.merge(
        merging.METHODS[method](), base, models, statistics=statistics[kind]
    )
    result = script.run(
        script.Config(
            method=method,
            base=str(base_path),
            models=",".join(map(str, paths)),
            statistics=",".join(map(str, files[kind])),
            output=str(tmp_path / "out"),
            progress=False,
        )
    )
    got = load(tmp_path / "out")
    for k in base:
        np.testing.assert_allclose(got[k], want[k], rtol=2e-5, atol=2e-6)
        average = (models[0][k] + models[1][k]) / 2
        averaged = kind == "gram" and k == "fc.bias"
        assert np.allclose(got[k], average, atol=1e-4) == averaged
    averaged = "No statistics of fc.bias: averaged." in result.notes
    assert averaged == (kind == "gram")
    assert "statistics" in (result.output / "merge_report.md").read_text()


def test_a_model_may_lie_beside_its_statistics(on_disk):
    assert set(checkpoints.open(on_disk[1][0]).tensors) == {
        "fc.weight",
        "fc.bias",
        "head.weight",
    }


def refused(match, method, trained, **kwargs):
    base, models, _ = trained
    with pytest.raises(ValueError, match=match):
        merging.merge(merging.METHODS[method](), base, models, **kwargs)


def test_refused_in_memory(trained):
    _, _, s = trained
    fisher, gram = s["fisher"], s["gram"]
    refused("needs fisher statistics.*fisher_diagonal.*--statistics", "fisher", trained)
    refused("needs gram statistics.*gram_matrices", "regmean", trained)
    refused("takes none", "linear", trained, statistics=fisher)
    refused("1 sets of statistics for 2", "fisher", trained, statistics=fisher[:1])
    refused(
        "model 0: fc.weight: got gram statistics, expected fisher",
        "fisher",
        trained,
        statistics=gram,
    )
    refused("got fisher .* expected gram", "regmean", trained, statistics=fisher)
    refused("that the base lacks", "fisher", trained, statistics=[{"x": normal(3)}] * 2)
    less = {k: v for k, v in fisher[1].items() if k != "fc.bias"}
    refused("'fc.bias'.* one of them", "fisher", trained, statistics=[fisher[0], less])
    wrong = fisher[1] | {"fc.bias": normal(5)}
    refused(
        r"model 1: fc.bias: got shape \(5,\), expected \(6,\)",
        "fisher",
        trained,
        statistics=[fisher[0], wrong],
    )
    turned = {k: merging.Gram(normal(6, 6), (0,)) for k in ("fc.weight", "head.weight")}
    refused(r"expected \(3, 3\)", "regmean", trained, statistics=[turned, turned])
    odd = gram[1] | {"fc.weight": merging.Gram(normal(6, 6), (0,))}
    refused(
        r"fc.weight: axes \(0,\).*\(1,\)", "regmean", trained, statistics=[gram[0], odd]
    )
    outside = {"fc.weight": merging.Gram(normal(4, 4), (2,))}
    refused("do not fit the weight", "regmean", trained, statistics=[outside, outside])


def test_refused_from_disk(on_disk, tmp_path):
    base, models, files = on_disk

    def merge(match, method, statistics):
        with pytest.raises(ValueError, match=match):
            merging.merge_checkpoints(
                merging.METHODS[method](),
                base,
                models,
                tmp_path / "out",
                statistics=statistics,
                progress=False,
            )
        assert not (tmp_path / "out").exists()

    merge("needs gram statistics", "regmean", None)
    merge(r"fisher.safetensors: fc.\w+: got fisher", "regmean", files["fisher"])
    merge("takes none", "ties", files["fisher"])
    merge("a checkpoint, not statistics", "fisher", models)
    merge("no such file", "fisher", [tmp_path / "none.safetensors"] * 2)


def test_refused_to_save(trained, tmp_path):
    fisher, gram = trained[2]["fisher"][0], trained[2]["gram"][0]
    path = merging.save_statistics(tmp_path / "s.safetensors", fisher)
    with pytest.raises(ValueError, match="exists"):
        merging.save_statistics(path, fisher)
    merging.save_statistics(path, gram, overwrite=True)
    assert task_statistics.StatisticsFile(path).metadata["statistics"] == "gram"
    model = save(tmp_path / "model", {"w": normal(3)}) / "model.safetensors"
    before = model.read_bytes()
    with pytest.raises(ValueError, match="exists"):
        merging.save_statistics(model, fisher, overwrite=True)
    assert model.read_bytes() == before
    with pytest.raises(ValueError, match="expected a file name like"):
        merging.save_statistics(tmp_path / "s.npz", fisher)
    mixed = {"a": fisher["fc.bias"], "b": gram["fc.weight"]}
    with pytest.raises(ValueError, match="expected one kind"):
        merging.save_statistics(tmp_path / "t.safetensors", mixed)
    with pytest.raises(ValueError, match="a: the statistic has NaN"):
        merging.save_statistics(tmp_path / "t.safetensors", {"a": np.float32([np.nan])})
    assert not list(tmp_path.glob("*t.safetensors*"))


def test_negative_weights_that_leave_no_solution(on_disk, tmp_path):
    base, models, files = on_disk
    with pytest.raises(ValueError, match=r"\.weight: the merged values are not finite"):
        merging.merge_checkpoints(
            merging.regmean(),
            base,
            models,
            tmp_path / "out",
            weights=(1.0, -5.0),
            statistics=files["gram"],
            progress=False,
        )


def test_nan_in_statistics(on_disk, trained, tmp_path, monkeypatch):
    base, models, files = on_disk
    monkeypatch.setattr(
        task_statistics.np, "isfinite", lambda x: np.full(np.shape(x), 1)
    )
    bad = trained[2]["fisher"][0] | {"fc.bias": np.float32([np.nan] * 6)}
    path = merging.save_statistics(tmp_path / "bad.safetensors", bad)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"bad.safetensors: the statistic of fc.bias"):
        merging.merge_checkpoints(
            merging.fisher(),
            base,
            models,
            tmp_path / "out",
            statistics=[files["fisher"][1], path],
            progress=False,
        )


def write(path, tensors, **metadata):
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    "axes",
    [
        "[true]",
        "[0.0]",
        "[-1]",
        "[0, 0]",
        "[]",
        '"0"',
        "null",
        "[[0]]",
        "[" * 100_000,
    ],
)
def test_damaged_axes(tmp_path, axes):
    path = write(
        tmp_path / "gram.safetensors",
        {"w": np.eye(4, dtype=np.float32)},
        statistics="gram",
        axes=f'{{"w": {{"axes": {axes}, "batch": []}}}}',
    )
    with pytest.raises(CheckpointError, match="damaged: its metadata"):
        merging.load_statistics(path)


@pytest.mark.parametrize(
    "axes", ["{}", "[]", "3", '{"w": {"axes": [0], "batch": [0]}}']
)
def test_axes_of_other_tensors_or_twice(tmp_path, axes):
    path = write(
        tmp_path / "gram.safetensors",
        {"w": np.eye(4, dtype=np.float32)},
        statistics="gram",
        axes=axes,
    )
    with pytest.raises(CheckpointError, match="damaged: its metadata"):
        merging.load_statistics(path)


def test_axes_that_the_weight_lacks(on_disk, tmp_path):
    base, models, _ = on_disk
    path = write(
        tmp_path / "gram.safetensors",
        {"fc.weight": np.eye(4, dtype=np.float32)},
        statistics="gram",
        axes='{"fc.weight": {"axes": [5], "batch": []}}',
    )
    with pytest.raises(ValueError, match=r"axes \(5,\) and \(\) do not fit"):
        merging.merge_checkpoints(
            merging.regmean(), base, models, tmp_path / "out", statistics=[path] * 2
        )


def test_integers_and_entries_below_0(tmp_path):
    for dtype in (np.int8, np.bool_, np.int64):
        path = write(
            tmp_path / "f.safetensors", {"w": np.ones(3, dtype)}, statistics="fisher"
        )
        with pytest.raises(CheckpointError, match=f"w is {np.dtype(dtype)}, expected"):
            merging.load_statistics(path)
    for x in (np.float32([1, -1e-3, 2]), np.float16([-1, 0])):
        path = write(tmp_path / "f.safetensors", {"w": x}, statistics="fisher")
        with pytest.raises(CheckpointError, match="w has entries below 0"):
            merging.load_statistics(path)
