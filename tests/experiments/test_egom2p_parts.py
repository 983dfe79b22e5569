"""Measures, masks, plan and benchmark of EgoM2P, without a run."""

import dataclasses
import functools
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import (
    benchmark_egom2p,
    egom2p_evaluation,
    egom2p_model,
    egom2p_pictures,
    egom2p_plan,
    egom2p_regressor,
    egom2p_report,
)
from experiments import egom2p as run
from experiments import egom2p_training as training
from experiments.egom2p_evaluation import MEASURES, TASKS
from experiments.egom2p_tokens import Tokens
from multitask_jax import sharding
from multitask_jax.data import egocentric
from multitask_jax.data.egocentric import Clips
from multitask_jax.masked import tokenizers
from multitask_jax.masked.masks import Masks, Slots
from multitask_jax.masked.modalities import Modality, flatten, modality_of
from multitask_jax.masked.tokenizers import types
from multitask_jax.models import egom2p
from multitask_jax.models.egom2p import Shape
from tests.experiments.common import from_flagfile
from tests.masked.common import MODALITIES
from tests.masked.test_modalities import random_tokens


def clips(count=3):
    rng = np.random.default_rng(0)
    arrays = {
        "rgb": rng.integers(0, 256, (count, *egocentric.SHAPES["rgb"]), np.uint8),
        "depth": rng.uniform(1, 9, (count, 16, 64, 64)).astype(np.float32),
        "camera": np.tile(np.eye(4, dtype=np.float32), (count, 64, 1, 1)),
        "gaze": rng.random((count, 64, 2), np.float32),
    }
    arrays["camera"][:, :, 2, 3] = np.linspace(0, 3, 64)
    arrays["gaze"][0, :5] = np.nan
    present = {k: np.ones(count, bool) for k in arrays}
    return Clips(arrays, present, [str(i) for i in range(count)], ["a"] * count)


@pytest.mark.parametrize("kind", egocentric.MODALITIES)
def test_scores_are_best_for_the_truth_and_baselines_are_of_its_shape(kind):
    some = clips()
    truth = some.arrays[kind]
    best = egom2p_evaluation.score(kind, np.nan_to_num(truth), truth)
    for other in (
        egom2p_evaluation.constant(kind, some, len(truth)),
        egom2p_evaluation.copy_first(kind, truth),
    ):
        assert other.shape == truth.shape
        assert other.dtype == truth.dtype
        assert np.isfinite(other).all()
        worse = egom2p_evaluation.score(kind, other, truth)
        for name, (_, more) in egom2p_evaluation.MEASURES[kind].items():
            good, bad = best[name].mean(), worse[name].mean()
            assert good >= bad if more else good <= bad, name


def test_the_best_constant_depth_is_found_by_search():
    """Of few depths at a pixel, none has a smaller mean |x - d| / d."""
    rng = np.random.default_rng(0)
    some = clips(5)
    depth = rng.uniform(0.2, 9, some.arrays["depth"].shape).astype(np.float32)
    depth[0, 0, :8] = np.nan
    some = some._replace(arrays=some.arrays | {"depth": depth})
    best = egom2p_evaluation.least_abs_rel(some, 2, every=1)
    assert best.shape == (2, *depth.shape[1:])
    for i, j in ((0, 0), (10, 50)):
        d = depth[:, :, i, j].reshape(-1)
        d = d[np.isfinite(d)]
        error = [np.mean(np.abs(x - d) / d) for x in (best[0, 0, i, j], *d)]
        assert error[0] <= min(error) + 1e-6


