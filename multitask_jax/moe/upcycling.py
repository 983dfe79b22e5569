"""Dense models become a mixture of experts, and a mixture one dense model again.

    means = jnp.stack([mean of what reaches the layer, a specialist's data each])
    gates = {block: gate_from_means(means[block], variance[block]) for block in ...}
    params = upcycle([a, b, c], rest, pattern=..., gates=gates)
    ties = functools.partial(merging.merge, merging.ties())
    dense = to_dense(params, merge=ties, base=base)

Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055) copies one model's
feed-forward layers; experts of specialists are those of Branch-Train-MiX (Sukhbaatar et
al. 2024, arXiv 2403.07816). The gate from means of data is a *reconstruction*: nearest
class mean, the class being the specialist.

Legend: E experts, D width.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from multitask_jax import tree as trees
from multitask_jax.moe import gates as gating

Array = jax.Array
NO_ROOM = (
    "is of an expert that all tokens share: a dense layer has no room for it beside a"
    " merged one"
)


class Found(NamedTuple):
    """A leaf of a dense feed-forward layer."""

    block: str  # "layer_0"
    leaf: str  # "intermediate/kernel"
    between: str = "/"  # of these two in the path


def mlp_leaves(paths: Sequence[str], pattern: str) -> dict[str, Found]:
    r"""The leaves that become experts'.

    Args:
      paths: of all leaves.
      pattern: a regex with groups `block` and `leaf` that matches whole paths, such as
        r"(?P<block>layer_\d+)/(?P<leaf>(intermediate|output)/\w+)".

    Raises:
      ValueError: a bad regex, or one that no path matches.
    """
    try:
        regex = re.compile(pattern)
    except re.error as e:
        raise ValueError(f"mlp pattern {pattern!r} is not a regex: {e}") from None
    if not {"block", "leaf"} <= set(regex.groupindex):
        raise ValueError(
            f"mlp pattern: got {pattern!r}, expected groups (?P<block>...) and"
            " (?P<leaf>...)"
        )
    found = {
        path: Found(
            match["block"],
            match["leaf"],
            path[match.end("block") : match.start("leaf")],
        )
        for path in paths
        if (match := regex.fullmatch(path))
    }
    if not found:
        raise ValueError(
            f"mlp pattern {pattern!r} matches none of {len(paths)} paths, among them"
            f" {', '.join(list(paths)[:6])}"
        )
    return found


def renamed(leaf: str, names: Mapping[str, str] | None) -> str:
    """Before/after, with {"up_proj": "w3"}: "up_proj.weight" -> "w3.weight"."""
    first = re.match(r"[^./]*", leaf)[0]  # type: ignore[index]
    return (names or {}).get(first, first) + leaf[len(first) :]


def shared_beside(paths: Iterable[str], parents: Collection[str]) -> list[str]:
    """Those of experts that all tokens share, such as layer_0/mlp/shared_up/kernel.

    Args:
      paths: of all leaves.
      parents: what stands before routed experts ("layer_0/mlp/"): what is called
        shared elsewhere is no expert.
    """
    return [
        path
        for path in paths
        if any(
            path[: word.start()] in parents
            for word in re.finditer(r"(?<![^./])shared_\w+[./]", path)
        )
    ]


def upcycle(
    models: Sequence[Any],
    rest: Any,
    *,
    pattern: str,
    gates: Mapping[str, Any],
    rename: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A tree with experts.

    Before/after, with rename={"intermediate": "up", "output": "down"}:
    {"layer_0": {"intermediate": {"kernel": [D, H]}, ...}} of each model ->
    {"layer_0": {"mlp": {"experts": {"up": {"kernel": [E, D, H]}}, "gate": ...}, ...}}.

    What stands between block and leaf ("/" here) is left out: tell it `split` for the
    way back, where it is another.

    Args:
      models: where expert e comes from, E of them; one model E times is sparse
        upcycling.
      rest: a tree like theirs that everything else is taken from, such as their merge.
      pattern: as for `mlp_leaves`.
      gates: a gate for each block and no other, such as `gating.init_gate`'s or
        `gate_from_means`.
      rename: names of dense layers -> names of the experts'.

    Raises:
      ValueError: trees of different paths, a gate that is missing or of no block,
        blocks that differ in what stands before the leaf, names that `rename` has no
        way back for, or as `mlp_leaves`.
    """
    flat = [trees.flatten(m) for m in models]
    others = trees.flatten(rest)
    for f in flat:
        if f.keys() != others.keys():
            raise ValueError(
                f"models differ from the rest in {sorted(f.keys() ^ others.keys())[:5]}"
            )
    found = mlp_leaves(list(others), pattern)
    blocks = {f.block for f in found.values()}
    if missing := blocks - set(gates):
        raise ValueError(f"gates: none for {sorted(missing)[:5]}")
    if extra := set(gates) - blocks:
        raise ValueError(
            f"gates: got some for {sorted(extra)[:5]}, expected them for the blocks"
            f" that the pattern finds: {sorted(blocks)[:5]}"
        )
    if len(between := {f.between for f in found.values()}) > 1:
        raise ValueError(
            f"mlp pattern {pattern!r}: got {sorted(between)} between block and leaf,"
            " expected the same everywhere; upcycle such layers one after another"
        )
    back = _inverse(rename)
    for path, (_, leaf, _) in found.items():
        if renamed(there := renamed(leaf, rename), back) != leaf:
            raise ValueError(
                f"rename: {path} becomes {there}, which would come back as"
                f" {renamed(there, back)}; expected a name for each of theirs"
            )
    out = {path: x for path, x in others.items() if path not in found}
    for path, (block, leaf, _) in found.items():
        stacked = jnp.stack([f[path] for f in flat])
        out[f"{block}/mlp/experts/{renamed(leaf, rename)}"] = stacked
    for block, gate in gates.items():
        for path, x in trees.flatten(gate).items():
            out[f"{block}/mlp/gate/{path}"] = x
    return trees.nest(out)


