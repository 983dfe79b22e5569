"""What every method owes its users, checked for all of `merging.METHODS`."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from multitask_jax import merging, sharding, tree
from tests.merging.common import (
    BRIEFLY,
    FLOATS,
    assert_same_bits,
    make_models,
    random_statistics,
    stream,
)

pytestmark = pytest.mark.optimised


class Case(NamedTuple):
    method: merging.Method
    models: int = 3
    exact: bool = True  # streamed, jitted and sharded agree bit for bit
    leafwise: bool = False  # no collective on a mesh
    # Within 2 ulp of the identity on tiny models, without weights; else within 4.
    tiny: bool = False
    gain: float = 1.0  # how much larger than a task vector a term of a sum can be
    rows: bool = False  # whole rows meet on a device
    # LAPACK between collectives starves the threads of 8 simulated devices on 2 cores.
    devices: int = 8
    spectral: bool = False  # an SVD is as exact as its matrix's condition lets it be
    # Permuting models (and weights) leaves the result as it was, within rounding.
    permuted: merging.Method | None = None
    ordered: bool = False  # it does not: the order means something
    statistics: str | None = None  # of each model's data: fisher or gram


def lines(method: merging.Method) -> merging.Method:
    return merging.with_lines(method, alpha=0.3, beta=0.7)


ties_mergekit = merging.ties(
    trim_scope="tensor", election="weighted_mass", zero_sign="positive"
)
CASES = {
    "linear": Case(merging.linear(), leafwise=True),
    "task_arithmetic": Case(merging.task_arithmetic(scale=0.4), leafwise=True),
    "ties": Case(merging.ties(density=0.3, scale=0.8)),
    "dare": Case(
        merging.dare(density=0.3, seed=3),
        leafwise=True,
        permuted=merging.dare(density=1.0),
    ),
    "dare_ties": Case(
        merging.dare_ties(density=0.4),
        permuted=merging.dare_ties(density=1.0),
    ),
    "magnitude_prune": Case(merging.magnitude_prune(density=0.3)),
    "slerp": Case(merging.slerp(t=0.5), models=2, exact=False),
    "model_stock": Case(merging.model_stock(), exact=False),
    "breadcrumbs": Case(merging.breadcrumbs(density=0.5, gamma=0.05)),
    "breadcrumbs_ties": Case(
        merging.breadcrumbs_ties(density=(0.2, 0.5, 0.8)),
        permuted=merging.breadcrumbs_ties(density=0.5),
    ),
    "della": Case(
        merging.della(density=0.4, seed=3),
        rows=True,
        permuted=merging.della(density=1.0, epsilon=0.0),
    ),
    "della_ties": Case(
        merging.della_ties(density=0.6),
        rows=True,
        permuted=merging.della_ties(density=1.0, epsilon=0.0),
    ),
    "sce": Case(merging.sce(topk=0.4), exact=False),
    "pcb": Case(merging.pcb(density=0.3), exact=False, gain=2.0),
    "arcee_fusion": Case(merging.arcee_fusion(), models=1, exact=False),
    "tall_masks": Case(merging.tall_masks(task=1), leafwise=True, ordered=True),
    "consensus": Case(merging.consensus(), leafwise=True),
    "nuslerp": Case(merging.nuslerp(), models=2, exact=False),
    "multislerp": Case(merging.multislerp(), exact=False),
    "karcher": Case(merging.karcher(max_iter=5), exact=False, tiny=True),
    "nearswap": Case(merging.nearswap(t=0.05), models=1, leafwise=True),
    "magmax": Case(merging.magmax(), leafwise=True, ordered=True),  # a tie: the last
    "ram": Case(merging.ram(), leafwise=True),
    "ramplus": Case(merging.ramplus(r=0.5)),
    "passthrough": Case(merging.passthrough(), models=1, leafwise=True),
    "iso_c": Case(merging.iso_c(), exact=False, spectral=True, devices=2),
    "iso_cts": Case(merging.iso_cts(), exact=False, spectral=True, devices=2),
    "tsv_m": Case(merging.tsv_m(), exact=False, spectral=True, devices=2),
    "knots": Case(merging.knots(density=0.5), exact=False, spectral=True, devices=2),
    "wudi": Case(merging.wudi(iterations=5), exact=False, gain=3.0),
    "emr": Case(merging.emr(), leafwise=True),
    "fisher": Case(merging.fisher(), exact=False, statistics="fisher"),
    "regmean": Case(merging.regmean(), exact=False, statistics="gram", gain=4.0),
    # Variants.
    "ties mergekit": Case(ties_mergekit),
    "ties peft": Case(
        merging.ties(
            trim_scope="tensor",
            election="frequency",
            zero_sign="positive",
            normalise="count",
        )
    ),
    "knots dare_ties": Case(
        merging.knots(combine_by="dare_ties", density=0.5),
        exact=False,
        spectral=True,
        devices=2,
        permuted=merging.knots(combine_by="dare_ties", density=1.0),
    ),
    "ties sum negative": Case(merging.ties(combine="sum", zero_sign="negative")),
    "ties max zero": Case(merging.ties(combine="max", zero_sign="zero")),
    "ties l1": Case(
        merging.ties(trim_scope="tensor", rescale="l1"), exact=False, gain=3.0
    ),
    "dare l1": Case(
        merging.dare(rescale="l1"),
        exact=False,
        gain=2.0,
        permuted=merging.dare(rescale="l1", density=1.0),
    ),
    "model_stock rows": Case(merging.model_stock(filter_wise=True), exact=False),
    "nuslerp rows": Case(merging.nuslerp(flatten=False), models=2, exact=False),
    "nuslerp columns": Case(
        merging.nuslerp(flatten=False, row_wise=True, space="parameters"),
        models=2,
        exact=False,
    ),
    "consensus ties": Case(merging.consensus(multi_task="ties", k=1)),
    "ties lines": Case(lines(merging.ties(density=0.3))),
    "ties lines norm": Case(
        merging.with_lines(merging.ties(density=0.3), alpha="norm", beta=0.7),
        exact=False,
    ),
    "slerp lines norm": Case(
        merging.with_lines(merging.slerp(), alpha="norm", beta=0.7),
        models=2,
        exact=False,
    ),
    "linear lines": Case(lines(merging.linear()), leafwise=True),
    "fisher lines norm": Case(
        merging.with_lines(merging.fisher(), alpha="norm", beta=0.7),
        exact=False,
        statistics="fisher",
    ),
    "fisher plain": Case(
        merging.fisher(normalise=False), leafwise=True, statistics="fisher"
    ),
    "slerp lines": Case(lines(merging.slerp()), models=2, exact=False),
}
WEIGHTS = (1.0, 0.5, 0.8)


def weights_of(case: Case) -> tuple[float, ...] | None:
    return WEIGHTS[: case.models] if case.method.weighted else None


def known(case: Case, base: Any) -> dict[str, Any]:
    """Random statistics of each model, as `merge` takes them."""
    if case.statistics is None:
        return {}
    return {"statistics": random_statistics(case.statistics, base, case.models)}


def test_every_method_has_a_case():
    assert set(merging.METHODS) <= set(CASES)


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    return CASES[request.param]


def small_models(case: Case, dtype: Any = np.float32) -> tuple[Any, list[Any]]:
    """A leaf of several chunks, two of one shape, a vector, a scalar, an empty one.

    What is streamed compiles for each size of a chunk, or for each shape of whole rows:
    here all leaves fit the smallest chunk, and rows have three lengths.
    """
    base, models = make_models(case.models, dtype, rows=10, blocks=2)
    for x in (base, *models):
        del x["block_0"]["mlp"]["bias"], x["block_1"]["attention"]
        heads, x["embed"] = x["embed"][:2], x["embed"][2:]
        heads = heads.reshape(-1)[:960].reshape(3, 8, 40)
        x["block_0"]["attention"] = {"kernel": heads}
    return base, models


def tiny_models(case: Case, dtype: Any = np.float32) -> tuple[Any, list[Any]]:
    """Few leaves: what does not depend on shapes compiles in a moment."""
    base, models = small_models(case, dtype)
    base, *models = [
        {
            "block_0": {"kernel": x["block_0"]["mlp"]["kernel"]},
            "block_1": {"bias": x["block_1"]["mlp"]["bias"]},
            "scale": x["scale"],
        }
        for x in (base, *models)
    ]
    return base, models


def jit_merge(method: merging.Method, **kwargs: Any) -> Any:
    return jax.jit(
        lambda b, m, w, k: merging.merge(method, b, m, weights=w, **k), **kwargs
    )


@pytest.fixture(scope="module")
def compiled(case):
    """Base, models and their jitted merge, compiled once for all tests of a case."""
    base, models = small_models(case)
    return base, models, jit_merge(case.method)


@pytest.fixture(scope="module")
def jitted(case, compiled):
    """Base, models and what the jitted merge with weights makes of them."""
    base, models, merge = compiled
    return base, models, merge(base, models, weights_of(case), known(case, base))


def assert_close(a: Any, b: Any, like: Any, ulps: float = 2) -> None:
    """Within `ulps` of the largest of the two results and `like`, leaf by leaf."""
    a, b, like = tree.flatten(a), tree.flatten(b), tree.flatten(like)
    for path in a:
        x, y = np.asarray(a[path], np.float64), np.asarray(b[path], np.float64)
        size = np.maximum(np.maximum(abs(x), abs(y)), np.abs(like[path]))
        ulp = np.spacing(np.maximum(size, 1e-3).astype(np.float32))
        assert np.all(np.abs(x - y) <= ulps * ulp), path


def agree(case: Case, a: Any, b: Any, base: Any, models: Any) -> None:
    """Bit for bit; with float statistics, within 8 ulp of the terms that are added."""
    if case.exact:
        assert_same_bits(tree.flatten(a), tree.flatten(b))
        return
    if case.spectral:
        for x, y in zip(
            tree.flatten(a).values(), tree.flatten(b).values(), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        return
    terms = jax.tree.map(
        lambda b, *ms: np.sum([abs(b), *(abs(m - b) * case.gain for m in ms)], axis=0),
        base,
        *models,
    )
    assert_close(tree.flatten(a), tree.flatten(b), tree.flatten(terms), ulps=8)


def test_identity(case, compiled):
    base, _, merge = compiled
    if case.tiny:
        base, _ = tiny_models(case)
        out = jax.jit(lambda b: merging.merge(case.method, b, [b] * case.models))(base)
    else:
        weights = weights_of(case) and (1.0,) * case.models
        out = merge(base, [base] * case.models, weights, known(case, base))
    assert_close(out, base, base)


def test_permutation(case, compiled):
    if case.ordered or case.models == 1:
        pytest.skip("one model, or the order of models means something")
    base, models, merge = compiled
    if case.permuted:
        base, models = tiny_models(case)
        merge = jit_merge(case.permuted)
    weights = weights_of(case)
    order = [*range(1, case.models), 0]
    permuted = weights and tuple(weights[t] for t in order)
    data = known(case, base)
    turned = {k: [v[t] for t in order] for k, v in data.items()}
    a = merge(base, models, weights, data)
    b = merge(base, [models[t] for t in order], permuted, turned)
    a, b = tree.flatten(a), tree.flatten(b)
    for path in a:
        # A sum that cancels in one order may not in another, and the election with it.
        close = np.isclose(a[path], b[path], rtol=1e-5, atol=1e-5)
        assert np.sum(~close) <= 2e-3 * close.size, path


def test_streamed_as_jitted(case, jitted, tmp_path):
    base, models, out = jitted
    streamed = stream(
        tmp_path,
        case.method,
        base,
        models,
        weights=weights_of(case),
        **known(case, base),
        report_files=True,  # counting trimmed entries must not change the result
    )
    agree(case, streamed, out, base, models)


def test_streamed_without_report_in_small_chunks(case, jitted, tmp_path, monkeypatch):
    from multitask_jax.merging import streaming

    monkeypatch.setattr(streaming, "CHUNK", 1 << 10)
    monkeypatch.setattr(streaming, "BUCKETS", (1 << 6, 1 << 10))
    monkeypatch.setattr(streaming, "_SMALL", 1 << 10)
    monkeypatch.setattr(streaming, "_SLICES", 64)
    monkeypatch.setattr(streaming, "_SLICE", 16)
    base, models, out = jitted
    streamed = stream(
        tmp_path,
        case.method,
        base,
        models,
        weights=weights_of(case),
        **known(case, base),
    )
    agree(case, streamed, out, base, models)


def test_eager_as_jitted(case):
    base, models = tiny_models(case)
    for x in (base, *models):
        del x["block_1"]  # eager, each operation compiles for each shape

    def merge(b, m, w):
        return merging.merge(case.method, b, m, weights=w, **known(case, base))

    weights = weights_of(case)
    out = jax.jit(merge)(base, models, weights)
    agree(case, merge(base, models, weights), out, base, models)


def test_sharded_as_on_one_device(case, jitted):
    base, models, out = jitted
    mesh = sharding.make_mesh({"model": case.devices})
    shardings = sharding.tree_shardings(base, mesh)
    placed = [jax.device_put(x, shardings) for x in (base, *models)]
    merge = jit_merge(case.method, out_shardings=shardings)
    inputs = placed[0], placed[1:], weights_of(case), known(case, base)
    compiled = merge.lower(*inputs).compile()
    sharded = compiled(*inputs)
    for x, s in zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    agree(case, sharded, out, base, models)
    text = compiled.as_text()
    collectives = set(
        re.findall(r"(all-reduce|all-gather|all-to-all|collective-permute)\(", text)
    )
    if case.leafwise:
        assert not collectives
    elif case.exact and not case.rows:
        assert collectives == {"all-reduce"}
        # Counts only: no parameter crosses the mesh.
        for line in text.splitlines():
            if re.search(r"= .*all-reduce\(", line):
                assert re.search(r"= \(?s32\[\]", line), line


def test_dtype_is_the_bases(case, tmp_path):
    check_dtype(case, "bfloat16", tmp_path)


@pytest.mark.parametrize("name", ["ties", "dare", "slerp"])
def test_float16(name, tmp_path):
    check_dtype(CASES[name], "float16", tmp_path)


def check_dtype(case: Case, dtype: str, tmp_path: Path) -> None:
    base, models = tiny_models(case, FLOATS[dtype])
    data = known(case, base)
    merge = jax.jit(lambda b, m: merging.merge(case.method, b, m, **data))
    out = jax.eval_shape(merge, base, models)
    assert {x.dtype for x in jax.tree.leaves(out)} == {np.dtype(FLOATS[dtype])}
    if case.exact:
        streamed = stream(tmp_path, case.method, base, models, **data)
        assert_same_bits(streamed, tree.flatten(merge(base, models)))


def test_gradients_are_finite(case):
    """With respect to weights, base and models, zero task vectors among them."""
    base, models = tiny_models(case)
    for m in models:
        m["block_0"] = base["block_0"]
    base["scale"] = np.zeros_like(base["scale"])

    def loss(base, models, weights):
        out = merging.merge(
            case.method,
            base,
            models,
            weights=weights if case.method.weighted else None,
            **known(case, base),
        )
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(out))

    weights = jnp.asarray(WEIGHTS[: case.models])
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=BRIEFLY)
    gradients = gradient(base, models, weights)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


COEFFICIENTS = {
    "task_arithmetic scale": lambda x: merging.task_arithmetic(scale=x),
    "ties scale": lambda x: merging.ties(scale=x),
    "slerp t": lambda x: merging.slerp(t=x),
    "lines alpha": lambda x: merging.with_lines(
        merging.task_arithmetic(), alpha=x, beta=0.5
    ),
    "lines beta": lambda x: merging.with_lines(merging.ties(), alpha=0.5, beta=x),
    "lines norm beta": lambda x: merging.with_lines(
        merging.ties(scale=x), alpha="norm", beta=x
    ),
}


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_sweep_and_gradient_of_coefficients(name):
    base, models = tiny_models(CASES["slerp"])
    jit = functools.partial(jax.jit, compiler_options=BRIEFLY)

    def norm(x):
        out = merging.merge(COEFFICIENTS[name](x), base, models)
        return sum(jnp.sum(v**2) for v in jax.tree.leaves(out))

    values = jnp.asarray([0.1, 0.5, 0.9])
    swept, one = jit(jax.vmap(norm))(values), jit(norm)
    np.testing.assert_allclose(swept, [one(v) for v in values], rtol=1e-5)
    # The derivative agrees with differences.
    slope = jit(jax.grad(norm))(0.5)
    near = (one(0.51) - one(0.49)) / 0.02
    assert np.isfinite(slope)
    np.testing.assert_allclose(slope, near, rtol=0.05, atol=30)


class Layers(NamedTuple):
    first: Any
    second: Any


def test_containers():
    import flax.linen as nn
    from flax import nnx

    linen = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    pure = nnx.to_pure_dict(nnx.state(module))
    for base in (linen, pure, [jnp.ones(3), (jnp.ones(2),)], Layers(1.0, jnp.ones(2))):
        models = [jax.tree.map(lambda x, s=s: x + s, base) for s in (1.0, 3.0)]
        out = merging.merge(merging.task_arithmetic(scale=0.5), base, models)
        assert jax.tree.structure(out) == jax.tree.structure(base)
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(base), strict=True):
            np.testing.assert_allclose(x, y + 2.0, rtol=1e-6)


def test_sharding_rules_name_the_leaf():
    mesh = sharding.make_mesh({"model": 8})
    base = {"a": np.zeros((12, 3)), "b": np.zeros(8)}
    with pytest.raises(ValueError, match="b: no sharding rule"):
        sharding.shard_tree(base, mesh, [("a", PartitionSpec())])
    with pytest.raises(ValueError, match=r"a: axis of 12 .* in 8"):
        sharding.shard_tree(base, mesh, [(".*", PartitionSpec("model"))])
    with pytest.raises(ValueError, match="needs 16 devices, got 8"):
        sharding.make_mesh({"model": 16})
