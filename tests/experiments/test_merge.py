"""The command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import merge, parsing
from multitask_jax import merging
from multitask_jax.merging.core import statistics_kind
from tests.merging.common import (
    assert_same_bits,
    load,
    make_models,
    merged,
    random_statistics,
    save,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def inputs(tmp_path):
    base, models = make_models(2)
    save(tmp_path / "base", base)
    for t, m in enumerate(models):
        save(tmp_path / f"m{t}", m)
    paths = f"{tmp_path / 'm0'},{tmp_path / 'm1'}"
    return {"base": str(tmp_path / "base"), "models": paths}, base, models


def run(tmp_path, inputs, **kwargs):
    out = tmp_path / "out"
    result = merge.run(
        merge.Config(**inputs, output=str(out), progress=False, report=False, **kwargs)
    )
    return result, load(out)


def test_flags_reach_the_method(tmp_path, inputs):
    config, base, models = inputs
    _, got = run(
        tmp_path,
        config,
        method="ties",
        density="0.3,0.5",
        weights="1,0.5",
        scale=0.7,
        trim_scope="tensor",
        election="weighted_mass",
        zero_sign="positive",
        lines_alpha=0.2,
        lines_beta=0.6,
        exclude="scale",
        max_shard_size="200KB",
    )
    method = merging.with_lines(
        merging.ties(
            density=(0.3, 0.5),
            scale=0.7,
            trim_scope="tensor",
            election="weighted_mass",
            zero_sign="positive",
        ),
        alpha=0.2,
        beta=0.6,
    )
    want = merged(method, base, models, weights=[1, 0.5], exclude="scale")
    assert_same_bits(got, {k: got[k].dtype.type(0) + v for k, v in flat(want).items()})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_knots_merges_as_it_is_told(tmp_path):
    base, models = make_models(2, rows=2, blocks=1)
    paths = [save(tmp_path / n, m) for n, m in zip("xab", (base, *models), strict=True)]
    config = {"base": str(paths[0]), "models": f"{paths[1]},{paths[2]}"}
    options = {"combine_by": "dare_ties", "seed": 3, "input_axis": "first", "eps": 1e-3}
    _, got = run(tmp_path, config, method="knots", density="0.5", **options)
    method = merging.knots(density=0.5, **options)
    for k, v in flat(merged(method, base, models)).items():
        np.testing.assert_allclose(got[k], v, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wudi", {"iterations": 3}),
        ("iso_cts", {"common_fraction": 0.5}),
        ("sce", {"topk": 0.5, "at_least": 0}),
    ],
)
def test_options_of_single_methods(tmp_path, name, options):
    base, models = make_models(2, rows=2, blocks=1)
    paths = [save(tmp_path / n, m) for n, m in zip("xab", (base, *models), strict=True)]
    config = {"base": str(paths[0]), "models": f"{paths[1]},{paths[2]}"}
    _, got = run(tmp_path, config, method=name, **options)
    want, plain = (
        flat(merged(merging.METHODS[name](**o), base, models)) for o in (options, {})
    )
    for k, v in want.items():
        np.testing.assert_allclose(got[k], v, atol=1e-5)
    assert any((got[k] != v).any() for k, v in plain.items())


@pytest.mark.parametrize(("flag", "alpha"), [("0.25", 0.25), ("norm", "norm")])
def test_lines_alpha_is_a_number_or_norm(tmp_path, inputs, flag, alpha):
    config, base, models = inputs
    _, got = run(tmp_path, config, method="ties", lines_alpha=flag, lines_beta=0.5)
    method = merging.with_lines(merging.ties(), alpha=alpha, beta=0.5)
    for k, v in flat(merged(method, base, models)).items():
        np.testing.assert_allclose(got[k], v, atol=1e-6)


def flat(params):
    from multitask_jax import tree

    return {k: np.asarray(v) for k, v in tree.flatten(params).items()}


@pytest.mark.parametrize("name", sorted(merging.METHODS))
def test_every_method_runs_with_its_defaults(tmp_path, name):
    base, models = make_models(2, rows=2, blocks=1)
    # Two shapes: some methods compile for each.
    base, *models = ({"block_0": {"mlp": x["block_0"]["mlp"]}} for x in (base, *models))
    paths = [save(tmp_path / n, m) for n, m in zip("xab", (base, *models), strict=True)]
    options = {}
    kind = statistics_kind(merging.METHODS[name]())
    if kind is not None:
        known = random_statistics(kind, base, 2)
        files = [
            merging.save_statistics(p / "known.safetensors", s)
            for p, s in zip(paths[1:], known, strict=True)
        ]
        options = {"statistics": ",".join(map(str, files))}
    chosen = paths[1:2] if merging.METHODS[name]().models == 1 else paths[1:]
    config = {"base": str(paths[0]), "models": ",".join(map(str, chosen))}
    _, got = run(tmp_path, config, method=name, **options)
    assert got.keys() == flat(base).keys()
    assert any(not np.array_equal(got[k], x) for k, x in flat(base).items())


def test_without_a_base_spheres_are_of_parameters(tmp_path, inputs):
    config, _, models = inputs
    for name in ("nuslerp", "multislerp", "karcher"):
        run(tmp_path, config | {"base": None}, method=name, overwrite=True)
        got = load(tmp_path / "out")
        method = merging.METHODS[name](space="parameters")
        want = flat(merged(method, models[0], models))
        for k, v in want.items():
            np.testing.assert_allclose(got[k], v, atol=5e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "tie"}, "got 'tie', expected one of .*did you mean ties"),
        ({"method": "linear", "density": "0.2"}, "--density: linear does not take it"),
        ({"weights": "1,x"}, "--weights: got '1,x', expected numbers"),
        ({"weights": "1"}, "got 1 weights for 2 models"),
        ({"density": "1.5"}, r"density: got 1.5, expected a number in \(0, 1\]"),
        ({"density": "0.1,0.2,0.3"}, "got 3 densities for 2 models"),
        ({"normalise": "true"}, "--normalise: got True, expected weights or count"),
        ({"lines_beta": 0.5}, "--lines_beta needs --lines_alpha"),
        ({"max_shard_size": "big"}, "expected a size like 5GB"),
        ({"allow_missing": "all"}, "--allow_missing: got 'all'"),
        ({"output_format": "gguf"}, "got format 'gguf'"),
        ({"method": "knots", "combine_by": "sum"}, "combine_by: got 'sum', expected"),
        ({"lines_alpha": "norm"}, "--lines_alpha=norm needs --lines_beta"),
        ({"lines_alpha": "auto"}, "--lines_alpha: got 'auto', expected a number"),
        ({"lines_alpha": "nan"}, "--lines_alpha: got 'nan', expected a number"),
        ({"lines_alpha": 0.5, "block_pattern": "x(y)"}, "can't tell the blocks"),
        ({"method": "emr", "lines_alpha": 0.5}, "LiNeS would change the vector"),
        (
            {"method": "pcb", "density": "0.1,0.2"},
            r"density: got \(0.1, 0.2\), expected",
        ),
    ],
)
def test_wrong_flags(tmp_path, inputs, kwargs, message):
    config, _, _ = inputs
    with pytest.raises(ValueError, match=message):
        run(tmp_path, config, **kwargs)
    assert not (tmp_path / "out").exists()


def test_no_models_or_output():
    with pytest.raises(ValueError, match="--models: got none"):
        merge.run(merge.Config(base="b", output="o"))
    with pytest.raises(ValueError, match="--output: got none"):
        merge.run(merge.Config(base="b", models="m"))


def test_sizes():
    assert parsing.size_in_bytes("x", "5GB") == 5 * 10**9
    assert parsing.size_in_bytes("x", "512MiB") == 512 * 2**20
    assert parsing.size_in_bytes("x", "1.5k") == 1500
    assert parsing.size_in_bytes("x", None) is None


def test_the_script(tmp_path, inputs, capsys):
    """Flagfile, progress bar, report, exit codes: as a user meets them."""
    config, _, _ = inputs

    def script(*flags):
        return subprocess.run(
            [sys.executable, "-m", "experiments.merge", *flags],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )

    common = [f"--base={config['base']}", f"--models={config['models']}"]
    flagfile = "--flagfile=experiments/flagfiles/merge/ties_lines.flags"
    done = script(flagfile, *common, f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "merged 2 models" in done.stdout
    assert "merging: 100%" in done.stderr
    report = (tmp_path / "out" / "merge_report.md").read_text()
    assert "--lines_beta=0.7" in report

    again = script(*common, f"--output={tmp_path / 'out'}")
    assert again.returncode == 1
    assert "error: " in again.stderr
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr

    merge.run(merge.Config(**config, dry_run=True))
    assert "passes       3" in capsys.readouterr().out

    text = script("--help").stdout
    for name in merging.METHODS:
        assert f"{name}: " in text


def test_flagfiles_name_flags_that_exist():
    folder = REPOSITORY / "experiments" / "flagfiles" / "merge"
    fields = {f.name for f in merge.dataclasses.fields(merge.Config)}
    files = sorted(folder.glob("*.flags"))
    assert files
    for file in files:
        lines = [s for s in file.read_text().splitlines() if s.startswith("--")]
        names = {s[2:].split("=")[0] for s in lines}
        assert names <= fields | {"flagfile"}
