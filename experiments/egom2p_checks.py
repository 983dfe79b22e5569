"""What flags of `experiments.egom2p` must hold before hours of work begin."""

import functools
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from experiments import egom2p_folders as folders
from experiments import egom2p_tokens as tokens_of
from experiments import egom2p_training as training
from experiments import parsing
from experiments.egom2p_evaluation import TASKS, has_both
from multitask_jax import sharding
from multitask_jax.data import vizdoom_clips
from multitask_jax.data.egocentric import MODALITIES, Clips
from multitask_jax.masked.tokenizers import Tokenizer
from multitask_jax.models import egom2p
from multitask_jax.models.egom2p import SHAPES

if TYPE_CHECKING:
    from experiments.egom2p import Config


def check(config: "Config") -> None:
    """Raises ValueError for what would fail, or count for nothing, hours later."""
    least = {"batch": 1, "inputs": 1, "targets_budget": 1, "test_clips": 2}
    least |= {"tokenizer_batch": 1, "video_steps": 1, "trajectory_steps": 1}
    least |= {"steps": 1, "evaluate_every": 1, "clip": 0, "temperature": 0, "seed": 0}
    parsing.at_least(config, **least)
    for name in ("temperature", "guidance"):
        if not math.isfinite(got := getattr(config, name)):
            raise ValueError(f"--{name}: got {got}, expected a finite number")
    parsing.rate_of_learning(config.rate)
    share_of_focus(config.focus)
    if not 0 < config.top_p <= 1:
        raise ValueError(
            f"--top_p: got {config.top_p}, expected a share above 0, at most 1"
            " (--temperature=0 takes the likeliest)"
        )
    if config.stage in ("all", "record"):
        _check_recording(config)
    if config.stage in ("all", "pretrain"):
        _check_training(config)
    if config.stage != "generate":
        ours = ("input", "clip", "given", "targets", "output", "mean")
        _unused(config, ours, f"--stage={config.stage}, which makes nothing of a clip")
    if config.stage == "generate" and config.mean:
        sampling = ("temperature", "top_p", "guidance", "schedule")
        _unused(config, sampling, "--mean, which is no sample")


def _check_recording(config: "Config") -> None:
    if folders.own_clips(Path(config.workdir)):
        return
    planned = vizdoom_clips.plan(config.clips)
    tests = sum(n for path, n in planned.items() if path.startswith("test/"))
    if tests < 2:
        raise ValueError(
            f"--clips: got {config.clips}, {tests} of them of maps of test, expected"
            " two of these, for evaluate: 12 clips at least"
        )


def measurable(known: Collection[str], test: Clips, stage: str) -> None:
    """Refuses clips of which `evaluate` would measure nothing, hours later.

    A model can be made of them all the same, to generate: if no evaluation follows,
    that is told and no error.

    Args:
      known: modalities that training clips have.
      test: clips that would be measured.
      stage: --stage.

    Raises:
      ValueError: an evaluation follows, and no task has two test clips.
    """
    tasks = [task for task in TASKS if {task.given, task.wanted} <= set(known)]
    if any(has_both(test, task).sum() > 1 for task in tasks):
        return
    count = {task.name: int(has_both(test, task).sum()) for task in TASKS}
    said = (
        f"test clips that have both of a task: got {count}, and training clips have"
        f" {', '.join(sorted(known))}; expected two clips at least of a task that"
        " training clips have, too: add some, or evaluate has nothing to measure"
    )
    if stage == "all":
        raise ValueError(said)
    print(said)


def _check_training(config: "Config") -> None:
    whole_chunks("targets_budget", config.targets_budget, config.size)
    if config.masking == "uniform":
        _unused(config, ("focus",), "--masking=uniform, which has none")
    # Before JAX has started, too: later, a CPU can't simulate devices any more.
    if (mesh := mesh_of(config)) is not None:
        layout = training.mesh_layout(mesh)
        if config.batch % (parts := training.batch_parts(mesh)):
            raise ValueError(
                f"--batch: got {config.batch}, expected a multiple of {parts}, the"
                f" {' and '.join(layout['batch_axis'])} of --mesh={config.mesh}"
            )
        _check_parameters(config, mesh, layout["rules"])


def _check_parameters(config: "Config", mesh: Mesh, rules: sharding.Rules) -> None:
    """Raises ValueError for a mesh that does not divide heads or widths; no arrays.

    Vocabularies are those of four new tokenizers: which there will be is not known yet.
    """
    kinds = {k: tokens_of.config_of(k, quantizer=config.quantizer) for k in MODALITIES}
    frozen = {kind: Tokenizer(own, None, None) for kind, own in kinds.items()}
    init = functools.partial(
        egom2p.init,
        modalities=tokens_of.modalities_of(frozen),
        shape=SHAPES[config.size],
    )
    try:
        sharding.tree_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, rules)
    except ValueError as e:
        raise ValueError(
            f"--mesh: got {config.mesh}, which does not fit --size={config.size}: {e}"
        ) from None


def _unused(config: "Config", names: tuple[str, ...], beside: str) -> None:
    """Refuses flags that were given and would count for nothing."""
    for name in names:
        if (got := getattr(config, name)) != getattr(type(config), name):
            raise ValueError(f"--{name}: got {got} beside {beside}; leave it out")


def share_of_focus(focus: float) -> None:
    """Raises ValueError for a --focus that is no share."""
    if not 0 <= focus <= 1:
        raise ValueError(f"--focus: got {focus}, expected a share from 0 to 1")


def whole_chunks(name: str, asked: int, size: str) -> None:
    """Raises ValueError for targets that the size's chunks do not divide."""
    chunk = SHAPES[size].chunk
    if chunk and asked > chunk and asked % chunk:
        raise ValueError(
            f"--{name}: got {asked}, expected at most {chunk} or a multiple of it with"
            f" --size={size}"
        )


def mesh_of(config: "Config") -> Mesh | None:
    """The mesh of --mesh.

    Raises:
      ValueError: axes without sizes, or more of them than there are devices.
    """
    if not config.mesh:
        return None
    return sharding.host_mesh(sharding.parse_axes(config.mesh))
