"""Merges on a mesh: as without one, by parts, and without needless communication."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from multitask_jax import checkpoints, merging, sharding
from multitask_jax.checkpoints import CheckpointError, orbax_reader, safetensors_file
from multitask_jax.merging import core, execution, mesh_plan, on_mesh
from multitask_jax.merging.plan import plan_merge
from tests.merging.common import assert_same_bits, load, save
from tests.merging.test_contract import CASES, agree, weights_of

pytestmark = pytest.mark.optimised

BF16 = np.dtype(ml_dtypes.bfloat16)
# Shapes that all, some and no axes of a mesh divide; three layers.
SHAPES = {
    "odd": (7, 9),
    "scale": (),
    **{f"layers.{i}.mlp": (16, 24) for i in range(3)},
    **{f"layers.{i}.norm": (12,) for i in range(3)},
}
MESHES = {"one axis": {"model": 8}, "two axes": {"data": 2, "model": 4}}


def make(dtype=np.float32) -> list[dict[str, np.ndarray]]:
    """A base and three fine-tunes, with ties among magnitudes and sums of zero."""
    rng = np.random.default_rng(0)
    base = {k: rng.standard_normal(s).astype(dtype) for k, s in SHAPES.items()}

    def tune(x):
        delta = np.round(rng.standard_normal(x.shape) * 8) / 64
        delta += np.where(rng.random(x.shape) < 0.5, rng.standard_normal(x.shape), 0)
        return (x.astype(np.float32) + 0.1 * delta).astype(dtype)

    models = [base, *({k: tune(x) for k, x in base.items()} for _ in range(3))]
    others = {"empty": np.zeros((0, 3), dtype), "ids": np.array([2**40 + 1, 3])}
    return [m | others for m in models]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Paths by (format, dtype): the base, then the models."""
    made = {}

    def paths(format="safetensors", dtype=np.float32):
        key = format, np.dtype(dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("models")
            made[key] = [
                save(folder / str(i), params, format=format)
                for i, params in enumerate(make(dtype))
            ]
        return made[key]

    return paths


def merge(folder: Path, method, paths, name="out", **kwargs) -> dict[str, np.ndarray]:
    settings = {"report_files": False, "progress": False, "threads": 2, **kwargs}
    merging.merge_checkpoints(method, paths[0], paths[1:], folder / name, **settings)
    return load(folder / name)


# One stack that is cut and one that is not: few programs to compile.
FEW = r"mlp|odd"
TABLE = [  # case of the contract, mesh, format, dtype
    ("ties", "one axis", "safetensors", BF16),
    ("ties", "two axes", "orbax", np.float32),
    ("ties mergekit", "two axes", "safetensors", np.float32),
    ("dare", "two axes", "orbax", np.float16),
    ("linear", "two axes", "msgpack", np.float32),
    ("slerp", "one axis", "safetensors", np.float32),
    ("ties lines norm", "two axes", "safetensors", np.float32),
    ("model_stock rows", "one axis", "orbax", np.float32),
]


@pytest.mark.parametrize(("name", "mesh", "format", "dtype"), TABLE)
def test_as_without_a_mesh(name, mesh, format, dtype, stored, tmp_path):
    case = CASES[name]
    paths = stored(format, dtype)[: case.models + 1]
    kwargs = {"weights": weights_of(case)}
    if (name, dtype) != ("ties", BF16):
        kwargs["include"] = FEW
    want = merge(tmp_path, case.method, paths, "want", **kwargs)
    mesh = sharding.make_mesh(MESHES[mesh])
    got = merge(tmp_path, case.method, paths, "got", mesh=mesh, **kwargs)
    assert got.keys() == want.keys()
    floats = [k for k in want if want[k].dtype == dtype]
    assert set(SHAPES) <= set(floats)
    np.testing.assert_array_equal(got["ids"], want["ids"])
    inputs = [{k: p[k] for k in floats} for p in map(load, paths)]
    agree(
        case,
        {k: got[k] for k in floats},
        {k: want[k] for k in floats},
        inputs[0],
        inputs[1:],
    )


def test_stacks_come_and_go_in_bounded_memory(stored, tmp_path, monkeypatch):
    paths = stored(dtype=BF16)
    method = merging.task_arithmetic(scale=0.4)
    want = merge(tmp_path, method, paths, "want")
    mesh = sharding.make_mesh({"model": 4})
    plan = plan_of(method, paths)
    whole = on_mesh.stacks_of(method, plan, mesh, None)
    assert sorted(len(s.entries) for s in whole) == [1, 1, 3, 3]
    # Two layers of 16 x 24 in bfloat16, of four checkpoints, on each of 4 devices.
    monkeypatch.setattr(on_mesh, "MOST", 2 * 16 * 24 * 2)
    stacks = on_mesh.stacks_of(method, plan, mesh, None)
    of_mlp = [s for s in stacks if s.shape[1:] == (16, 24)]
    assert [len(s.entries) for s in of_mlp] == [2, 1]
    assert_same_bits(merge(tmp_path, method, paths, mesh=mesh), want)


def test_dtypes_that_devices_lack_are_converted_on_the_host(tmp_path):
    base = {
        "wide": np.full((8, 3), 1 / 3),
        "eight": np.ones((8, 2), ml_dtypes.float8_e4m3fn),
    }
    model = {k: (v.astype(np.float64) + 0.5).astype(v.dtype) for k, v in base.items()}
    paths = [save(tmp_path / "b", base), save(tmp_path / "m", model)]
    mesh = sharding.make_mesh({"model": 8})
    method = merging.task_arithmetic(scale=0.5)
    with pytest.raises(ValueError, match=r"wide: float64 .* dtype='float32'"):
        merge(tmp_path, method, paths, mesh=mesh)
    want = merge(tmp_path, method, paths, "want", dtype="float32")
    assert_same_bits(merge(tmp_path, method, paths, mesh=mesh, dtype="float32"), want)


# -- reading by parts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "method"),
    [("safetensors", merging.magnitude_prune()), ("orbax", merging.linear())],
    ids=["stays on the mesh", "comes and goes"],
)
def test_each_device_reads_its_part_once(format, method, stored, tmp_path, monkeypatch):
    reader = {
        "safetensors": safetensors_file.SafetensorsReader,
        "orbax": orbax_reader.OrbaxReader,
    }[format]
    read_box, boxes = reader.read_box, {}

    def counting(self, name, box):
        part = read_box(self, name, box)
        boxes.setdefault((self.path.name, name), []).append(part.size)
        return part

    monkeypatch.setattr(reader, "read_box", counting)
    mesh = sharding.make_mesh({"model": 4})
    merge(tmp_path, method, stored(format), mesh=mesh, include=FEW)
    assert len(boxes) == 4 * 4  # tensors of checkpoints
    for (_, name), sizes in boxes.items():
        size = int(np.prod(SHAPES[name]))
        parts = 1 if name == "odd" else 4
        assert sizes == [size // parts] * parts, name


def test_arrays_are_born_sharded(stored):
    reader = checkpoints.open(stored()[0])
    names = [f"layers.{i}.mlp" for i in range(3)]
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    placed = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    x = on_mesh.born_sharded(reader, names, placed, np.dtype(np.float32))
    assert x.sharding == placed
    assert {s.data.shape for s in x.addressable_shards} == {(3, 8, 6)}
    np.testing.assert_array_equal(x, np.stack([make()[0][n] for n in names]))


# -- what the programs exchange --------------------------------------------------------


def plan_of(method, paths):
    readers = [checkpoints.open(p) for p in paths]
    return plan_merge(method, readers[0], readers[1:])


def programs_of(method, paths, mesh):
    readers = [checkpoints.open(p) for p in paths]
    plan = plan_merge(method, readers[0], readers[1:], include=FEW)
    weights = core.check_models(method, len(paths) - 1, None)
    job = execution.Job(method, plan, readers, weights)
    return mesh_plan.programs(job, mesh, None)


def test_collectives_are_found():
    mesh = sharding.make_mesh({"model": 8})
    x = jax.ShapeDtypeStruct(
        (16, 4), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("model"))
    )
    whole = NamedSharding(mesh, PartitionSpec())
    gathered = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile()
    (found,) = mesh_plan.collectives(gathered.as_text())
    assert found.kind == "all-gather"
    assert found.nbytes in (16 * 4 * 2, 16 * 4 * 4)  # a CPU gathers float32
    summed = jax.jit(lambda x: jnp.sum(x.astype(jnp.float32))).lower(x).compile()
    (found,) = mesh_plan.collectives(summed.as_text())
    assert found == mesh_plan.Collective("all-reduce", ("f32",), 4)


