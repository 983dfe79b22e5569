"""Orbax: whole trees are restored with the shardings of the target."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from orbax.checkpoint import v1 as ocp

from multitask_jax import checkpoints
from multitask_jax.checkpoints import orbax_file
from multitask_jax.checkpoints.types import CheckpointError
from tests.checkpoints.orbax_common import (
    SAVERS,
    array,
    halve,
    same,
    sharding,
    train_tree,
    write,
)


@pytest.mark.parametrize("saver", [s.__name__ for s in SAVERS])
def test_restores_with_the_shardings_of_the_target(saved, saver):
    state = train_tree()
    replicated = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding()),
        state["params"],
    )
    kernel = replicated["dense"]["kernel"].update(sharding=sharding("y", "x"))
    replicated["dense"]["kernel"] = kernel
    found = orbax_file.restore(saved[saver], {**state, "params": replicated})
    assert found["params"]["dense"]["kernel"].sharding == sharding("y", "x")
    assert jax.tree.all(jax.tree.map(np.array_equal, found["params"], state["params"]))


def test_an_item_is_opened_and_restored_by_itself(saved):
    for item in (saved["_save_v1"] / "state", saved["_save_step"] / "default"):
        reader = checkpoints.open(item)
        assert reader.read("params/dense/kernel", 7, 9).tolist() == [7, 8]
        found = orbax_file.restore(item, train_tree())
        assert int(found["step"]) == 7


def test_restoring_another_tree_or_shape_is_an_error(saved):
    path = saved["_save_v1"]
    state = train_tree()
    bias = state["params"]["dense"].pop("bias")
    with pytest.raises(CheckpointError, match=r"1 leaves .*dense/bias \(checkp"):
        orbax_file.restore(path, state)
    state["params"]["dense"] |= {"bias": bias, "scale": bias}
    with pytest.raises(CheckpointError, match=r"1 leaves .*dense/scale \(target"):
        orbax_file.restore(path, state)
    state = train_tree()
    state["params"]["dense"]["bias"] = jnp.ones(7, jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"dense/bias: the .* \(8,\), .* \(7,\)"):
        orbax_file.restore(path, state)
    columns = jax.ShapeDtypeStruct((2, 32), np.float32, sharding=sharding("x"))
    state = train_tree()
    state["params"]["blocks"][0] = columns
    with pytest.raises(CheckpointError, match=r"params/blocks/0: .*divide"):
        orbax_file.restore(path, state)


# Orbax drops its own unfinished tasks when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_data_are_an_error_to_read_and_to_restore(tmp_path):
    # Large enough not to be stored within the database's own nodes.
    tree = {"w": np.random.default_rng(0).normal(size=(64, 64))}
    ocp.save(tmp_path / "x", tree)
    for file in tmp_path.glob("x/state/ocdbt.process_0/d/*"):
        halve(file)
    with pytest.raises(CheckpointError, match=r"w cannot be read.* damaged"):
        checkpoints.open(tmp_path / "x").read("w")
    with pytest.raises(CheckpointError, match="x: "):
        orbax_file.restore(tmp_path / "x", tree)
    gc.collect()


def test_a_train_state_is_read_by_path_and_restored_sharded(tmp_path):
    def init() -> train_state.TrainState:
        params = {"dense": {"kernel": jnp.arange(32.0).reshape(8, 4)}}
        return train_state.TrainState.create(
            apply_fn=None, params=params, tx=optax.adam(0.1)
        )

    def shard(leaf) -> jax.sharding.NamedSharding:
        return sharding("x") if leaf.ndim else sharding()

    abstract = jax.eval_shape(init)
    shardings = jax.tree.map(shard, abstract)
    state = jax.jit(init, out_shardings=shardings)()
    ocp.save(tmp_path / "x", state)
    reader = checkpoints.open(tmp_path / "x")
    moments = [f"opt_state/0/{m}/dense/kernel" for m in ("mu", "nu")]
    assert sorted(reader.tensors) == sorted(
        ["opt_state/0/count", *moments, "params/dense/kernel", "step"]
    )
    assert reader.read("params/dense/kernel", 5, 8).tolist() == [5, 6, 7]
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        abstract,
        shardings,
    )
    found = orbax_file.restore(tmp_path / "x", target)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, state))
    assert jax.tree.map(lambda a: a.sharding, found) == shardings


def test_what_we_write_is_restored_sharded(tmp_path):
    w = array((16, 24), np.dtype(np.float32))
    path = write(tmp_path / "out", {"params/w": w}, max_shard_size=300)
    files = [p for p in path.rglob("*") if p.is_file() and "_" not in p.name]
    assert max(p.stat().st_size for p in files) <= 300
    target = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding("y", "x"))
    found = orbax_file.restore(path, {"params": {"w": target}})["params"]["w"]
    assert found.sharding == target.sharding
    assert found.addressable_shards[0].data.shape == (8, 6)
    assert same(found, w)
