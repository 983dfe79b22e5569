"""Checkpoints of mixtures: dense ones become one, tensor by tensor.

Names decide, by a layout: which tensors are the feed-forward layers', and what their
copies are called. Nothing is held but one tensor at a time. `dense_files` is the way
back.

Legend: E experts, D width.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from multitask_jax import checkpoints
from multitask_jax.checkpoints import CheckpointError, Reader, TensorInfo
from multitask_jax.moe.upcycling import Found, mlp_leaves, renamed

# The first layer of a feed-forward block, whose inputs the gate sees as well.
_FIRST = re.compile(
    r"(?:^|[./])(gate_proj|up_proj|w1|wi|wi_0|intermediate|fc1|fc_in|lin1|c_fc|up|"
    r"dense_h_to_4h|linear1|Dense_0)(?=[./])"
)

_EXPERTS = re.compile(r"(?:^|[./])(?:\w+_)?experts[./]")  # shared_experts as well


class Layout(NamedTuple):
    """What tensors are called, dense and as experts."""

    pattern: str  # of dense names, with groups block and leaf
    # Templates of {block}, {between} (what stands between block and leaf in the dense
    # name), {expert} and {leaf}; without {expert}: stacked.
    expert: str
    gate: str
    dense: tuple[str, ...]  # what the dense tensor may have been called
    rename: Mapping[str, str] = {}  # parts of a leaf's name, dense -> expert's
    bias: bool = True  # whether the gate has one, beside its weight
    transposed: bool = True  # the gate is [E, D], as torch has it


LAYOUTS = {
    # What transformers' Mixtral loads, of a Llama or Mistral model.
    "mixtral": Layout(
        r"(?P<block>.*layers\.\d+)\.mlp\.(?P<leaf>(gate|up|down)_proj\.weight)",
        "{block}.block_sparse_moe.experts.{expert}.{leaf}",
        "{block}.block_sparse_moe.gate.weight",
        ("{block}.mlp.{leaf}",),
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        bias=False,
    ),
    # Any other checkpoint by Hugging Face names: BERT, ViT, T5, GPT-2 and Llama styles.
    "names": Layout(
        r"(?P<block>.*?\.\d+(?:\.layer\.\d+)?)\.(?:mlp\.|DenseReluDense\.)?"
        r"(?P<leaf>(?:(?:gate|up|down)_proj|intermediate\.dense|output\.dense|fc[12]|"
        r"w[io](?:_[01])?|c_fc|(?<=mlp\.)c_proj)\.(?:weight|bias))",
        "{block}{between}experts.{expert}.{leaf}",
        "{block}{between}gate.weight",
        ("{block}{between}{leaf}",),
    ),
    # Flax trees, for `layers.moe.MoE`.
    "stacked": Layout(
        r"(?P<block>.*(?:layer|block)s?_?\d+)/(?:mlp/)?"
        r"(?P<leaf>(?:intermediate|output|up|down|gate)/(?:kernel|bias))",
        "{block}/mlp/experts/{leaf}",
        "{block}/mlp/gate/kernel",
        ("{block}/{leaf}", "{block}/mlp/{leaf}"),
        {"intermediate": "up", "output": "down"},
        transposed=False,
    ),
}


class Part(NamedTuple):
    """Where some of a tensor's entries lie."""

    reader: Reader
    name: str
    start: int = 0  # of the stored tensor's flat entries


class Output(NamedTuple):
    """A tensor to write: its parts one after another, or the array itself."""

    info: TensorInfo
    parts: tuple[Part, ...] = ()
    array: np.ndarray | None = None


def found_in(reader: Reader, layout: Layout) -> dict[str, Found]:
    """The dense checkpoint's feed-forward tensors.

    Raises:
      ValueError: there are none.
      CheckpointError: the model has experts already; or one is of integers or of 8-bit
        floats, as quantised weights are: what they mean is in tensors beside them.
    """
    if there := [n for n in reader.tensors if _EXPERTS.search(n)]:
        raise CheckpointError(
            f"{reader.path}: {there[0]} is of experts, expected a dense model; make one"
            " of the mixture first, by --to_dense"
        )
    found = mlp_leaves(list(reader.tensors), layout.pattern)
    for name in found:
        dtype = reader.tensors[name].dtype
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            raise CheckpointError(
                f"{reader.path}: {name}: got {dtype}, expected floats of 16 bits or"
                " more; convert quantised weights first"
            )
    return found


def gate_inputs(reader: Reader, found: Mapping[str, Found]) -> dict[str, str]:
    """The tensor of each block whose inputs the gate sees as well, by block.

    Raises:
      ValueError: a block has none by the names that are known.
    """
    first: dict[str, str] = {}
    for name, (block, leaf, _) in found.items():
        matrix = len(reader.tensors[name].shape) == 2
        if matrix and _FIRST.search(f".{leaf}"):
            first.setdefault(block, name)
    if missing := {f.block for f in found.values()} - set(first):
        raise ValueError(
            f"can't tell the first layer of {sorted(missing)[0]} from the names"
            f" {sorted({f.leaf for f in found.values()})}; give a --mlp_pattern whose"
            " group `leaf` begins with up_proj, w1, fc1, intermediate or the like"
        )
    return first


