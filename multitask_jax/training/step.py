"""One jitted step of training, on one device or on a mesh.

Legend: B examples of a batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from multitask_jax import tree as trees
from multitask_jax.sharding import Rules, tree_shardings
from multitask_jax.training.state import TrainState, join

Metrics = Mapping[str, jax.Array]
# (params, batch, key) -> (loss [], metrics, scalars each)
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Metrics]]
REPLICATED: Rules = ((".*", PartitionSpec()),)
OURS = ("loss", "gradient_norm")  # metrics of every step


class Step(NamedTuple):
    """Call it: step(state, batch) -> (state, metrics); the state given is used up.

    `fit` takes any Step; `Step(run)` alone is one that leaves placement to JAX.
    """

    run: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]  # jitted
    place_state: Callable[[TrainState], TrainState] = lambda state: state
    place_batch: Callable[[Any], Any] = lambda batch: batch
    # Shapes of the batches it was traced for, each once, or else time is lost.
    traced: Sequence[Any] = ()

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """The state after the step, and the step's metrics, still on the device."""
        # Frozen leaves are an argument of their own, so that they are not donated.
        moving = state._replace(frozen=None)
        moving, metrics = self.run(moving, state.frozen, self.place_batch(batch))
        return moving._replace(frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: Any) -> Any:
        """The step as JAX lowers it for these arguments, to compile and look at."""
        moving = state._replace(frozen=None)
        return self.run.lower(moving, state.frozen, self.place_batch(batch))


def make_step(
    loss_fn: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    batch_axis: str | tuple[str, ...] = "data",
    rules: Rules = REPLICATED,
) -> Step:
    """A step of gradient descent: theta <- theta + update(grad loss(theta)).

    The loss's key is the state's key with the step folded in, so that a step depends
    on the state and the batch alone. On a mesh the batch is cut along its leading axis
    and the loss must be what it is for the whole batch (a mean over it): the compiler
    adds the sums over devices. What a batch is made of may tell its task: with batches
    such as {"parity": arrays} the loss branches in Python, traced once a task.

    Args:
      loss_fn: (params, batch, key) -> (loss [], metrics: scalars by name).
      optimizer: the one that the state was made with.
      mesh: devices, from `sharding.make_mesh`; without one, JAX's default device.
      batch_axis: the mesh's axis (or axes) that the leading axis of every array of a
        batch is cut over; scalars are replicated.
      rules: (regex, spec) for leaves of the state, by paths such as
        "params/dense/kernel" and "opt_state/0/mu/dense/kernel"; the first match
        counts. All are replicated by default.

    Returns:
      A Step. Its metrics are those of the loss, "loss" and "gradient_norm".

    Raises:
      ValueError: an axis that the mesh lacks; on a call, a metric that is no scalar or
        has a name of ours, or a batch that the mesh does not divide.
    """
    traced: list[Any] = []

    def run(
        state: TrainState, frozen: Any, batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        traced.append(jax.tree.map(jnp.shape, batch))
        key = jax.random.fold_in(state.key, state.step)

        def loss_of(params: Any) -> tuple[jax.Array, Metrics]:
            return loss_fn(join(params, frozen), batch, key)

        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.params
        )
        _check_metrics(metrics)
        ours = dict(zip(OURS, (loss, optax.tree.norm(gradient)), strict=True))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, opt_state, state.key)
        return new, ours | dict(metrics)

    if mesh is None:
        return Step(jax.jit(run, donate_argnums=0), _together, traced=traced)

    parts = _size(mesh, batch_axis)
    replicated = NamedSharding(mesh, PartitionSpec())
    cut = NamedSharding(mesh, PartitionSpec(batch_axis))

    def run_on_mesh(state: TrainState, frozen: Any, batch: Any) -> Any:
        # The new state stays where the old one was, whatever the compiler prefers.
        new, metrics = run(state, frozen, batch)
        return jax.lax.with_sharding_constraint(
            (new, metrics), (tree_shardings(new, mesh, rules), replicated)
        )

    def place_state(state: TrainState) -> TrainState:
        if state.frozen is not None:
            frozen = tree_shardings({"params": state.frozen}, mesh, rules)["params"]
            state = state._replace(frozen=jax.device_put(state.frozen, frozen))
        moving = state._replace(frozen=None)
        moving = jax.device_put(moving, tree_shardings(moving, mesh, rules))
        return moving._replace(frozen=state.frozen)

    def place_batch(batch: Any) -> Any:
        for path, x in trees.flatten(batch).items():
            if jnp.ndim(x) and jnp.shape(x)[0] % parts:
                raise ValueError(
                    f"batch: {path or 'it'} has shape {jnp.shape(x)}, but its leading"
                    f" axis must be a multiple of {parts}, the mesh's {batch_axis}"
                )
        return jax.device_put(
            batch, jax.tree.map(lambda x: cut if jnp.ndim(x) else replicated, batch)
        )

    jitted = jax.jit(run_on_mesh, donate_argnums=0)
    return Step(jitted, place_state, place_batch, traced)


def _together(state: TrainState) -> TrainState:
    """All on the device that some leaves are committed to, such as restored ones.

    A step returns all of it so, and would be compiled once more for that.
    """
    leaves = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    places = list({x.sharding for x in leaves if x.committed})
    if len(places) != 1 or not isinstance(places[0], SingleDeviceSharding):
        return state
    moving = jax.device_put(state._replace(frozen=None), places[0])
    return moving._replace(frozen=state.frozen)


def _size(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ValueError(
            f"batch_axis: got {unknown[0]!r}, but the mesh has"
            f" {', '.join(mesh.axis_names)}"
        )
    return math.prod(mesh.shape[name] for name in names)


def _check_metrics(metrics: Metrics) -> None:
    for name, value in metrics.items():
        if name in OURS or jnp.ndim(value):
            raise ValueError(
                f"the loss's metric {name!r} has shape {jnp.shape(value)}; expected"
                f" scalars under names other than {', '.join(OURS)}"
            )
