"""EMR: the unified vector, masks and factors; in memory and on disk."""

import jax
import ml_dtypes
import numpy as np
import pytest

from experiments import specialise as script
from multitask_jax import checkpoints, merging, tree
from tests.merging.common import assert_same_bits, load, make_models, save
from tests.merging.test_golden import cases


@jax.jit
def merge(base, models):
    return merging.merge(merging.emr(), base, models)


def test_golden(shared):
    for case, f in cases(shared, "emr").items():
        base, models = f["base"], f["models"]
        trees = [
            {k: v[t] for k, v in models.items()}
            for t in range(len(f["expected_rescalers"]))
        ]
        merged = merge(base, trees)
        for k, want in f["expected_unified"].items():
            np.testing.assert_allclose(merged[k] - base[k], want, atol=1e-6)
        tasks = merging.emr_tasks(base, trees)
        for t, task in enumerate(tasks):
            np.testing.assert_allclose(
                task.rescale, f["expected_rescalers"][t], rtol=1e-5, err_msg=case
            )
            out = merging.specialise(merged, task, base=base)
            for k in base:
                np.testing.assert_array_equal(task.mask[k], f["expected_masks"][k][t])
                np.testing.assert_allclose(out[k], f["expected"][k][t], atol=2e-6)


def test_one_model_comes_back():
    base, models = make_models(1, rows=8, blocks=1)
    merged = merge(base, models)
    (task,) = merging.emr_tasks(base, models)
    np.testing.assert_allclose(task.rescale, 1, rtol=1e-5)
    out = merging.specialise(merged, task, base=base)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(models[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_of_the_unified_vector_alone_under_jit():
    base, models = make_models(3, rows=8, blocks=1)
    merged = merge(base, models)
    unified = jax.tree.map(lambda a, b: a - b, merged, base)
    task = merging.emr_tasks(base, models)[1]
    tau = jax.jit(lambda u, t: merging.specialise(u, t, base=None))(unified, task)
    whole = jax.jit(lambda m, t, b: merging.specialise(m, t, base=b))(
        merged, task, base
    )
    for t, w, b in zip(*map(jax.tree.leaves, (tau, whole, base)), strict=True):
        np.testing.assert_allclose(b + t, w, atol=1e-6)


def test_masks_of_another_model_are_refused():
    base, models = make_models(2, rows=8, blocks=1)
    task = merging.emr_tasks(base, models)[0]
    with pytest.raises(ValueError, match="embed: the task's mask has shape"):
        merging.specialise({**base, "embed": np.zeros(3)}, task, base=base)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_on_disk_as_in_memory(tmp_path, dtype):
    base, models = make_models(3, dtype, rows=1100, blocks=1)  # more than one chunk
    paths = [
        save(tmp_path / n, m) for n, m in zip("xabc", (base, *models), strict=True)
    ]
    merging.merge_checkpoints(
        merging.emr(), paths[0], paths[1:], tmp_path / "out", progress=False
    )
    merged = merge(base, models)
    out = tmp_path / "out"
    assert_same_bits(load(out), tree.flatten(merged))
    files = sorted(p.name for p in (out / "tasks").iterdir())
    assert files == ["a.safetensors", "b.safetensors", "c.safetensors"]
    size = sum(x.size for x in jax.tree.leaves(base))
    assert (out / "tasks" / "a.safetensors").stat().st_size < size / 8 + 3000
    opened = checkpoints.open(out)
    for t, task in enumerate(merging.emr_tasks(base, models)):
        path = out / "tasks" / files[t]
        stored = merging.load_task(path, opened.tensors)
        np.testing.assert_allclose(stored.rescale, task.rescale, rtol=1e-5)
        for p, mask in task.mask.items():
            np.testing.assert_array_equal(stored.mask[p], mask)
        script.run(
            script.Config(
                base=str(paths[0]),
                merged=str(out),
                task=str(path),
                output=str(tmp_path / f"task{t}"),
                progress=False,
            )
        )
        want = merging.specialise(merged, stored, base=base)
        for p, x in load(tmp_path / f"task{t}").items():
            y = np.asarray(tree.flatten(want)[p])
            assert x.dtype == y.dtype
            np.testing.assert_allclose(
                x.astype(np.float32), y.astype(np.float32), rtol=1e-2, atol=1e-6
            )


def test_files_that_do_not_belong_together(tmp_path):
    base, models = make_models(2, rows=8, blocks=1)
    other, _ = make_models(0, rows=16, blocks=1)
    paths = [save(tmp_path / n, m) for n, m in zip("xab", (base, *models), strict=True)]
    merging.merge_checkpoints(
        merging.emr(), paths[0], paths[1:], tmp_path / "out", progress=False
    )
    task = tmp_path / "out" / "tasks" / "a.safetensors"
    wrong = save(tmp_path / "wrong", other)
    with pytest.raises(ValueError, match=r"the mask of 'embed' does not fit"):
        merging.specialise_checkpoint(
            wrong, wrong, task, tmp_path / "no", progress=False
        )
    with pytest.raises(ValueError, match="not a task file of an EMR merge"):
        merging.specialise_checkpoint(
            paths[0], tmp_path / "out", paths[1], tmp_path / "no", progress=False
        )
    with pytest.raises(ValueError, match="--task: got none"):
        script.run(script.Config(base="x", merged="y", output="z"))
    # Another merge of the same base, and another base of the same layout.
    more, _ = make_models(0, rows=8, blocks=1, seed=5)
    strange = save(tmp_path / "strange", more)
    merging.merge_checkpoints(
        merging.emr(), paths[0], paths[2:], tmp_path / "out2", progress=False
    )
    for origin, merged, message in (
        (paths[0], tmp_path / "out2", "the task is of another merge than"),
        (strange, tmp_path / "out", "the task was merged with another base"),
    ):
        with pytest.raises(ValueError, match=message):
            merging.specialise_checkpoint(
                origin, merged, task, tmp_path / "no", progress=False
            )
    assert not (tmp_path / "no").exists()


def test_models_of_like_names_get_a_file_each(tmp_path):
    base, models = make_models(4, rows=8, blocks=1)
    names = ["p/m", "q/m", "a/b_c", "a_b/c"]
    origin = save(tmp_path / "base", base)
    paths = [save(tmp_path / n, m) for n, m in zip(names, models, strict=True)]
    merging.merge_checkpoints(
        merging.emr(), origin, paths, tmp_path / "out", progress=False
    )
    files = sorted(p.stem for p in (tmp_path / "out" / "tasks").iterdir())
    assert files == ["a_b_c", "a_b_c-2", "p_m", "q_m"]


def test_changes_too_small_to_multiply_keep_their_mask():
    base = {"w": np.zeros(3, np.float32)}
    models = [{"w": np.array([1e-20, -1e-25, 0], np.float32)} for _ in range(2)]
    task = merging.emr_tasks(base, models)[0]
    np.testing.assert_array_equal(task.mask["w"], [True, True, False])


def merged_on_disk(tmp_path, base, models, **options):
    """The paths of the base and of the EMR merge of two models."""
    paths = [save(tmp_path / n, m) for n, m in zip("xab", (base, *models), strict=True)]
    out = tmp_path / "out"
    merging.merge_checkpoints(
        merging.emr(), paths[0], paths[1:], out, progress=False, **options
    )
    return paths[0], out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_the_unified_delta(tmp_path, dtype):
    base, models = make_models(2, rows=8, blocks=1)
    origin, out = merged_on_disk(
        tmp_path, base, models, output_format="delta", out_dtype=dtype
    )
    task = out / "tasks" / "a.safetensors"
    merging.specialise_checkpoint(
        origin, out, task, tmp_path / "a-again", progress=False
    )
    merged = merge(base, models)
    want = merging.specialise(merged, merging.emr_tasks(base, models)[0], base=base)
    for p, x in load(tmp_path / "a-again").items():
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(x, tree.flatten(want)[p], atol=tolerance)


@pytest.mark.parametrize("format", ["orbax", "msgpack"])
def test_beside_other_formats(tmp_path, format):
    base, models = make_models(2, rows=8, blocks=1)
    origin, out = merged_on_disk(tmp_path, base, models, output_format=format)
    merged = merge(base, models)
    assert_same_bits(load(out), tree.flatten(merged))
    task = out / "tasks" / "b.safetensors"
    merging.specialise_checkpoint(
        origin, out, task, tmp_path / "b-again", progress=False
    )
    want = merging.specialise(merged, merging.emr_tasks(base, models)[1], base=base)
    for p, x in load(tmp_path / "b-again").items():
        np.testing.assert_allclose(x, tree.flatten(want)[p], rtol=1e-5, atol=1e-6)