def test_pixels_without_a_depth_are_held_and_filled_by_what_is_known():
    some = clips(4)
    depth = some.arrays["depth"]
    depth[:, :, 0, 0] = np.nan  # never known
    depth[0, :3, 5, 6] = np.nan  # at first
    depth[0, :, 7, 8] = np.nan  # in this clip
    held = egom2p_evaluation.copy_first("depth", depth)
    assert np.isfinite(held).all()
    expected = np.where(np.isfinite(depth[:, :1]), depth[:, :1], 0)
    expected[0, 0, 5, 6] = depth[0, 3, 5, 6]
    expected[0, 0, 7, 8] = np.nanmedian(depth[0])
    expected[:, 0, 0, 0] = [np.nanmedian(x) for x in depth]
    np.testing.assert_array_equal(held, np.tile(expected, (1, 16, 1, 1)))
    for constant in (
        egom2p_evaluation.constant("depth", some, 1),
        egom2p_evaluation.least_abs_rel(some, 1),
    ):
        of_pixels = constant[0, 0].reshape(-1)
        assert of_pixels[0] == pytest.approx(np.median(of_pixels[1:]))
        assert egom2p_evaluation.score("depth", constant, depth[:1])["AbsRel"] < 3
    log = np.log(depth[:, :, 5, 6].astype(np.float64))
    mean = egom2p_evaluation.constant("depth", some, 2)[1, 9, 5, 6]
    assert mean == pytest.approx(np.exp(np.nanmean(log)), rel=1e-5)


def test_what_is_not_known_of_a_clip_is_not_shown(monkeypatch):
    """A model's means and samples do not depend on such tokens, but on others."""
    shape = Shape(width=16, heads=2, encoder_depth=1, decoder_depth=1)
    params = dict(egom2p.init(jax.random.key(0), MODALITIES, shape))
    for name in ("token_embedding", "head"):
        params[name] = 50 * params[name]
    model = egom2p_evaluation.Model(params, MODALITIES, shape, {"depth": None})
    monkeypatch.setattr(tokenizers, "decode_mean", lambda _, p, **__: p)
    codes = random_tokens(np.random.default_rng(0), 3)
    ids, present = flatten(MODALITIES, codes)
    codes["gaze"][:, 2:] = (codes["gaze"][:, 2:] + 1) % 3
    others, _ = flatten(MODALITIES, codes)
    whole = np.ones(ids.shape, bool)
    for make in (
        lambda tokens: egom2p_evaluation.means(model, tokens, ("gaze",), "depth"),
        lambda tokens: egom2p_evaluation.predict(
            model, tokens, ("gaze",), {"depth": 2}, temperature=1.0, p=1.0
        )["depth"],
    ):
        for known, same in ((whole, False), (ids == others, True)):
            a, b = (make(Tokens(x, present, known)) for x in (ids, others))
            assert (a == b).all() == same


def test_a_specialist_is_not_shown_what_is_not_known():
    """Neither as it learns nor as it predicts."""
    layout = (Modality("depth", (1, 2, 2), 5), Modality("gaze", (2,), 3))
    task = egom2p_evaluation.Task("depth", "gaze", 1)
    config = tokenizers.Config("gaze", samples=16)
    shape = Shape(width=16, heads=2, encoder_depth=1, decoder_depth=1)
    net = egom2p_regressor.Regressor(layout, shape, 16)
    half = np.full(2, 0.5, np.float32)
    tokenizer = tokenizers.Tokenizer(config, None, tokenizers.Statistics(half, half))
    settings = training.Settings(inputs=4, targets=2, task=("depth", "gaze"))
    loss = jax.jit(
        egom2p_regressor.loss_fn(net, config, tokenizer.statistics, settings)
    )
    ids = np.array([[0, 1, 2, 3, 5, 6]], np.int32)
    others = np.array([[0, 1, 4, 0, 5, 6]], np.int32)
    truth = np.random.default_rng(0).random((1, 16, 2), np.float32)
    one = Slots(np.zeros((1, 2), np.int32), np.ones((1, 2), bool))
    params = net.init(jax.random.key(0), ids, Masks(one, one))["params"]
    params["signal"]["kernel"] += 1.0  # begins at 0
    made = egom2p_regressor.Trained(params, layout, shape, task, tokenizer, [])
    present, key = np.ones((1, 2), bool), jax.random.key(0)

    def predicted(x, known):
        return egom2p_regressor.predict(made, Tokens(x, present, known))

    def lost(x, known):
        return loss(params, egom2p_regressor.Pairs(x, known, truth), key)[0]

    for known, same in ((np.ones(ids.shape, bool), False), (ids == others, True)):
        for measure in (predicted, lost):
            equal = measure(ids, known) == measure(others, known)
            assert bool(np.all(equal)) == same, measure


