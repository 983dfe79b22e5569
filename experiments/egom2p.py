"""EgoM2P on first-person clips: any of RGB, depth, camera and gaze from any other.

    python -m experiments.egom2p --flagfile=experiments/flagfiles/egom2p/full.flags
    python -m experiments.egom2p --stage=generate --workdir=.cache/egom2p \
        --input=clip.npz --targets=depth,camera

Li et al. 2025 (arXiv 2506.07886) at a size for two CPU cores. Stages, each of which
starts from what the one before left in --workdir and, but for evaluate, is not done
twice:

  record    first-person clips of the game engine ViZDoom with Freedoom's maps: real
            depth and poses, and a gaze *proxy* -> clips/{train,validation,test}. Put
            your own .npz there instead (see `multitask_jax.data.egocentric`).
  tokenize  trains four tokenizers, makes tokens of what is learned from ->
            tokenizers/, tokens/
  pretrain  masked modelling on clips that have some of the modalities -> model/
  evaluate  RGB -> gaze, camera, depth and depth -> RGB on held-out maps, beside a
            constant and the true first value held -> report.md, grid.png
  generate  any modalities of one clip -> --output: arrays, films, pictures

Legend: N clips.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import egom2p_evaluation as measures
from experiments import egom2p_folders as folders
from experiments import egom2p_pictures as pictures
from experiments import egom2p_report as reports
from experiments import egom2p_tokens as tokens_of
from experiments import egom2p_training as training
from experiments import flags, json_files, parsing, sweep_log
from experiments.egom2p_checks import check, measurable, mesh_of
from experiments.egom2p_evaluation import TASKS
from experiments.egom2p_generate import generate, sampling_of
from experiments.egom2p_model import load_model, save_params
from experiments.flags import flag
from multitask_jax import evaluation
from multitask_jax.data import vizdoom_clips
from multitask_jax.data.egocentric import Clips
from multitask_jax.host_memory import keep_freed_memory
from multitask_jax.masked import modalities as mods
from multitask_jax.masked import tokenizers
from multitask_jax.models.egom2p import SHAPES


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run depends on."""

    workdir: str = flag("Where everything is written.", ".cache/egom2p")
    stage: Literal["all", "record", "tokenize", "pretrain", "evaluate", "generate"] = (
        flag("One stage, or all but generate.", "all")
    )
    seed: int = flag("Of recording, training and generation.", 0)
    clips: int = flag("Clips to record, of about 2 s.", 6000)
    video_steps: int = flag("Steps of training, tokenizers of RGB and of depth.", 2500)
    trajectory_steps: int = flag("The same, of camera and gaze.", 1500)
    tokenizer_batch: int = flag("Videos a step (eight times as many trajectories).", 4)
    quantizer: Literal["vq", "fsq"] = flag(
        "Of RGB and depth: a learnt codebook, or rounding.", "vq"
    )
    mirror: bool = flag("Learn from mirror images of training clips too.", True)
    size: Literal["mini", "tiny", "small", "base"] = flag("Of the transformer.", "tiny")
    steps: int = flag("Steps of pretraining.", 4000)
    batch: int = flag("Clips a step.", 8)
    rate: float = flag("Peak learning rate.", 7e-4)
    inputs: int = flag("Tokens shown of a clip, at most.", 256)
    targets_budget: int = flag("Tokens asked of a clip, at most.", 128)
    masking: Literal["dirichlet", "uniform"] = flag(
        "How tokens are chosen.", "dirichlet"
    )
    focus: float = flag(
        "Share of Dirichlet masks that show one modality and ask for others.", 0.75
    )
    mesh: str = flag(
        "Pretrain on a mesh of this host's devices (a CPU simulates them): some of"
        " data, fsdp and tensor, like data=4,tensor=2.",
        "",
    )
    evaluate_every: int = flag("Steps between validations and checkpoints.", 250)
    test_clips: int = flag("Held-out clips to evaluate, at most.", 128)
    mean: bool = flag(
        "generate: the mean of what could be, as evaluate has too, not one sample.",
        False,
    )
    temperature: float = flag("Of sampling.", 0.01)
    top_p: float = flag("Of sampling.", 0.8)
    guidance: float = flag(
        "Of classifier-free guidance; 1 is without. Training never shows nothing, so"
        " that of a first step the other half is an untrained answer.",
        1.0,
    )
    schedule: Literal["linear", "cosine"] = flag("Sizes of parallel steps.", "linear")
    input: str = flag("generate: a clip's .npz with any of the modalities.", "")
    clip: int = flag("generate: which clip, if --input has several.", 0)
    given: str = flag(
        "generate: what to use of it, comma list; by default all that the model knows.",
        "",
    )
    targets: str = flag("generate: comma list of modalities to make.", "")
    output: str = flag("generate: a folder, by default WORKDIR/generated.", "")
    progress: bool = flag("Show progress bars.", True)


