"""Task vectors alone: what is stored, and base + delta against the merge itself."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import merge
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import (
    CheckpointError,
    TensorInfo,
    delta_file,
    safetensors_file,
)
from multitask_jax.checkpoints.delta_file import fingerprint
from multitask_jax.merging.delta import as_delta
from tests.merging.common import assert_same_bits, load, make_models, save


def written(folder, base, tau, **options):
    """A delta of these task vectors, by hand, in pieces that cross blocks."""
    infos = [TensorInfo(k, v.shape, v.dtype) for k, v in tau.items()]
    reader = checkpoints.open(base)
    with checkpoints.create(
        folder, infos, format="delta", base=reader, **options
    ) as writer:
        for name, x in tau.items():
            for start in range(0, x.size, 50_000):
                writer.write(name, start, x.reshape(-1)[start : start + 50_000])
    return folder


def sparse(size, density, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size).astype(np.float32)
    return np.where(rng.random(size) < density, x, 0).astype(dtype)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
)
def test_smaller_form_is_stored_and_read_back(tmp_path, dtype):
    sizes = {"a": (3, 70_001), "b": (200_000,), "c": (65_536,), "d": (), "e": (10, 7)}
    theta = {k: sparse(s, 1, seed=i) for i, (k, s) in enumerate(sizes.items())}
    base = save(tmp_path / "base", theta)
    tau = {
        "a": sparse(sizes["a"], 0.2, dtype),
        "b": sparse(sizes["b"], 0.9, dtype),
        "c": sparse(sizes["c"], 0, dtype),
        "d": np.asarray(0.5, dtype),
    }
    tau["a"][1] = 0  # a block without entries
    path = written(tmp_path / "delta", base, tau)
    stored = safetensors_file.open_reader(path).tensors
    assert {k for k in stored if k.startswith("dense/")} == {"dense/b", "dense/d"}
    assert stored["values/a"].shape == (np.count_nonzero(tau["a"]),)
    assert not list(path.glob("dense*"))
    alone = delta_file.read(path, checkpoints.open(base))
    assert list(alone) == list(tau)
    for name, x in tau.items():
        np.testing.assert_array_equal(alone[name], x.astype(alone[name].dtype))
    reader = checkpoints.open(path, checkpoints.open(base))
    assert reader.format == "delta"
    assert list(reader.tensors) == list(theta)
    for name, x in theta.items():
        want = x if name == "e" else x + tau[name].astype(np.float32)
        got = reader.read(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want.reshape(-1))
        for start, stop in ((0, 0), (1, 2), (65_530, 65_540), (131_072, 196_609)):
            stop = min(stop, x.size)
            part = reader.read(name, min(start, stop), stop)
            np.testing.assert_array_equal(part, want.reshape(-1)[start:stop])


def run(tmp_path, name, base, models, method, **kwargs):
    kwargs = {"report_files": False, "progress": False} | kwargs
    merging.merge_checkpoints(method, base, models, tmp_path / name, **kwargs)
    return tmp_path / name


@pytest.fixture
def saved(tmp_path):
    base, models = make_models(3, rows=270)
    paths = [save(tmp_path / f"m{t}", m) for t, m in enumerate(models)]
    return save(tmp_path / "base", base), paths


CHAINS = {
    "task_arithmetic": merging.task_arithmetic,
    "ties_lines": lambda: merging.with_lines(merging.ties(), alpha=0.3, beta=0.7),
    "dare": merging.dare,
}


@pytest.mark.parametrize("name", CHAINS)
def test_base_and_delta_are_the_merge(tmp_path, saved, name):
    """Bit for bit, LiNeS and random masks by place included, with tensors left out."""
    base, models = saved
    method = CHAINS[name]()
    kwargs = {"exclude": "block_1/mlp"}
    model = load(run(tmp_path, "model", base, models, method, **kwargs))
    path = run(tmp_path, "delta", base, models, method, output_format="delta", **kwargs)
    delta = checkpoints.open(path, checkpoints.open(base))
    got = {
        k: np.array(delta.read(k)).reshape(i.shape) for k, i in delta.tensors.items()
    }
    assert_same_bits(got, model)
    names = {k.split("/", 1)[1] for k in safetensors_file.open_reader(path).tensors}
    assert not any("block_1/mlp" in k for k in names)
    # And it is a model again: merged alone with scale 1 it comes out as it was.
    again = run(tmp_path, "again", base, [path], merging.task_arithmetic())
    for k, x in load(again).items():
        np.testing.assert_allclose(x, model[k], rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["linear", "slerp"])
def test_methods_on_parameters(tmp_path, saved, name):
    base, models = saved
    method = merging.METHODS[name]()
    models = models[: method.models or 2]
    model = load(run(tmp_path, "model", base, models, method))
    path = run(tmp_path, "delta", base, models, method, output_format="delta")
    delta = checkpoints.open(path, checkpoints.open(base))
    theta = load(base)
    for k, want in model.items():
        scale = np.maximum(np.abs(want), np.abs(theta[k])).reshape(-1)
        assert (np.abs(delta.read(k) - want.reshape(-1)) <= np.spacing(scale)).all(), k


def test_as_delta_in_memory():
    base, models = make_models(2, rows=3, blocks=1)
    method = merging.task_arithmetic()
    tau = merging.merge(as_delta(method), base, models)
    theta = merging.merge(method, base, models)
    again = {k: np.asarray(base[k]) + np.asarray(tau[k]) for k in ("embed", "scale")}
    assert_same_bits(again, {k: np.asarray(theta[k]) for k in again})


def test_a_trimmed_delta_is_smaller(tmp_path, saved):
    """Density .2 of one model: 6 bytes an entry kept, instead of 4 an entry."""
    base, models = saved
    size = sum(i.size for i in checkpoints.open(base).tensors.values())
    bytes_of = {}
    for density in (0.2, 1.0):
        method = merging.ties(density=density)
        name = f"d{density}"
        path = run(tmp_path, name, base, models[:1], method, output_format="delta")
        bytes_of[density] = (path / "delta.safetensors").stat().st_size
        assert {p.name for p in path.iterdir()} == {"delta.safetensors"}
    assert 6 * 0.2 * size < bytes_of[0.2] < 6 * 0.2 * size + 5000
    # Dense but for tensors of which more than a third is 0.
    assert 3.5 * size < bytes_of[1.0] < 4 * size + 5000


def test_shards_and_narrow_deltas(tmp_path, saved):
    base, models = saved
    options = {"output_format": "delta", "out_dtype": "bfloat16"}
    path = run(
        tmp_path, "d", base, models, merging.ties(), max_shard_size=200_000, **options
    )
    assert len(list(path.glob("delta-*.safetensors"))) > 1
    model = load(run(tmp_path, "model", base, models, merging.ties()))
    reader, theta = checkpoints.open(path, checkpoints.open(base)), load(base)
    for k, x in model.items():
        tau = (x - theta[k]).reshape(-1)
        got = reader.read(k) - theta[k].reshape(-1)
        np.testing.assert_allclose(got, tau, rtol=2**-8, atol=1e-6)


def test_command_line(tmp_path, saved):
    base, models = saved
    common = {"base": str(base), "method": "task_arithmetic", "progress": False}
    first = merge.Config(
        models=f"{models[0]},{models[1]}",
        output=str(tmp_path / "first"),
        output_format="delta",
        **common,
    )
    merge.run(first)
    assert (tmp_path / "first" / "merge_report.md").exists()
    merge.run(
        merge.Config(
            models=f"{tmp_path / 'first'},{models[2]}",
            output=str(tmp_path / "second"),
            report=False,
            **common,
        )
    )
    assert load(tmp_path / "second").keys() == load(base).keys()
    merge.run(merge.Config(**vars(first) | {"overwrite": True, "report": False}))


def test_only_with_its_base(tmp_path, saved):
    base, models = saved
    method = merging.task_arithmetic()
    path = run(tmp_path, "d", base, models, method, output_format="delta")
    for p in (path, path / "delta.safetensors"):
        with pytest.raises(CheckpointError, match=r"a delta changes a base .*--base"):
            checkpoints.open(p)
        assert checkpoints.open(p, checkpoints.open(base)).format == "delta"
    with pytest.raises(CheckpointError, match="made for a base of other names"):
        checkpoints.open(path, checkpoints.open(models[0]))  # same shapes
    with pytest.raises(ValueError, match="output_format='delta' needs a base"):
        run(tmp_path, "e", None, models, merging.linear(), output_format="delta")
    assert not (tmp_path / "e").exists()


def test_fingerprints(tmp_path):
    a = {"x": np.arange(300, dtype=np.float32), "y": np.ones((2, 3), np.float32)}
    same = fingerprint(checkpoints.open(save(tmp_path / "a", a)))
    others = [
        {"y": a["y"], "x": a["x"]},
        a | {"y": np.ones((3, 2), np.float32)},
        a | {"y": a["y"].astype(np.float16)},
        {"z": a["x"], "y": a["y"]},
        a | {"x": a["x"] + 1},
        {"x": a["x"]},
    ]
    found = [
        fingerprint(checkpoints.open(save(tmp_path / f"b{i}", o)))
        for i, o in enumerate(others)
    ]
    assert found[0] == same
    assert same not in found[1:]


def test_damaged_files(tmp_path):
    base = save(tmp_path / "base", {"a": sparse(70_000, 1)})
    path = written(tmp_path / "delta", base, {"a": sparse(70_000, 0.1)})
    file = path / "delta.safetensors"
    good = load_file(file)
    about = safetensors_file.open_reader(file).metadata
    reader = checkpoints.open(base)

    def damage(message, metadata=about, **changed):
        tensors = {k: changed.get(k[:3], v) for k, v in good.items()}
        kept = {k: v for k, v in tensors.items() if v is not None}
        save_file(kept, file, metadata)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.open(path, reader).read("a")

    starts = good["starts/a"]
    damage("does not fit together", sta=starts[:-1])
    damage("does not fit together", sta=starts[::-1].copy())
    damage("does not fit together", val=good["values/a"][1:])
    damage("does not fit together", pos=good["positions/a"].astype(np.int32))
    damage("starts/a is missing", sta=None)
    damage("out of order", pos=good["positions/a"][::-1].copy())
    damage("unexpected tensor", val=None)
    damage("expected the format multitask_jax.delta", metadata={"format": "pt"})


def test_nothing_half_written(tmp_path, saved, monkeypatch):
    from multitask_jax.checkpoints import delta_file

    def fail(*args, **kwargs):
        raise OSError("no space left")

    base, models = saved
    monkeypatch.setattr(delta_file, "_compress", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, "d", base, models, merging.ties(), output_format="delta")
    assert set(tmp_path.iterdir()) == before