LEAFWISE = sorted(
    n for n, c in CASES.items() if c.leafwise and not c.statistics and " " not in n
)


@pytest.mark.parametrize("name", LEAFWISE)
def test_leafwise_methods_exchange_nothing(name, stored):
    case = CASES[name]
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    found = programs_of(case.method, stored(dtype=BF16)[: case.models + 1], mesh)
    assert len(found) == 2  # one a shape
    assert all(p.name.startswith("merge") for p in found)
    assert [p.collectives for p in found] == [()] * 2


def test_ties_exchanges_counts_alone(stored):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    found = programs_of(merging.ties(), stored(dtype=BF16), mesh)
    statistics = [p for p in found if p.name.startswith("statistic")]
    assert [p.name for p in statistics] == ["statistic (kth)", "statistic (count)"]
    for p, columns in zip(statistics, (3, 2), strict=True):
        # (high, low) of each column, once a round: not a value of a parameter.
        assert set(p.collectives) == {
            mesh_plan.Collective("all-reduce", ("s32",), 8 * columns)
        }
    others = [p for p in found if p not in statistics]
    assert len(others) == 2
    assert not any(p.collectives for p in others)


def test_ties_of_tensors_exchanges_counts_alone(stored):
    mesh = sharding.make_mesh({"model": 4})
    found = programs_of(CASES["ties peft"].method, stored(), mesh)
    of_parts = [c for p in found for c in p.collectives]
    assert of_parts
    for c in of_parts:
        assert (c.kind, c.dtypes) == ("all-reduce", ("s32",))
        assert c.nbytes <= 3 * 8


