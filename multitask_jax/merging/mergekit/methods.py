"""mergekit's methods, by its names, parameters and defaults, in terms of ours.

Legend: T models; "static" options are compiled into a method; weights, factors (lambda,
scale) and what a method lists as `traced` are not, so that gradients over depth share a
program.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from multitask_jax.merging import recipes, recipes_average, recipes_sparse
from multitask_jax.merging.core import Leaf, Method, Transform, Values, times

REQUIRED = object()  # no default: the recipe must say
# What base_model is to a method: the origin of task vectors; that, if given; the first
# of two models; or a model like the others.
Base = Literal["origin", "optional", "first", "model"]
Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A method of mergekit.

    `build(options, with_base)` makes ours from the static options, each a value or,
    of `per_model`, a tuple of T. `traced` options it takes by tensor. `ranks` are those
    that only choose thresholds: programs do not depend on them.
    """

    build: Callable[[dict[str, Any], bool], Method]
    base: Base = "origin"
    per_model: Options = dataclasses.field(default_factory=dict)
    per_tensor: Options = dataclasses.field(default_factory=dict)
    count: int | None = None  # of models besides an origin
    least: int = 1  # of them, where `count` is not told
    ranks: frozenset[str] = frozenset()
    traced: frozenset[str] = frozenset()
    elects: bool = False  # signs, and averages over the models that agree

    @property
    def parameters(self) -> set[str]:
        """Names of all parameters."""
        return {*self.per_model, *self.per_tensor}


class Choice(NamedTuple):
    """A method's options for one tensor."""

    static: tuple[tuple[str, Any], ...]
    weights: tuple[float, ...]
    factor: float
    traced: Options


def choose(
    spec: Spec, per_tensor: Options, per_model: Mapping[str, Sequence[Any]], count: int
) -> Choice:
    """Splits the values found for one tensor into what is compiled and what traced.

    Raises:
      ValueError: the weights of an average add up to 0.
    """
    weights = tuple(map(float, per_model.get("weight", (1.0,) * count)))
    static = dict(per_tensor) | {k: tuple(v) for k, v in per_model.items()}
    static.pop("weight", None)
    factor = float(static.pop("lambda", 1.0))
    if "scale" in static:  # passthrough's
        (factor,) = map(float, static.pop("scale"))
    if spec.base == "first":  # SLERP: t as weights
        t = float(static.pop("t"))
        weights = (1 - t, t)
    vanish = abs(sum(weights)) < 1e-8
    if spec is SPECS["nuslerp"] and vanish:
        weights = (0.5, 0.5)
    averages = {"linear": "normalize", "multislerp": "normalize_weights"}
    for name, switch in averages.items():
        if spec is SPECS[name] and vanish and static[switch]:
            raise ValueError(
                f"weight: got {weights}, which add up to 0: no average has such"
                f" weights; change them, or set {switch}: false"
            )
    if "select_topk" in static:
        topk = min(float(static["select_topk"]), 1.0)
        if topk <= 0:  # nothing is selected: the base
            topk, factor = 1.0, 0.0
        static["select_topk"] = topk
    if "density" in static:
        weights = _keep_shares(static, weights, elects=spec.elects)
    traced = {name: static.pop(name) for name in spec.traced}
    return Choice(tuple(sorted(static.items())), weights, factor, traced)


def _keep_shares(
    static: dict[str, Any], weights: tuple[float, ...], *, elects: bool
) -> tuple[float, ...]:
    """Densities beyond (0, 1]: of 1 and more keep all, of 0 and less nothing.

    A model of which nothing is kept gets the weight 0. Where entries are averaged over
    the models that have one it is then absent, as in mergekit; a plain sum is divided
    by its weight too.
    """
    densities = static["density"]
    static["density"] = tuple(min(d, 1.0) if d > 0 else 1.0 for d in densities)
    kept = [d > 0 for d in densities]
    if all(kept):
        return weights
    total = sum(weights)
    if static["normalize"] and not elects:
        static["normalize"] = False
        weights = tuple(w / total if abs(total) >= 1e-8 else w for w in weights)
    return tuple(w if k else 0.0 for w, k in zip(weights, kept, strict=True))