def split(
    params: Any, *, rename: Mapping[str, str] | None = None, between: str = "/"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The inverse of `upcycle`: a dense tree of each expert, and the gates by block.

    Args:
      params: as `upcycle` makes them.
      rename: as it was for `upcycle`.
      between: of block and leaf in the dense paths, such as "/mlp/" for
        layer_0/mlp/up/kernel.

    Raises:
      ValueError: there are no experts, or not as many everywhere; or a layer has shared
        experts, which a dense one has no room for.
    """
    shared, experts, gates = _parts(params, rename, between)
    return [trees.nest(shared | own) for own in experts], gates


def _parts(
    params: Any, rename: Mapping[str, str] | None, between: str
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """By path: what experts share, and each one's own; and the gates by block."""
    flat = trees.flatten(params)
    back = _inverse(rename)
    regex = re.compile(r"(?P<block>.*)/mlp/(?P<part>experts|gate)/(?P<leaf>.*)")
    found = {p: m for p in flat if (m := regex.fullmatch(p))}
    blocks = {m["block"] for m in found.values() if m["part"] == "experts"}
    # A gate without experts is a dense SwiGLU's.
    found = {p: m for p, m in found.items() if m["block"] in blocks}
    if shared := shared_beside(flat, {f"{block}/mlp/" for block in blocks}):
        raise ValueError(f"{shared[0]} {NO_ROOM}")
    counts = {flat[p].shape[0] for p, m in found.items() if m["part"] == "experts"}
    if len(counts) != 1:
        raise ValueError(
            f"got {sorted(counts) or 'no'} experts in .../mlp/experts/...; expected one"
            " number of them"
        )
    for path, m in found.items():
        if m["part"] == "gate" and flat[path].shape[-1] not in counts:
            raise ValueError(
                f"{path}: got a gate of {flat[path].shape[-1]} for {sorted(counts)[0]}"
                " experts; the others all tokens share: a dense layer has no room for"
                " them beside merged ones"
            )
    rest = {p: x for p, x in flat.items() if p not in found}
    experts: list[dict[str, Any]] = [{} for _ in range(counts.pop())]
    gates: dict[str, Any] = {}
    for path, m in found.items():
        if m["part"] == "gate":
            gates.setdefault(m["block"], {})[m["leaf"]] = flat[path]
            continue
        for own, x in zip(experts, flat[path], strict=True):
            own[f"{m['block']}{between}{renamed(m['leaf'], back)}"] = x
    return rest, experts, gates


def to_dense(
    params: Any,
    *,
    merge: Callable[[Any, list[Any]], Any],
    base: Any = None,
    rename: Mapping[str, str] | None = None,
    between: str = "/",
) -> Any:
    """One dense tree of a mixture: experts merged, gates left out, all else as it is.

    Args:
      params: as `upcycle` makes them.
      merge: (base, models) -> one model, all of feed-forward leaves alone, such as
        `functools.partial(merging.merge, merging.ties())`.
      base: a dense tree whose feed-forward leaves are the base. Methods on parameters
        alone (linear) go without: that of `merge` is then the first expert.
      rename, between: as for `split`.

    Raises:
      ValueError: as `split`, or the base lacks a leaf of the experts.
    """
    shared, experts, _ = _parts(params, rename, between)
    origin = experts[0]
    if base is not None:
        known = trees.flatten(base)
        if missing := sorted(origin.keys() - known.keys()):
            raise ValueError(
                f"base: it has no {missing[:5]}, which the experts have; give the dense"
                " tree that they came from"
            )
        origin = {path: known[path] for path in origin}
    merged = merge(trees.nest(origin), [trees.nest(e) for e in experts])
    return trees.nest(shared | trees.flatten(merged))


def random_gates(
    key: Array, widths: Mapping[str, int], experts: int, *, stddev: float = 0.02
) -> dict[str, Any]:
    """A random gate for each block, by the width D of what it sees."""
    keys = jax.random.split(key, len(widths))
    return {
        block: gating.init_gate(k, width, experts, stddev=stddev)
        for k, (block, width) in zip(keys, widths.items(), strict=True)
    }


def gate_from_means(
    means: Array, variance: Array | float, *, sharpness: float = 1.0
) -> Any:
    """Tokens go to the specialist whose own data's mean is nearest.

    logit_e = sharpness (x (mu_e - m) - (|mu_e|^2 - |m|^2) / 2) D / s^2, which is
    -|x - mu_e|^2 / (2 s^2 / D) up to what experts share; m, the mean of means, leaves
    small numbers where all are far from 0. With sharpness 1 the softmax is the
    posterior of Gaussians of variance s^2 / D in each dimension.

    Args:
      means: [E, D], of what reaches the layer on each specialist's data.
      variance: s^2, the mean squared distance of tokens to their specialist's mean,
        summed over D, as `merging.input_moments` has it.
      sharpness: above 1 decides harder, below 1 softer.

    Returns:
      {"kernel": [D, E], "bias": [E]}, for `gate_logits`.
    """
    scale = sharpness * means.shape[1] / jnp.maximum(variance, 1e-12)
    m = jnp.mean(means, axis=0, keepdims=True)
    d = means - m
    # |mu|^2 - |m|^2 as a product: the difference of squares would lose its digits.
    return {
        "kernel": scale * d.T,
        "bias": -scale / 2 * jnp.sum(d * (means + m), axis=1),
    }


def gate_without_bias(
    means: np.ndarray, variance: float, *, sharpness: float = 1.0
) -> dict[str, np.ndarray]:
    """As `gate_from_means`, for a layer whose gate has no bias, such as Mixtral's.

    Without the bias x mu_e = x m + (x - m) d_e + m d_e, d_e = mu_e - m and m the mean
    of means. Experts share the first term; the last one, if m is large, sends all
    tokens to one of them. So rows are w_e = d_e - m (m d_e) / (|m|^2 + s^2 / D): m is
    projected out, as far as it is longer than tokens vary along it.

    Args:
      means: [E, D]; concrete, as all arguments.
      variance: s^2, as for `gate_from_means`.
      sharpness: as for `gate_from_means`.

    Returns:
      {"kernel": [D, E]}, float32.

    Raises:
      ValueError: nearly nothing is left: means differ along m alone, or not at all.
    """
    means = np.asarray(means, np.float64)
    each = max(float(variance), 1e-12) / means.shape[1]  # s^2 / D
    m = means.mean(axis=0)
    d = means - m[None]
    w = d - (d @ m)[:, None] * m[None] / (m @ m + each)
    if np.linalg.norm(w) <= 0.1 * np.linalg.norm(d):
        raise ValueError(
            f"means of {len(means)} specialists' data differ by {np.linalg.norm(d):.3g}"
            f" in all, and by {np.linalg.norm(w):.3g} across the direction they share;"
            " expected more than a tenth: a gate without a bias can't tell them apart."
            " Use a layout whose gate has a bias, or a random gate"
        )
    return {"kernel": np.float32(sharpness / each * w.T)}


def _inverse(rename: Mapping[str, str] | None) -> dict[str, str]:
    return {there: here for here, there in (rename or {}).items()}