def plan(
    experts: Sequence[Reader],
    rest: Reader,
    layout: Layout,
    gates: Mapping[str, Mapping[str, np.ndarray]],
) -> list[Output]:
    """The tensors of the mixture, in the order of the rest's.

    Args:
      experts: where expert e's feed-forward layers come from.
      rest: where all other tensors do.
      layout: names.
      gates: {"kernel": [D, E], "bias": [E]} by block.

    Raises:
      CheckpointError: a gate of data overflows, or as `check_alike` and `found_in`.
    """
    found, done, out = found_in(rest, layout), set(), []
    check_alike(experts, list(found))
    for name, info in rest.tensors.items():
        if name not in found:
            out.append(Output(info, (Part(rest, name),)))
            continue
        block, info = found[name].block, experts[0].tensors[name]
        if block not in done:
            done.add(block)
            out += _gate(layout, found[name], gates[block], info.dtype)
        there = expert_name(layout, found[name])
        if "{expert}" not in layout.expert:
            whole = TensorInfo(there, (len(experts), *info.shape), info.dtype)
            out.append(Output(whole, tuple(Part(r, name) for r in experts)))
            continue
        for e, reader in enumerate(experts):
            one = info._replace(name=there.replace("{expert}", str(e)))
            out.append(Output(one, (Part(reader, name),)))
    return out


def check_alike(experts: Sequence[Reader], names: Sequence[str]) -> None:
    """Refuses experts that can't stand side by side.

    Raises:
      CheckpointError: a model lacks one of the tensors, or has it in another shape or
        dtype than the first model.
    """
    first = experts[0]
    if lacking := [name for name in names if name not in first.tensors]:
        raise CheckpointError(f"{first.path}: got no tensor {lacking[0]}")
    for reader in experts[1:]:
        for name in names:
            info, there = first.tensors[name], reader.tensors.get(name)
            if there is None or there[1:] != info[1:]:
                got = f"{there.shape} of {there.dtype}" if there else "no such tensor"
                raise CheckpointError(
                    f"{reader.path}: {name}: got {got}, expected {info.shape} of"
                    f" {info.dtype}, as in {first.path}; experts are of one shape and"
                    " dtype: convert a model first"
                )


def _gate(
    layout: Layout, found: Found, gate: Mapping[str, np.ndarray], dtype: np.dtype
) -> list[Output]:
    name = filled(layout.gate, found)
    kernel = gate["kernel"].T if layout.transposed else gate["kernel"]
    arrays = {name: kernel}
    if "bias" in gate and layout.bias:
        arrays[re.sub(r"\w+$", "bias", name)] = gate["bias"]
        # The bias outweighs what experts differ by: 16 bits would round that away.
        dtype = np.dtype(np.float32)
    out = []
    for n, x in arrays.items():
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(x, dtype)
        if not np.isfinite(stored).all():
            raise CheckpointError(
                f"{n}: got {x.reshape(-1)[~np.isfinite(stored.reshape(-1))][0]}, which"
                f" is not finite in {dtype}; choose a lower --sharpness (or"
                " --gate_stddev), or convert the models to bfloat16"
            )
        out.append(Output(TensorInfo(n, x.shape, dtype), (), stored))
    return out


def expert_name(layout: Layout, found: Found) -> str:
    """Before/after: ("l.0", "up_proj.weight") -> "l.0.experts.{expert}.w3.weight"."""
    named = found._replace(leaf=renamed(found.leaf, layout.rename))
    return filled(layout.expert, named)


def filled(template: str, found: Found) -> str:
    """A template of a layout with its names."""
    for name, value in found._asdict().items():
        template = template.replace("{" + name + "}", value)
    return template


def write(
    writer: checkpoints.Writer, outputs: Sequence[Output], *, progress: bool = True
) -> None:
    """Copies tensor by tensor.

    Raises:
      CheckpointError: one holds NaN or infinity.
    """
    total = sum(o.info.nbytes for o in outputs)
    off = None if progress else True  # None: unless it is a terminal
    seen: set[Part] = set()
    with tqdm(total=total, unit="B", unit_scale=True, disable=off) as bar:
        for out in outputs:
            name = out.info.name
            if out.array is not None:
                writer.write(name, 0, out.array.reshape(-1))
            size = out.info.size // max(1, len(out.parts))
            for i, part in enumerate(out.parts):
                flat = part.reader.read(part.name, part.start, part.start + size)
                if part not in seen:  # copies are of one part
                    _check_finite(part, flat)
                    seen.add(part)
                writer.write(name, i * size, flat)
            bar.update(out.info.nbytes)


def _check_finite(part: Part, flat: np.ndarray) -> None:
    """Refuses what no merge has looked at."""
    if jnp.issubdtype(flat.dtype, jnp.floating) and not np.isfinite(flat).all():
        place = int(np.flatnonzero(~np.isfinite(flat))[0])
        raise CheckpointError(
            f"{part.reader.path}: tensor {part.name!r} has {flat[place]} at flat index"
            f" {part.start + place} (and maybe more): the fine-tuning diverged, or the"
            " file is damaged. Leave the model out"
        )


def width_of(info: TensorInfo, layout: Layout) -> int:
    """D, of a first layer: its inputs."""
    if re.search(r"(?:^|[./])c_fc[./]", info.name):
        # GPT-2's Conv1D has the inputs first, others' Linear of that name last; both
        # widen.
        return min(info.shape)
    return info.shape[1 if layout.transposed else 0]