def method_of(spec: Spec, choices: Mapping[str, Choice], with_base: bool) -> Method:
    """Our method for tensors whose static options are the same.

    Args:
      spec: mergekit's method.
      choices: what was chosen, by path.
      with_base: whether the models have an origin.
    """
    (static,) = {c.static for c in choices.values()}
    options: dict[str, Any] = dict(static)
    for name in spec.traced:
        options[name] = {path: c.traced[name] for path, c in choices.items()}
    method = spec.build(options, with_base)
    factors = {path: c.factor for path, c in choices.items()}
    if all(f == 1 for f in factors.values()):
        return method
    return method._replace(transforms=(*method.transforms, _scale_by_leaf(factors)))


def _scale_by_leaf(factors: Mapping[str, float]) -> Transform:
    """lambda tau, with a lambda a leaf that is traced."""

    def apply(values: Values, leaf: Leaf, stats: tuple[Any, ...]) -> Values:
        factor = jnp.asarray(leaf.setting, leaf.base.dtype)
        return tuple(times(factor, v) for v in values)

    return Transform(
        apply, settings=lambda paths: {p: factors.get(p, 1.0) for p in paths}
    )


# -- the methods -----------------------------------------------------------------------


def _consensus(o: Options) -> dict[str, Any]:
    """mergekit's election and mean, in our words."""
    return {
        "election": "weighted_mass",
        "zero_sign": "positive",
        "combine": "mean" if o["normalize"] else "sum",
    }


def _rescale(o: Options) -> str:
    return "l1" if o["rescale"] else "none"


def _task_arithmetic(o: Options, _: bool) -> Method:
    return recipes.task_arithmetic(normalise=o["normalize"])


def _ties(o: Options, _: bool) -> Method:
    return recipes.ties(
        density=o["density"],
        trim_scope="tensor",
        rescale=_rescale(o),
        **_consensus(o),
    )


def _dare_linear(o: Options, _: bool) -> Method:
    return recipes.dare(
        density=o["density"],
        rescale=_rescale(o),
        normalise=o["normalize"],
        seed=o["seed"],
    )


def _dare_ties(o: Options, _: bool) -> Method:
    return recipes.dare_ties(
        density=o["density"], rescale=_rescale(o), seed=o["seed"], **_consensus(o)
    )


def _crumbs_options(o: Options) -> dict[str, Any]:
    return {
        "density": o["density"],
        "gamma": o["gamma"],
        "rescale": _rescale(o),
        "at_least": 0,
    }


def _breadcrumbs(o: Options, _: bool) -> Method:
    return recipes_sparse.breadcrumbs(**_crumbs_options(o), normalise=o["normalize"])


def _breadcrumbs_ties(o: Options, _: bool) -> Method:
    return recipes_sparse.breadcrumbs_ties(**_crumbs_options(o), **_consensus(o))


def _della_options(o: Options) -> dict[str, Any]:
    # All of a model is kept at density 1, whatever epsilon.
    epsilon = {
        path: tuple(
            0.0 if d == 1 else e
            for d, e in zip(o["density"][path], epsilons, strict=True)
        )
        for path, epsilons in o["epsilon"].items()
    }
    return {
        "density": o["density"],
        "epsilon": epsilon,
        "rescale": _rescale(o),
        "seed": o["seed"],
    }


def _della(o: Options, _: bool) -> Method:
    return recipes_sparse.della_ties(**_della_options(o), **_consensus(o))


def _della_linear(o: Options, _: bool) -> Method:
    return recipes_sparse.della(**_della_options(o), normalise=o["normalize"])


def _space(with_base: bool) -> Any:
    return "task_vectors" if with_base else "parameters"


def _nuslerp(o: Options, with_base: bool) -> Method:
    flatten = o["nuslerp_flatten"]
    return recipes_average.nuslerp(
        flatten=flatten,
        row_wise=o["nuslerp_row_wise"] and not flatten,
        space=_space(with_base),
    )


def _multislerp(o: Options, with_base: bool) -> Method:
    return recipes_average.multislerp(
        normalise=o["normalize_weights"], space=_space(with_base)
    )


def _karcher(o: Options, _: bool) -> Method:
    if o["max_iter"] < 1 or o["max_iter"] % 1:
        raise ValueError(f"max_iter: got {o['max_iter']}, expected a natural number")
    if o["tol"] < 0:
        raise ValueError(f"tol: got {o['tol']}, expected a number from 0 on")
    return recipes_average.karcher(max_iter=int(o["max_iter"]), tol=o["tol"])


