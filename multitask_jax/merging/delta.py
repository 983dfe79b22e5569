"""Merges that leave their task vector rather than a model (`output_format="delta"`)."""

import numpy as np

from multitask_jax.checkpoints import TensorInfo
from multitask_jax.merging.core import SUBTRACT_BASE, Method
from multitask_jax.merging.plan import Plan


def as_delta(method: Method) -> Method:
    """The same merge, without adding the base: it leaves tau = theta - theta_0.

    For methods on task vectors theta_0 + tau is the merged model bit for bit; for those
    that end in parameters (linear, slerp) to one rounding of the subtraction.
    """
    if method.end == "parameters":
        method = method._replace(transforms=(*method.transforms, SUBTRACT_BASE))
    return method._replace(end="parameters")


def delta_plan(plan: Plan, dtype: np.dtype | None) -> Plan:
    """Merged tensors are stored as computed (float32) or as `dtype`; none is copied.

    All names stay in `outputs` (depths and random masks go by them); `written` lists
    what a delta holds.
    """
    merged = tuple(e._replace(out=dtype or e.compute) for e in plan.merged)
    outs = {e.path: e.out for e in merged}
    outputs = tuple(t._replace(dtype=outs.get(t.name, t.dtype)) for t in plan.outputs)
    notes = [*plan.notes, "A delta is written sparse where that is smaller."]
    if plan.copied:
        count = len(plan.copied)
        notes.append(f"{count} tensors are the base's: they are not in the delta.")
    return plan._replace(merged=merged, copied=(), outputs=outputs, notes=tuple(notes))


def written(plan: Plan) -> list[TensorInfo]:
    """The tensors of a delta: those that were merged."""
    merged = {e.path for e in plan.merged}
    return [t for t in plan.outputs if t.name in merged]
