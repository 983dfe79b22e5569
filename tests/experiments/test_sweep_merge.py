"""Sweeps against a planted optimum, stopped and resumed, and refused."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import candidates, merge, sweep_merge
from multitask_jax import merging, tree
from tests.merging.common import assert_same_bits, load, save

REPOSITORY = Path(__file__).resolve().parents[2]
SCORES = '''
import json
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from multitask_jax import tree

target = dict(np.load(Path(__file__).parent / "target.npz"))
calls = 0

def closeness(params):
    """-|params - target|^2"""
    global calls
    calls += 1
    found = tree.flatten(params)
    assert set(found) == set(target) | {"steps"}
    return -sum(jnp.sum((found[k] - v) ** 2) for k, v in target.items())

def distance(params):
    return -closeness(params)

def half_nan(params):
    value = closeness(params)
    return value if params["layers_0"]["w"][0, 0] > middle else float("nan")

def always_nan(params):
    return jnp.nan * closeness(params)

def a_vector(params):
    return params["layers_0"]["w"][0]

def a_word(params):
    return "good"

def fails(params):
    return params["lm_head"]

def in_python(params):
    return float(closeness(params))

not_callable = 3
'''


def make(seed):
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.standard_normal((7, 4)).astype(np.float32),
        **{
            f"layers_{i}": {"w": rng.standard_normal((4, 5)).astype(np.float32)}
            for i in range(3)
        },
        "steps": np.array([2**40 + 1]),
    }


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Checkpoints, and a scoring module whose best is base + .7 sum tau."""
    base = make(0)
    models = [
        jax.tree.map(lambda b, x: b if b.dtype == int else b + 0.1 * x, base, make(s))
        for s in (1, 2)
    ]
    save(tmp_path / "base", base)
    for t, m in enumerate(models):
        save(tmp_path / f"m{t}", m)
    target = {
        k: b + 0.7 * sum(tree.flatten(m)[k] - b for m in models)
        for k, b in tree.flatten(base).items()
        if k != "steps"
    }
    np.savez(tmp_path / "target.npz", **target)
    middle = float(target["layers_0/w"][0, 0])
    (tmp_path / "my_scores.py").write_text(f"{SCORES}\nmiddle = {middle}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    return base, models, target


def config(score="closeness", **fields):
    given = {"base": "base", "models": "m0, m1", "method": "task_arithmetic"}
    given |= {"workdir": "work", "progress": False, "report": False}
    return sweep_merge.Config(score=f"my_scores:{score}", **given | fields)


def calls():
    return sys.modules["my_scores"].calls


def test_grid_finds_the_planted_scale(inputs, capsys):
    _, _, target = inputs
    result = sweep_merge.run(config(ranges="scale=0:1:11", output="out"))
    assert result.coefficients == {"scale": 0.7}
    assert len(result.log) == 11
    assert result.score == pytest.approx(0, abs=1e-10)
    curve = [e["score"] for e in result.log]  # a parabola around it
    want = [curve[0] * ((s / 10 - 0.7) / 0.7) ** 2 for s in range(11)]
    np.testing.assert_allclose(curve, want, rtol=1e-4, atol=1e-6)
    # What is written is what was scored, and what the command line writes.
    got = load(Path("out"))
    for k, v in target.items():
        np.testing.assert_allclose(got[k], v, atol=1e-6)
    assert got["steps"] == 2**40 + 1
    report = Path("work/report.md").read_text()
    assert result.command in report
    assert "edge" not in report
    words = shlex.split(result.command)
    assert words[:3] == ["python", "-m", "experiments.merge"]
    flags = dict(w[2:].split("=", 1) for w in words[3:])
    assert flags.pop("output") == "out"
    flags["scale"] = float(flags["scale"])
    again = merge.Config(**flags, output="again", progress=False, report=False)
    merge.run(again)
    assert_same_bits(load(Path("again")), got)
    assert Path("work/sweep.png").stat().st_size > 1000
    assert "best of 11" in capsys.readouterr().out


def test_the_report_tells_of_edges(inputs):
    sweep_merge.run(config(ranges="scale=0:0.5:3,normalise=true|false"))
    report = Path("work/report.md").read_text()
    assert "- scale = 0.5 is at the edge of its range." in report
    assert "--normalise=false" in report  # sum tau, not its mean


def test_gradient_finds_the_planted_scale_and_weights(inputs):
    result = sweep_merge.run(
        config(search="gradient", ranges="weights=0:1", budget=60, learning_rate=0.1)
    )
    found = [result.coefficients[f"weights[{t}]"] for t in range(2)]
    np.testing.assert_allclose(found, 0.7, atol=5e-3)
    assert calls() == 1  # traced once
    assert f"--weights={found[0]},{found[1]}" in result.command
    # The derivative of -|(s - .7) sum tau|^2.
    result = sweep_merge.run(
        config(search="gradient", ranges="scale=0:2", budget=30, workdir="work2")
    )
    for e in result.log:
        s, slope = e["coefficients"]["scale"], e["gradient"]["scale"]
        if abs(s - 0.7) > 0.05:
            assert slope == pytest.approx(2 * e["score"] / (s - 0.7), rel=1e-3)
    assert result.coefficients["scale"] == pytest.approx(0.7, abs=0.05)


def test_cma_es_finds_the_planted_optimum(inputs):
    pytest.importorskip("cmaes")
    result = sweep_merge.run(
        config(
            "distance",
            search="cmaes",
            ranges="scale=0:2,lines_beta=-1:1",
            lines_alpha="1",
            minimise=True,
            budget=120,
        )
    )
    assert result.coefficients["scale"] == pytest.approx(0.7, abs=0.05)
    assert result.coefficients["lines_beta"] == pytest.approx(0, abs=0.1)
    assert len(result.log) == 120
    assert "lowest" in Path("work/report.md").read_text()


@pytest.mark.parametrize("search", ["grid", "cmaes", "gradient"])
def test_a_stopped_sweep_goes_on(inputs, monkeypatch, search):
    fields = {"search": search, "ranges": "scale=0:1", "budget": 8}
    if search == "cmaes":
        pytest.importorskip("cmaes")
    if search == "grid":
        fields |= {"ranges": "scale=0:1:5"}
    whole = sweep_merge.run(config(**fields, workdir="whole"))
    before = calls()

    # Stopped in the third candidate, in the middle of a line of the log.
    evaluate = candidates.Candidates.value
    if search == "gradient":
        evaluate = candidates.Candidates.value_and_gradient
    tries = []

    def stops(self, coefficients):
        tries.append(coefficients)
        if len(tries) == 3:
            raise KeyboardInterrupt
        return evaluate(self, coefficients)

    with monkeypatch.context() as m:
        m.setattr(candidates.Candidates, evaluate.__name__, stops)
        with pytest.raises(KeyboardInterrupt):
            sweep_merge.run(config(**fields))
    metrics = Path("work/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 2
    with metrics.open("a") as file:
        file.write('{"evaluation": 2, "coeff')

    tries.clear()
    with monkeypatch.context() as m:
        m.setattr(
            candidates.Candidates,
            evaluate.__name__,
            lambda self, c: (tries.append(c), evaluate(self, c))[1],
        )
        resumed = sweep_merge.run(config(**fields))
    assert len(tries) == len(whole.log) - 2
    assert resumed.coefficients == whole.coefficients
    for a, b in zip(whole.log, resumed.log, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert lines == resumed.log

    # Finished: nothing is read or tried again.
    monkeypatch.setattr(candidates, "read_inputs", None)
    assert sweep_merge.run(config(**fields)).log == resumed.log
    assert calls() > before


def test_another_sweep_is_refused(inputs):
    sweep_merge.run(config(ranges="scale=0:1:3"))
    sweep_merge.run(config(ranges="scale=0:1:3", budget=10, output="out"))  # the same
    with pytest.raises(ValueError, match=r"'scale=0:1:3' then, 'scale=0:1:4' now"):
        sweep_merge.run(config(ranges="scale=0:1:4"))
    with pytest.raises(ValueError, match=r"weights \(None then, '1,2' now\)"):
        sweep_merge.run(config(ranges="scale=0:1:3", weights="1,2"))
    save(Path("m1b"), make(5))
    (Path("m1b") / "model.safetensors").rename(Path("m1") / "model.safetensors")
    with pytest.raises(ValueError, match=r"other inputs \(changed since\)"):
        sweep_merge.run(config(ranges="scale=0:1:3"))


def test_a_changed_score_is_refused(inputs, monkeypatch):
    sweep_merge.run(config(ranges="scale=0:1:3"))
    monkeypatch.delitem(sys.modules, "my_scores")
    with Path("my_scores.py").open("a") as file:
        file.write("# other\n")
    with pytest.raises(ValueError, match=r"score_module \(changed since\)"):
        sweep_merge.run(config(ranges="scale=0:1:3"))


def test_scores_that_are_nan(inputs):
    result = sweep_merge.run(config("half_nan", ranges="scale=0:1:11"))
    scores = [e["score"] for e in result.log]
    assert 0 < scores.count(None) < 11
    assert scores[round(result.coefficients["scale"] * 10)] is not None
    assert f"{scores.count(None)} scores were NaN" in Path("work/report.md").read_text()
    with pytest.raises(ValueError, match="all 3 scores are NaN"):
        sweep_merge.run(config("always_nan", ranges="scale=0:1:3", workdir="work2"))
    gradient = config(
        "always_nan", search="gradient", ranges="scale=0:1", workdir="work3"
    )
    with pytest.raises(ValueError, match=r"the score at .* is nan"):
        sweep_merge.run(gradient)


MERGES = {
    "ties": ({"scale": 0.8, "density": 0.3, "lines_beta": 0.5}, {"lines_alpha": "0.2"}),
    "dare": ({"density": 0.5, "seed": 3.0, "weights[1]": 0.4}, {}),
    "slerp": ({"t": 0.3, "lines_alpha": 0.5}, {}),
    "passthrough": ({"scale": 0.5}, {"models": "m0"}),
    "consensus": ({"k": 1.0, "scale": 0.5}, {"exclude": "layers_2"}),
    "task_arithmetic": (
        {"lines_beta": 0.5, "weights[0]": 0.3},
        {"lines_alpha": "norm"},
    ),
    "sce": (
        {"lines_beta": 0.5, "scale": 2.0},
        {"lines_alpha": "norm", "include": "layers"},
    ),
}


@pytest.mark.parametrize("method", sorted(MERGES))
def test_candidates_are_what_merge_makes(inputs, method):
    """Whether split at what only scales, or not."""
    base, models, _ = inputs
    coefficients, fields = MERGES[method]
    count = 1 if "models" in fields else 2
    given = config(method=method, **fields)
    given = sweep_merge.dataclasses.replace(
        given, models=",".join(f"m{t}" for t in range(count))
    )
    built = merge.build_method(candidates.config_at(given, coefficients))
    read = candidates.read_inputs(given, built)
    kept = []
    found = candidates.Candidates(given, read, lambda p: kept.append(p) or 0.0)
    found.value(coefficients)
    assert kept[0].pop("steps") == 2**40 + 1
    for x in (base, *models):
        del x["steps"]
    want = jax.jit(
        lambda b, ms: merging.merge(
            built,
            b,
            ms,
            weights=candidates.weights_at(given, coefficients, count),
            exclude=fields.get("exclude"),
            include=fields.get("include"),
        )
    )(base, models[:count])
    close = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), kept[0], want)
    assert jax.tree.all(close)
    # What comes before the scales is done once, where nothing traced has a part in it.
    program, _ = found._at(coefficients)
    split = isinstance(program.arguments[1], tuple)
    assert split is (method in ("ties", "consensus", "sce"))


@pytest.mark.parametrize(
    ("method", "kind", "ranges"),
    [
        ("regmean", "gram", "off_diagonal=0.5|1,weights=1|2"),
        ("fisher", "fisher", "fisher_floor=1e-6|1e-2"),
        ("fisher", "fisher", "lines_alpha=0.3|1"),
    ],
)
def test_statistics_are_read(inputs, method, kind, ranges):
    """The scores are those of what merge writes with the same files."""
    base, _, target = inputs
    rng = np.random.default_rng(5)

    def gram():
        x = rng.standard_normal((9, 4)).astype(np.float32)
        return merging.Gram(x.T @ x, (0,))

    files = []
    for t in range(2):
        known = {f"layers_{i}/w": gram() for i in range(3)}
        if kind == "fisher":
            known = {k: rng.random(v.shape) for k, v in tree.flatten(base).items()}
        files.append(str(merging.save_statistics(f"{t}.safetensors", known)))
    given = config(method=method, ranges=ranges, statistics=", ".join(files))
    given = sweep_merge.dataclasses.replace(given, output="out", models="m0, m1,")
    result = sweep_merge.run(given)
    out = load(Path("out"))
    score = -sum(np.sum((out[k] - v) ** 2) for k, v in target.items())
    assert result.score == pytest.approx(score, rel=1e-3)
    assert len({e["score"] for e in result.log}) > 1
    assert "--statistics" in result.command
    merging.save_statistics(files[0], known, examples=3, overwrite=True)
    with pytest.raises(ValueError, match="work"):  # another sweep: the file changed
        sweep_merge.run(sweep_merge.dataclasses.replace(given, overwrite=True))
    one = {"statistics": files[0], "workdir": "other"}
    with pytest.raises(ValueError, match="sets of statistics for 2"):
        sweep_merge.run(config(method=method, ranges=ranges, **one))


def test_statistics_are_needed(inputs):
    with pytest.raises(ValueError, match="needs fisher statistics"):
        sweep_merge.run(config(method="fisher", ranges="fisher_floor=0.1|1"))
    assert not Path("work/metrics.jsonl").exists()


def test_one_program_serves_all_traced_candidates(inputs):
    given = sweep_merge.dataclasses.replace(config(method="ties"), models="m0,m1")
    built = merge.build_method(given)
    read = candidates.read_inputs(given, built)
    found = candidates.Candidates(given, read, lambda p: jnp.sum(p["embed"]))
    programs = []
    for density in (0.2, 0.5):
        for scale in (0.5, 1.0, 1.5):
            at = {"density": density, "scale": scale}
            found.value(at)
            programs.append(found._at(at)[0].merged)
    assert len(set(map(id, programs))) == 2
    assert [p._cache_size() for p in programs] == [1] * 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranges": "density=0.1|0.2"}, "task_arithmetic has no coefficient 'density'"),
        ({"ranges": "weights[2]=0:1:3"}, r"weights\[2\], but there are 2 models"),
        ({"ranges": "weights=0:1:3,weights[0]=1"}, r"weights\[0\] is there twice"),
        ({"ranges": "scale=a|b"}, "got scale=a|b, expected numbers"),
        ({"ranges": "scale=0:1:3", "scale": 2.0}, "--scale is given, and searched too"),
        ({"ranges": "lines_beta=0:1:3"}, "--lines_beta needs --lines_alpha"),
        ({"ranges": "scale=0:1:9", "budget": 8}, "9 candidates, more than --budget=8"),
        ({"ranges": "scale=0:1:9", "budget": 0}, "--budget: got 0"),
        ({"ranges": "seed=0.5|1", "method": "dare"}, "seed takes whole numbers"),
        ({"ranges": "scale=0:1:3", "models": ""}, "--models: got none"),
        ({"ranges": "scale=0:1:3", "models": "m0,m9"}, "m9: no such file"),
        ({"ranges": "scale=0:1:3", "base": None}, "needs a base"),
        ({"ranges": "scale=0:1:3", "weights": "1"}, "got 1 weights for 2 models"),
        ({"ranges": "scale=0:1:3", "output": "base"}, "overlap"),
        ({"ranges": "scale=0:1:3", "dry_run": True}, "--dry_run"),
        (
            {"ranges": "density=0.1:0.9", "method": "ties", "search": "gradient"},
            "density can't be differentiated",
        ),
        (
            {"ranges": "scale=0:1", "search": "gradient", "learning_rate": 0.0},
            "--learning_rate: got 0",
        ),
        ({"ranges": "scale=0:1:3", "score": "my_scores"}, "expected module:function"),
        ({"ranges": "scale=0:1:3", "score": "my_score:f"}, "no module 'my_score'"),
        (
            {"ranges": "scale=0:1:3", "score": "my_scores:f"},
            "has no function 'f'; it has closeness",
        ),
        ({"ranges": "scale=0:1:3", "score": "my_scores:not_callable"}, "no function"),
        (
            {"ranges": "scale=0:1:3", "score": "my_scores:a_vector"},
            r"of shape \(5,\), expected one number",
        ),
        ({"ranges": "scale=0:1:3", "score": "my_scores:a_word"}, "returned str"),
        (
            {
                "ranges": "scale=0:1",
                "score": "my_scores:in_python",
                "search": "gradient",
            },
            "can't be differentiated; keep it in jax.numpy",
        ),
    ],
)
def test_wrong_flags(inputs, fields, message):
    given = sweep_merge.dataclasses.replace(config(), **fields)
    with pytest.raises(ValueError, match=message):
        sweep_merge.run(given)
    assert not Path("work/report.md").exists()