# -- around the merge ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ties", "linear"])
def test_report_as_without_a_mesh(name, stored, tmp_path):
    mesh = sharding.make_mesh({"model": 4})
    for where, kwargs in (("a", {}), ("b", {"mesh": mesh})):
        kwargs |= {"report_files": True, "include": "mlp"}
        merge(tmp_path, CASES[name].method, stored(), where, **kwargs)
    a, b = (json.loads((tmp_path / w / "merge_report.json").read_text()) for w in "ab")
    files = [sorted(p.name for p in (tmp_path / w).iterdir()) for w in "ab"]
    assert files[0] == files[1]
    assert a.keys() == b.keys()
    others = ("seconds", "passes")  # a mesh reads once
    numbers = [[*_numbers({k: r[k] for k in r if k not in others})] for r in (a, b)]
    assert len(numbers[0]) > 20
    np.testing.assert_allclose(*numbers, rtol=2e-5, atol=1e-6)


def _numbers(x):
    if isinstance(x, dict):
        for v in x.values():
            yield from _numbers(v)
    elif isinstance(x, list):
        for v in x:
            yield from _numbers(v)
    elif isinstance(x, int | float):
        yield x


@pytest.mark.parametrize("name", ["ties", "linear"])
def test_nonfinite_values_are_named(name, stored, tmp_path):
    bad = make()[1]
    bad["layers.2.mlp"][5, 7] = np.inf
    paths = [*stored()[:2], save(tmp_path / "bad", bad)]
    mesh = sharding.make_mesh({"model": 4})
    message = r"bad: tensor 'layers\.2\.mlp' has inf at flat index 127"
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path, CASES[name].method, paths, mesh=mesh, include="mlp")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_values_that_do_not_fit_are_named(tmp_path):
    base = {"w": np.full((8, 8), 6e4, np.float16)}
    model = {"w": np.full((8, 8), 6.5e4, np.float16)}
    paths = [save(tmp_path / "b", base), save(tmp_path / "m", model)]
    mesh = sharding.make_mesh({"model": 8})
    with pytest.raises(
        CheckpointError, match="w: the merged values do not fit float16"
    ):
        merge(tmp_path, merging.task_arithmetic(scale=2.0), paths, mesh=mesh)


def test_refusals(stored, tmp_path):
    mesh = sharding.make_mesh({"model": 8})
    ta = merging.task_arithmetic()
    rules = [("layers", PartitionSpec("model")), (".*", PartitionSpec())]
    with pytest.raises(ValueError, match=r"layers\.0\.norm: axis of 12 .* in 8"):
        merge(tmp_path, ta, stored(), mesh=mesh, rules=rules)
    with pytest.raises(ValueError, match="odd: no sharding rule matches"):
        merge(tmp_path, ta, stored(), mesh=mesh, rules=[("layers", PartitionSpec())])
    with pytest.raises(ValueError, match="on this host, more than max_memory"):
        merge(tmp_path, ta, stored(), mesh=mesh, max_memory=1000)
    fishers = [
        merging.save_statistics(
            tmp_path / f"{i}.safetensors", {k: np.ones(s) for k, s in SHAPES.items()}
        )
        for i in range(3)
    ]
    with pytest.raises(ValueError, match=r"data \(fisher\) does not run on a mesh"):
        merge(tmp_path, merging.fisher(), stored(), mesh=mesh, statistics=fishers)
    assert not any(p.is_dir() for p in tmp_path.iterdir())


def test_rules_place_tensors(stored, tmp_path):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    rules = sharding.parse_rules("0.*mlp=data,model;mlp=None,data+model;.*=")
    method = merging.magnitude_prune()
    got = merge(tmp_path, method, stored(), mesh=mesh, rules=rules, include=FEW)
    assert_same_bits(got, merge(tmp_path, method, stored(), "want", include=FEW))