def run(config: Config) -> dict[str, Any]:
    """Runs a stage, or all that are not done; returns what `evaluate` found.

    Raises:
      ValueError: a flag is out of range, or --workdir is of another run.
      FileNotFoundError: a stage finds nothing to start from.
      OSError: clips can't be recorded here.
    """
    config = parsing.expanded(config, "workdir", "input", "output")
    check(config)
    if config.stage == "generate":
        return generate(config)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    todo: dict[str, Callable[[Config, Path], Any]] = {
        "record": record,
        "tokenize": tokenize,
        "pretrain": pretrain,
        "evaluate": evaluate,
    }
    found = {}
    for name in todo if config.stage == "all" else (config.stage,):
        start = time.perf_counter()
        found = todo[name](config, workdir) or {}
        if name != "evaluate":  # which takes the flags of what is there
            about = dataclasses.asdict(config)
            json_files.write(workdir / "config.json", about, indent=1)
        if config.progress:
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def record(config: Config, workdir: Path) -> None:
    """Records clips, unless the user's own are there.

    Raises:
      OSError: ViZDoom is missing or does not work.
    """
    folder = workdir / "clips"
    if folders.own_clips(workdir):
        return
    try:
        vizdoom_clips.record(
            folder, clips=config.clips, seed=config.seed, progress=config.progress
        )
    except (ModuleNotFoundError, RuntimeError) as e:
        raise OSError(
            f"{e}; or, instead of recording, put your own clips into {folder}/train,"
            f" validation and test, and remove {folder}/dataset.json if it is there"
        ) from e


def tokenize(config: Config, workdir: Path) -> None:
    """Trains the tokenizers and tokenizes the splits to learn from.

    Raises:
      FileNotFoundError: no clips, or a recording that was cut off.
      ValueError: tokenizers or tokens are there, of other clips or flags; or test has
        too few clips to evaluate.
    """
    folders.agree(config, "tokenizers")
    paths = {s: workdir / "tokens" / f"{s}.npz" for s in tokens_of.LEARNT}
    home = workdir / "clips"

    def test() -> Clips:
        return tokens_of.read_clips(home / "test", config.test_clips)

    if all(path.exists() for path in paths.values()):
        folders.agree(config, "tokens")
        if config.stage == "all":  # clips of test may be others now
            known = tokens_of.kinds_in(workdir / "tokenizers")
            measurable(known, test(), config.stage)
        return
    folders.recorded(home)
    clips = {split: tokens_of.read_clips(home / split) for split in tokens_of.LEARNT}
    known = [name for name, x in clips["train"].present.items() if x.any()]
    measurable(known, test(), config.stage)
    if config.mirror:
        clips["train"] = tokens_of.with_mirrored(clips["train"])
    folders.remember(config, "tokenizers")
    made = tokens_of.train(
        clips["train"],
        clips["validation"],
        workdir / "tokenizers",
        seed=config.seed,
        video_steps=config.video_steps,
        trajectory_steps=config.trajectory_steps,
        batch=config.tokenizer_batch,
        quantizer=config.quantizer,
        progress=config.progress,
    )
    if config.progress:
        print(reports.reconstructions(made))
    frozen = tokens_of.load(workdir / "tokenizers")
    folders.agree(config, "tokens")
    folders.remember(config, "tokens")
    for split, path in paths.items():
        if not path.exists():
            tokens_of.save(tokens_of.tokenize(frozen, clips[split]), path)


def pretrain(config: Config, workdir: Path) -> None:
    """Trains the model on tokens; goes on from its last checkpoint.

    Raises:
      ValueError: the tokens are of other clips, tokenizers or flags than now.
    """
    folder = workdir / "model"
    folders.agree(config, "tokenizers", "tokens", "model")
    if (folder / "params").exists():
        return
    folders.tokenized(workdir)
    frozen = tokens_of.load(workdir / "tokenizers")
    train, validation = (
        tokens_of.read(folders.there(workdir / "tokens" / f"{split}.npz", "tokenize"))
        for split in ("train", "validation")
    )
    folders.remember(config, "model")
    found = training.pretrain(
        train,
        validation,
        tokens_of.modalities_of(frozen),
        SHAPES[config.size],
        settings_of(config),
        start=training.from_codebooks(frozen, config.seed),
        workdir=folder,
        mesh=mesh_of(config),
        progress=config.progress,
    )
    if config.progress and found.waiting:
        print(f"waited for batches: {found.waiting:.2%} of the steps' time at most")
    json_files.write(folder / "history.json", found.history)
    save_params(folder / "params", found.params)


def settings_of(config: Config) -> training.Settings:
    """What `training.pretrain` needs of the flags."""
    return training.Settings(
        steps=config.steps,
        batch=config.batch,
        rate=config.rate,
        inputs=config.inputs,
        targets=config.targets_budget,
        masking=config.masking,
        focus=config.focus,
        evaluate_every=config.evaluate_every,
        seed=config.seed,
    )