def test_an_intervals_clips_are_told():
    values = np.array([1.0, np.nan, 3.0, 2.0])
    assert egom2p_evaluation.bootstrap(values).clips == 3
    assert egom2p_evaluation.bootstrap(values[1:2]).clips == 0
    found = {"rgb -> gaze": {"mine": {"MSE": values}}}
    assert "; 3)" in egom2p_report.results(found, {})
    text, _ = egom2p_report.compared([found], [found], ("a", "b"))
    assert "; 3)" in text


def test_a_report_calls_things_by_what_they_are_and_leaves_out_what_was_not_made():
    """Of clips without depth, of which validation has no gaze."""
    one = {name: np.ones(3) for name in ("MSE", "ATE", "RTE", "RRE")}
    methods = dict.fromkeys(("EgoM2P, mean", "constant"), one)
    found = {"rgb -> gaze": methods, "rgb -> camera": methods}
    about = {"quality": {"rmse": 0.1, "used": 0.5, "perplexity": 3.0}}
    made = {"camera": about, "gaze": about | {"split": "train"}}
    text = egom2p_report.text(found, {}, made, clips(), [], grid=False)
    for said in (
        "| rgb -> gaze proxy |",
        "| rgb -> gaze proxy, MSE down |",
        "ATE without alignment, m down |",
        "| gaze proxy (training clips) |",
        "| camera |",
        "against **constant**",
    ):
        assert said in text, said
    assert "against **constant of least AbsRel**" not in text
    assert "against **first held**" not in text
    figure = egom2p_pictures.curves({"gaze": [{"step": 1, "loss": 2.0}]}, "loss")
    (label,) = figure.axes[0].get_legend().get_texts()
    assert label.get_text() == "gaze proxy"


@pytest.mark.parametrize("masking", ["dirichlet", "uniform"])
def test_a_report_tells_a_focus_only_of_masks_that_have_one(masking):
    config = run.Config(masking=masking, seed=1)
    history, records = [{"step": 3, "eval/loss": 1.0}], [{"waiting": 0.5}, {"step": 1}]
    told = " ".join(run._about(config, 2, clips(), history, records))
    assert "waited for batches 50.00%" in told
    assert "waited" not in " ".join(run._about(config, 2, clips(), history, []))
    assert f"{masking} masks" in told
    assert "3 with gaze proxy" in told
    assert ("focus 0.75" in told) == (masking == "dirichlet")
    assert "seed 2" in told


def test_of_no_complete_clip_none_is_drawn():
    some = clips()
    assert egom2p_report.moving(some, count=2) == [0, 2]
    present = some.present | {"gaze": np.zeros(3, bool)}
    assert egom2p_report.moving(some._replace(present=present)) == []


