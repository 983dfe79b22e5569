"""The last stage of `experiments.egom2p`: any modalities of one clip."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import egom2p_evaluation as measures
from experiments import egom2p_folders as folders
from experiments import egom2p_pictures as pictures
from experiments import egom2p_tokens as tokens_of
from experiments import parsing
from experiments.egom2p_evaluation import TASKS
from experiments.egom2p_model import load_model
from multitask_jax.data import egocentric
from multitask_jax.data.egocentric import MODALITIES, Clips
from multitask_jax.models.egom2p import SHAPES

if TYPE_CHECKING:
    from experiments.egom2p import Config

_STEPS = {task.wanted: task.steps for task in TASKS}


def generate(config: "Config") -> dict[str, Any]:
    """Makes --targets of the clip --input, and writes them to --output.

    Raises:
      ValueError: no --input or --targets, modalities that do not fit, or --output
        would overwrite --input.
      FileNotFoundError: no model in --workdir.
    """
    targets = parsing.paths(config.targets) or []
    if not config.input or not targets:
        raise ValueError(
            "--stage=generate needs --input=clip.npz and --targets=depth,camera (some"
            f" of {', '.join(MODALITIES)})"
        )
    workdir, source = Path(config.workdir), Path(config.input)
    folder = Path(config.output or workdir / "generated")
    made_file = folder / pictures.MADE_FILE
    read = [source] if source.is_file() else egocentric.files_below(source)
    if made_file.exists() and any(path.samefile(made_file) for path in read):
        raise ValueError(
            f"--input: got {source}, which would be overwritten; pass another --output"
            f" than {folder}"
        )
    clips = egocentric.load(source)
    if not 0 <= config.clip < len(clips.names):
        raise ValueError(
            f"--clip={config.clip}: {config.input} has clips 0 to"
            f" {len(clips.names) - 1}"
        )
    row = slice(config.clip, config.clip + 1)
    arrays = {k: x[row] for k, x in clips.arrays.items() if clips.present[k][row][0]}
    model = load_model(workdir, SHAPES[folders.as_trained(config).size])
    known = tuple(model.tokenizers)
    given = parsing.paths(config.given)
    if not given:
        given = [k for k in known if k in arrays and k not in targets]
        if left := [k for k in arrays if k not in known]:
            print(f"left out, the model does not know it: {', '.join(left)}")
    if missing := [name for name in given if name not in arrays]:
        raise ValueError(
            f"--given={','.join(given)}: {config.input} has no {missing[0]} in clip"
            f" {config.clip}, only {', '.join(arrays)}"
        )
    if not given or set(given) & set(targets):
        raise ValueError(
            f"got --given={','.join(given)} and --targets={','.join(targets)}; expected"
            " something given that is not a target too"
        )
    for flag_name, names in (("targets", targets), ("given", given)):
        for name in names:
            parsing.one_of(flag_name, name, known)
    some = Clips(
        {k: arrays.get(k, clips.arrays[k][row]) for k in MODALITIES},
        {k: np.array([k in given]) for k in MODALITIES},
        clips.names[row],
        clips.group[row],
    )
    tokens = tokens_of.tokenize(model.tokenizers, some)
    if config.mean:
        made = {
            k: measures.means(model, tokens, tuple(given), k, seed=config.seed)[0]
            for k in targets
        }
    else:
        codes = measures.predict(
            model,
            tokens,
            tuple(given),
            {name: _STEPS[name] for name in targets},
            seed=config.seed,
            **sampling_of(config),
        )
        made = {k: x[0] for k, x in measures.decoded(model.tokenizers, codes).items()}
    alone = {k: x[0] for k, x in arrays.items()}
    for path in pictures.write_made(folder, made, alone):
        print(path)
    return made


def sampling_of(config: "Config") -> dict[str, Any]:
    """Arguments of `egom2p_evaluation.predict`."""
    return {
        "temperature": config.temperature,
        "p": config.top_p,
        "guidance": config.guidance,
        "schedule": config.schedule,
    }