def evaluate(config: Config, workdir: Path) -> dict[str, Any]:
    """Measures the four tasks on held-out clips and writes the report.

    The flags of training are those that the model was trained by, whatever is given;
    --seed is that of generation.

    Returns:
      Each clip's measures [N] by task, by method, by measure.

    Raises:
      ValueError: the clips are not those that the tokenizers saw, or no task has two
        test clips.
    """
    folders.tokenized(workdir)
    seed, config = config.seed, folders.as_trained(config)
    # The model remembers its clips and tokenizers, too.
    folders.agree(config, "model")
    model = load_model(workdir, SHAPES[config.size])
    train = tokens_of.read_clips(workdir / "clips" / "train")
    test = tokens_of.read_clips(workdir / "clips" / "test", config.test_clips)
    tokens = tokens_of.tokenize(model.tokenizers, test)
    found: dict[str, Any] = {}
    made: dict[str, np.ndarray] = {}
    frechet: dict[str, float] = {}
    for i, task in enumerate(TASKS):
        if unknown := {task.given, task.wanted} - set(model.tokenizers):
            print(f"{task.name}: left out, the model has no {' or '.join(unknown)}")
            continue
        rows = measures.has_both(test, task)
        if rows.sum() < 2:  # one is shown another's
            print(f"{task.name}: left out, {rows.sum()} test clips have both")
            continue
        truth = test.arrays[task.wanted][rows]
        own = tokens.at(rows)
        known = mods.unflatten(model.modalities, own.ids)[task.wanted]
        tokenizer = model.tokenizers[task.wanted]
        estimates = measures.of_model(
            model, task, own, seed=seed + i, **sampling_of(config)
        ) | measures.baselines(task, tokenizer, train, truth, known)
        found[task.name] = {
            name: measures.score(task.wanted, x, truth) for name, x in estimates.items()
        }
        # Of all clips, so that the picture may choose; others are never drawn.
        made[task.wanted] = np.zeros_like(test.arrays[task.wanted])
        made[task.wanted][rows] = estimates["EgoM2P, mean"]
        if task.wanted == "rgb":
            real = measures.features(model, known)
            for name, x in estimates.items():
                again = tokenizers.encode(tokenizer, x)
                frechet[name] = evaluation.frechet_distance(
                    measures.features(model, again), real
                )
    if not found:
        raise ValueError(
            f"{workdir}: no task can be measured, for what was told above; expected two"
            " test clips at least that have both modalities of a task"
        )
    curves = {
        kind: json_files.read(workdir / "tokenizers" / f"{kind}.json")
        for kind in model.tokenizers
    }
    history = json_files.read(workdir / "model" / "history.json")
    drawn = reports.moving(test) if len(made) == len(TASKS) else []
    if drawn:
        figure = pictures.grid(test.arrays, made, drawn)
        figure.savefig(workdir / "grid.png", dpi=90)
    records = sweep_log.read_lines(workdir / "model")
    about = _about(config, seed, train, history, records)
    report = reports.text(found, frechet, curves, test, about, grid=bool(drawn))
    (workdir / "report.md").write_text(report + "\n")
    # "loss" last: the names of what was evaluated become the runs of one figure.
    each = {
        name: [
            {"step": r["step"], "validation loss": r[f"eval/{name}"]}
            for r in history
            if f"eval/{name}" in r
        ]
        for name in (*model.tokenizers, "loss")
    }
    pictures.curves(each, "validation loss").savefig(workdir / "curves.png", dpi=110)
    print(report)
    return found


def _about(
    config: Config,
    seed: int,
    train: Clips,
    history: list[Any],
    records: list[dict[str, Any]],
) -> list[str]:
    counts = ", ".join(
        f"{int(x.sum())} with {measures.called(k)}" for k, x in train.present.items()
    )
    focus = f", focus {config.focus:g}" if config.masking == "dirichlet" else ""
    best = min((r for r in history if "eval/loss" in r), key=lambda r: r["eval/loss"])
    waiting = [row["waiting"] for row in records if "waiting" in row]
    return [
        f"Trained on {len(train.names)} clips ({counts})"
        f"{' and their mirror images' if config.mirror else ''}: {config.size} model,"
        f" {config.steps} steps of {config.batch} clips (step {best['step']} was best"
        f" on validation), {config.inputs} tokens shown and {config.targets_budget}"
        f" asked at most, {config.masking} masks{focus}.",
        f"Generated with temperature {config.temperature}, top-p {config.top_p},"
        f" guidance {config.guidance}, {config.schedule} schedule, seed {seed}.",
        f"Steps waited for batches {np.mean(waiting):.2%} of their time, at most."
        if waiting
        else "",
    ]


def interrupted(config: Config) -> str:
    """What the script says after ctrl-c."""
    if config.stage in ("evaluate", "generate"):
        return "the same command begins anew"
    return "the same command goes on from where it was"


if __name__ == "__main__":
    keep_freed_memory()
    flags.main(Config, flags.plain_errors(run, interrupted))