def test_arrays_that_were_made_are_whole_or_those_before(tmp_path, monkeypatch):
    x = clips(1).arrays["depth"][0]
    egom2p_pictures.write_made(tmp_path, {"depth": x}, {})
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        egom2p_pictures.write_made(tmp_path, {"depth": x + 1}, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_parameters_are_on_the_device_once(tmp_path):
    params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    egom2p_model.save_params(tmp_path / "params", params)
    found = egom2p_model.load_params(tmp_path / "params")
    assert isinstance(found["a"]["kernel"], jax.Array)
    np.testing.assert_array_equal(found["a"]["kernel"], params["a"]["kernel"])


def test_rows_are_spread_evenly():
    np.testing.assert_array_equal(training.spread(10, 5), [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(training.spread(3, 5), [0, 1, 2])


def test_the_paths_first_held_is_no_motion():
    held = egom2p_evaluation.copy_first("camera", clips().arrays["camera"])
    np.testing.assert_array_equal(held, np.tile(np.eye(4), (3, 64, 1, 1)))
    ate = egom2p_evaluation.score("camera", held, clips().arrays["camera"])["ATE"]
    np.testing.assert_allclose(ate, np.sqrt(np.mean(np.linspace(0, 3, 64) ** 2)), 1e-5)


def test_intervals_cover_the_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(100):
        values = rng.normal(1.0, 1.0, 50)
        values[:5] = np.nan
        mean, low, high, _ = egom2p_evaluation.bootstrap(values, seed=seed)
        assert low < mean < high
        hits += low < 1.0 < high
    assert 86 <= hits <= 100


@pytest.mark.parametrize(
    ("inputs", "targets", "ids"), [(128, 64, 64), (8, 128, 64), (16, 64, 1024)]
)
def test_flops_by_formula_are_those_of_the_compiler(inputs, targets, ids):
    """Without a loop, whose body it counts once; what is no product is a few percent.

    Abstract: nothing is computed.
    """
    shape = Shape(width=64, heads=2, encoder_depth=1, decoder_depth=3)
    small = tuple(m._replace(vocabulary=ids) for m in egom2p_plan.PAPER)

    def slots(count):
        return Slots(
            jax.ShapeDtypeStruct((1, count), np.int32),
            jax.ShapeDtypeStruct((1, count), bool),
        )

    def loss(params, ids, masks):
        return egom2p.loss(params, ids, masks, modalities=small, shape=shape)[0]

    params = jax.eval_shape(
        lambda key: egom2p.init(key, small, shape), jax.random.key(0)
    )
    clip = jax.ShapeDtypeStruct((1, sum(m.length for m in small)), np.int32)
    program = jax.jit(jax.value_and_grad(loss)).lower(
        params, clip, Masks(slots(inputs), slots(targets))
    )
    counted = program.compile().cost_analysis()["flops"]
    by_formula = egom2p_plan.step_flops(shape, inputs, targets, small)
    assert by_formula == pytest.approx(counted, rel=0.07)


def test_flops_of_what_is_computed_again():
    """Blocks once more with `remat`, logits once more in chunks."""
    plain = Shape(width=64, heads=2, encoder_depth=2, decoder_depth=1)
    flops = functools.partial(egom2p_plan.step_flops, inputs=32, targets=16)
    ids = sum(m.vocabulary for m in egom2p_plan.PAPER)
    head = 16 * 2 * 64 * ids
    assert flops(plain._replace(chunk=8)) - flops(plain) == head
    blocks = flops(plain) / 3 - head
    assert flops(plain._replace(remat=True)) - flops(plain) == pytest.approx(blocks)


def test_the_papers_size_compiles_for_meshes_that_are_not_there(tmp_path):
    """Of a flagfile's settings but for the mesh and the batch, to be brief."""
    config = from_flagfile(egom2p_plan.Config, "egom2p/gpu_8", output_dir=str(tmp_path))
    config = dataclasses.replace(config, mesh="data=2,fsdp=2,tensor=2", batch=8)
    plan = egom2p_plan.run(config)
    assert plan.devices == 8
    assert 350e6 < plan.parameters < 450e6
    # Parameters and two moments in float32, over fsdp and tensor but for small leaves.
    assert 12 * plan.parameters / 4 <= plan.state < 12.5 * plan.parameters / 4
    assert plan.temporaries > 0
    assert {"all-reduce", "all-gather"} <= set(plan.exchanged)
    assert "as compiled for a CPU" in (tmp_path / "report.md").read_text()
    for name in ("v5e_256", "gpu_8"):
        told = from_flagfile(egom2p_plan.Config, f"egom2p/{name}")
        axes = sharding.parse_axes(told.mesh)
        assert told.batch % np.prod(list(axes.values())) == 0


def test_the_benchmark_measures_a_step_masks_and_a_batch(tmp_path):
    config = benchmark_egom2p.Config(
        sizes="mini", batch=2, repeats=1, output_dir=str(tmp_path)
    )
    found = benchmark_egom2p.run(config)
    assert set(found) == {"mini", "mini and masks", "masks", "batch"}
    assert all(ms > 0 for ms in found.values())
    report = (tmp_path / "report.md").read_text()
    assert "masks alone" in report
    assert "making a batch (at most waited for)" in report
    with pytest.raises(ValueError, match="sizes: got 'huge'"):
        benchmark_egom2p.run(dataclasses.replace(config, sizes="huge"))


def test_embeddings_and_head_begin_as_the_codes_geometry():
    """Cosines of embeddings are about those of codes, and of the head's columns too."""
    config = tokenizers.Config("gaze", codes=3, width=8, blocks=1, heads=2, samples=8)
    codes = np.array([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]) @ np.eye(2, 32)
    variables = {"codebook": SimpleNamespace(codes=codes)}
    tokenizer = tokenizers.Tokenizer(config, variables, None)
    params = {"token_embedding": np.zeros((3, 512)), "head": np.zeros((512, 3))}
    made = training.with_codebooks(
        jax.tree.map(jax.numpy.asarray, params), {"gaze": tokenizer}, jax.random.key(0)
    )
    for x in (made["token_embedding"], made["head"].T):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(x @ x.T, codes @ codes.T, atol=0.1)
    # Embeddings are as large as places: sines and cosines are .71 on average.
    assert np.sqrt((made["token_embedding"] ** 2).mean()) == pytest.approx(0.8, abs=0.1)
    # Restored tokenizers lie on one device, parameters are born on all of a mesh.
    there = jax.device_put(codes, jax.devices()[0])
    of_one = tokenizer._replace(variables={"codebook": SimpleNamespace(codes=there)})
    mesh = sharding.make_mesh({"data": 8})
    born = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    cut = training.with_codebooks(born, {"gaze": of_one}, jax.random.key(0))
    chex.assert_trees_all_close(cut, made, rtol=1e-6)


@pytest.mark.parametrize("kind", ["depth", "gaze"])
def test_patches_come_back(kind):
    sizes = {"width": 8, "frames": 8, "size": 16, "samples": 16}
    made = tokenizers.Config(kind, **sizes)
    shape = (8, 16, 16, 1) if kind == "depth" else (16, 2)
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    cut = egom2p_regressor.patches(made, x)
    assert cut.shape[1] == np.prod(types.grid(made))
    np.testing.assert_array_equal(egom2p_regressor.signal_of(made, cut), x)


def test_a_specialists_masks_show_one_modality_and_ask_for_another():
    names = [m.name for m in MODALITIES]
    settings = training.Settings(inputs=6, targets=5, task=(names[0], names[2]))
    masks = training.task_masks(jax.random.key(0), 7, MODALITIES, settings)
    of = modality_of(MODALITIES)
    for slots, wanted, room in ((masks.inputs, 0, 6), (masks.targets, 2, 5)):
        position, valid = map(np.asarray, slots)
        count = min(MODALITIES[wanted].length, room)
        np.testing.assert_array_equal(valid.sum(axis=1), count)
        assert (of[position[valid]] == wanted).all()


def test_verdicts_follow_the_interval_of_paired_differences():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 60)) * 10

    def run(shift, seed):
        return {
            task.name: {
                "": {
                    name: base[seed] + (shift if more else -shift)
                    for name, (_, more) in MEASURES[task.wanted].items()
                }
            }
            for task in TASKS
        }

    first, second = ([run(s, i) for i in range(2)] for s in (1.0, 0.0))
    total = sum(len(MEASURES[task.wanted]) for task in TASKS)
    for a, b, said in ((first, second, "better"), (second, first, "worse")):
        text, count = egom2p_report.compared(a, b, ("a", "b"))
        assert count[said] == total
        assert "+- " in text
    noise = [
        jax.tree.map(lambda x: np.asarray(x + rng.normal(size=60)), m) for m in first
    ]
    _, count = egom2p_report.compared(noise, first, ("a", "b"))
    assert count["undecided"] >= total - 2