def _ram(o: Options, _: bool) -> Method:
    return recipes_average.ram(epsilon=o["epsilon"])


def _ramplus(o: Options, _: bool) -> Method:
    return recipes_average.ramplus(epsilon=o["epsilon"], r=o["r"], alpha=o["alpha"])


_WEIGHT = {"weight": REQUIRED}
_SPARSE = {"weight": REQUIRED, "density": 1.0}
_CRUMBS = {**_SPARSE, "gamma": 0.01}
_DELLA = {**_SPARSE, "epsilon": 0.15}
_DENSITY = frozenset({"density"})
_OUTLIERS = frozenset({"density", "gamma"})
_PROBABILITIES = frozenset({"density", "epsilon"})


def _summed(normalize: bool, rescale: bool) -> dict[str, Any]:
    return {"lambda": 1.0, "normalize": normalize, "rescale": rescale}


SPECS: dict[str, Spec] = {
    "linear": Spec(
        lambda o, _: recipes.linear(normalise=o["normalize"]),
        "model",
        _WEIGHT,
        {"normalize": True},
    ),
    "slerp": Spec(
        lambda o, _: recipes.slerp(t=None),
        "first",
        per_tensor={"t": REQUIRED},
        count=2,
    ),
    "nuslerp": Spec(
        _nuslerp,
        "optional",
        _WEIGHT,
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        count=2,
    ),
    "multislerp": Spec(_multislerp, "optional", _WEIGHT, {"normalize_weights": True}),
    "karcher": Spec(_karcher, "model", per_tensor={"max_iter": 10, "tol": 1e-5}),
    "model_stock": Spec(
        lambda o, _: recipes.model_stock(filter_wise=o["filter_wise"], ratio="formula"),
        per_tensor={"filter_wise": False},
        least=2,
    ),
    "task_arithmetic": Spec(
        _task_arithmetic, per_model=_WEIGHT, per_tensor=_summed(False, False)
    ),
    "ties": Spec(
        _ties,
        per_model=_SPARSE,
        per_tensor=_summed(True, False),
        ranks=_DENSITY,
        elects=True,
    ),
    "dare_linear": Spec(
        _dare_linear,
        per_model=_SPARSE,
        per_tensor=_summed(False, True),
        traced=_DENSITY,
    ),
    "dare_ties": Spec(
        _dare_ties,
        per_model=_SPARSE,
        per_tensor=_summed(False, True),
        traced=_DENSITY,
        elects=True,
    ),
    "della": Spec(
        _della,
        per_model=_DELLA,
        per_tensor=_summed(True, True),
        traced=_PROBABILITIES,
        elects=True,
    ),
    "della_linear": Spec(
        _della_linear,
        per_model=_DELLA,
        per_tensor=_summed(False, True),
        traced=_PROBABILITIES,
    ),
    "breadcrumbs": Spec(
        _breadcrumbs,
        per_model=_CRUMBS,
        per_tensor=_summed(False, False),
        ranks=_OUTLIERS,
    ),
    "breadcrumbs_ties": Spec(
        _breadcrumbs_ties,
        per_model=_CRUMBS,
        per_tensor=_summed(False, False),
        ranks=_OUTLIERS,
        elects=True,
    ),
    "sce": Spec(
        lambda o, _: recipes_sparse.sce(topk=o["select_topk"], at_least=0),
        per_tensor={"select_topk": 1.0},
    ),
    "ram": Spec(_ram, per_tensor={"epsilon": 1e-5}),
    "ramplus_tl": Spec(_ramplus, per_tensor={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "nearswap": Spec(
        lambda o, _: recipes_average.nearswap(t=o["t"]),
        per_tensor={"t": REQUIRED},
        count=1,
    ),
    "arcee_fusion": Spec(lambda o, _: recipes_sparse.arcee_fusion(), count=1),
    "passthrough": Spec(
        lambda o, _: recipes_average.passthrough(),
        "model",
        {"scale": 1.0},
        count=1,
    ),
}
SWITCHES = {
    "normalize",
    "rescale",
    "filter_wise",
    "nuslerp_flatten",
    "nuslerp_row_wise",
    "normalize_weights",
    "int8_mask",
}
ALL_PARAMETERS: set[str] = set().union(*(s.parameters for s in SPECS.values()))