def test_what_failed_at_once_does_not_keep_the_directory(inputs):
    with pytest.raises(ValueError, match="expected one number"):
        sweep_merge.run(config("a_word", ranges="scale=0:1:3"))
    assert sweep_merge.run(config(ranges="scale=0:1:2")).log


def test_a_failing_score_shows_where(inputs):
    with pytest.raises(RuntimeError, match="--score failed: KeyError") as e:
        sweep_merge.run(config("fails", ranges="scale=0:1:3"))
    assert isinstance(e.value.__cause__, KeyError)


def test_inputs_that_merge_would_refuse(inputs):
    base, _, _ = inputs
    base["embed"][0, 0] = np.nan
    save(Path("bad"), base)
    with pytest.raises(ValueError, match="tensor 'embed' has NaN"):
        sweep_merge.run(config(models="bad,m1", ranges="scale=0:1:3"))


def test_the_script(inputs):
    """Flagfile and exit codes, as a user meets them."""
    flagfile = REPOSITORY / "experiments/flagfiles/sweep_merge/ties_lines_beta.flags"
    command = [sys.executable, "-m", "experiments.sweep_merge"]
    command += [f"--flagfile={flagfile}", "--base=base", "--models=m0,m1"]
    command += ["--workdir=work", "--score=my_scores:closeness"]

    def script(*flags):
        environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            [*command, *flags], capture_output=True, text=True, env=environment
        )

    done = script()
    assert done.returncode == 0, done.stderr
    assert "best of 15" in done.stdout
    assert "--lines_alpha=norm" in done.stdout
    assert "15/15" in done.stderr
    other = script("--ranges=lines_beta=0:1:3")
    assert other.returncode == 1
    assert "error: work holds another sweep" in other.stderr
    assert "Traceback" not in other.stderr


def test_flagfiles_name_flags_that_exist():
    files = sorted((REPOSITORY / "experiments/flagfiles/sweep_merge").glob("*.flags"))
    fields = {f.name for f in sweep_merge.dataclasses.fields(sweep_merge.Config)}
    assert files
    for file in files:
        lines = [s for s in file.read_text().splitlines() if s.startswith("--")]
        assert {s[2:].split("=")[0] for s in lines} <= fields
