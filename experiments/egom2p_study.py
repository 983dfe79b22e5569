r"""EgoM2P's claims (Li et al. 2025, arXiv 2506.07886), tested at a small size.

    python -m experiments.egom2p --flagfile=experiments/flagfiles/egom2p/full.flags
    python -m experiments.egom2p_study \
        --flagfile=experiments/flagfiles/egom2p/study.flags

Goes on from a run of `experiments.egom2p` (--base: its clips, tokenizers and tokens)
and asks, by --parts:

  coverage     is training on all clips, most of which lack modalities, better than on
               the complete ones alone? (a)
  decoding     are few steps of parallel decoding as good as token by token? (b)
  specialists  one model for all tasks, or a regressor of its size for each? (c)
  masking      Dirichlet masks, with or without --focus, or uniform ones? (d)
  frames       tokens of four frames or of one? (e)
  merging      the model tuned for each task, and the four merged by
               `experiments.merge` from their Orbax checkpoints

Every run trains once and goes on where it was stopped: runs/NAME has its checkpoints
and learning curve, what was measured lies in measures/. Writes report.md, curves.png.

Legend: N clips, S seeds.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import egom2p_checks, flags, json_files, merge, parsing, study_store
from experiments import egom2p_evaluation as measures
from experiments import egom2p_regressor as regressor
from experiments import egom2p_study_report as reports
from experiments import egom2p_tokens as tokens_of
from experiments import egom2p_training as training
from experiments.egom2p_evaluation import Model, Task
from experiments.egom2p_model import load_params, save_params
from experiments.egom2p_regressor import Pairs
from experiments.egom2p_study_runs import Measured, Study, both
from experiments.egom2p_tokens import Tokens
from experiments.flags import flag
from multitask_jax.data.egocentric import Clips
from multitask_jax.host_memory import keep_freed_memory
from multitask_jax.masked import modalities as mods
from multitask_jax.masked import tokenizers
from multitask_jax.models.egom2p import SHAPES

PARTS = ("coverage", "decoding", "specialists", "masking", "frames", "merging")
# What may differ from an earlier run in the folder; not the tasks: merging
# has one model of all of them.
FREE = ("parts", "seeds", "progress")
SAMPLING = {"temperature": 1.0, "p": 0.9}  # what the model believes, less its tail
SCALES = (0.3, 0.6, 1.0)  # of merged task vectors; chosen on validation clips


@dataclasses.dataclass(frozen=True)
class Config:
    """What a study depends on."""

    base: str = flag("--workdir of experiments.egom2p, tokenized.", ".cache/egom2p")
    workdir: str = flag("Where everything is written.", ".cache/egom2p_study")
    parts: str = flag(f"Comma list of {', '.join(PARTS)}.", ",".join(PARTS))
    tasks: str = flag(
        "Comma list of targets to measure: gaze, camera, depth (all from RGB) and rgb"
        " (from depth).",
        "gaze,camera,depth,rgb",
    )
    size: Literal["mini", "tiny", "small", "base"] = flag(
        "Of the transformers, regressors' too.", "tiny"
    )
    seeds: int = flag("Of coverage and decoding; the rest has one.", 3)
    steps: int = flag("Of pretraining, each run.", 1000)
    regressor_steps: int = flag("Of each specialist regressor.", 600)
    tuning_steps: int = flag("Of tuning the model for one task.", 150)
    frame_steps: int = flag(
        "Of the tokenizers of single frames; the base's --video_steps.", 2500
    )
    tokenizer_batch: int = flag("Videos a step of these.", 4)
    batch: int = flag("Clips a step.", 8)
    rate: float = flag("Peak learning rate.", 7e-4)
    inputs: int = flag("Tokens shown of a clip, at most.", 256)
    targets: int = flag("Tokens asked of a clip, at most.", 128)
    focus: float = flag("As experiments.egom2p has it.", 0.75)
    evaluate_every: int = flag("Steps between validations and checkpoints.", 250)
    test_clips: int = flag("Held-out clips, at most.", 128)
    slow_clips: int = flag("Held-out clips decoded token by token, at most.", 12)
    progress: bool = flag("Show progress bars.", True)


def coverage(study: Study) -> dict[str, list[Measured]]:
    """(a): all clips, or those with every modality alone; a list over seeds each."""
    complete = np.flatnonzero(study.tokens["train"].present.all(axis=1))
    found: dict[str, list[Measured]] = {}
    for seed in range(study.config.seeds):
        for name, rows in (("all", None), ("complete", complete)):
            run = f"{name}-{seed}"
            model = study.train(run, study.settings(seed), rows=rows)
            found.setdefault(name, []).append(study.judged(run, model))
    return found


def decoding(study: Study) -> dict[str, Any]:
    """(b): samples in 1 step, in the paper's few and token by token, and the time.

    Returns:
      "measured", a list over seeds of what was measured by steps, and "seconds" a clip
      of each, by task and steps, a list over seeds.
    """
    found, seconds = [], []
    for seed in range(study.config.seeds):
        model = study.train(f"all-{seed}", study.settings(seed))
        path = study.workdir / "measures" / f"decoding-{seed}.json"

        def measured(model: Model = model, seed: int = seed) -> Measured:
            made, clock = decoded(study, model, seed)
            json_files.write(path, clock)  # noqa: B023
            return made

        found.append(study.once(f"decoding-{seed}", measured))
        seconds.append(json_files.read(path))
    return {"measured": found, "seconds": seconds}


def decoded(
    study: Study, model: Model, seed: int
) -> tuple[Measured, dict[str, dict[str, float]]]:
    """Scores of some clips by steps, and the seconds a clip."""
    found: Measured = {}
    clock: dict[str, dict[str, float]] = {}
    length = {m.name: m.length for m in model.modalities}
    for task in study.tasks:
        rows, truth = study.pairs(task, "test")
        n = min(study.config.slow_clips, len(rows))
        some = np.arange(n) * len(rows) // n
        tokens, truth = study.tokens["test"].at(rows[some]), truth[some]
        found[task.name], clock[task.name] = {}, {}
        for name, steps in (
            ("1 step", 1),
            ("few steps", task.steps),
            ("token by token", length[task.wanted]),
        ):
            sample = functools.partial(
                measures.predict,
                model,
                tokens,
                (task.given,),
                {task.wanted: steps},
                seed=seed,
                **SAMPLING,
            )
            codes = sample()[task.wanted]  # compiles
            start = time.perf_counter()
            sample()
            clock[task.name][name] = (time.perf_counter() - start) / n
            made = tokenizers.decode(model.tokenizers[task.wanted], codes)
            found[task.name][name] = measures.score(task.wanted, made, truth)
    return found, clock


def specialists(study: Study) -> Measured:
    """(c): EgoM2P, a regressor for each task, and what needs no model."""
    model = study.train("all-0", study.settings())

    def make(task: Task, tokens: Tokens, truth: np.ndarray) -> dict[str, np.ndarray]:
        codes = mods.unflatten(model.modalities, tokens.ids)[task.wanted]
        tokenizer = model.tokenizers[task.wanted]
        made = measures.of_model(model, task, tokens, seed=0, **SAMPLING)
        special = regressor.predict(regress(study, task), tokens)
        return made | {
            "specialist regressor": special.astype(truth.dtype),
            **measures.baselines(task, tokenizer, study.clips["train"], truth, codes),
        }

    return study.once("specialists", lambda: study.judge(make))


def regress(study: Study, task: Task) -> regressor.Trained:
    """A task's regressor, trained unless runs/NAME has its parameters."""
    folder = study.workdir / "runs" / f"regressor-{task.given}-{task.wanted}"
    settings = study.settings(steps=study.config.regressor_steps)
    layout = tokens_of.modalities_of(study.tokenizers)
    tokenizer = study.tokenizers[task.wanted]
    if not (folder / "params").exists():
        pairs = []
        for split in ("train", "validation"):
            rows, truth = study.pairs(task, split)
            some = study.tokens[split].at(rows)
            pairs.append(Pairs(some.ids, some.known, truth))
        start = time.perf_counter()
        found = regressor.fit(
            *pairs,
            task,
            layout,
            tokenizer,
            SHAPES[study.config.size],
            settings,
            start=training.from_codebooks(study.tokenizers, settings.seed),
            workdir=folder,
            progress=study.config.progress,
        )
        study.keep(folder, found.history, time.perf_counter() - start)
        save_params(folder / "params", found.params)
    params = load_params(folder / "params")
    return regressor.Trained(
        params, layout, SHAPES[study.config.size], task, tokenizer, []
    )


def masking(study: Study) -> dict[str, Measured]:
    """(d): by how masks are drawn; the first row is (a)'s."""
    found = {}
    for name, run, changes in (
        (f"Dirichlet, focus {study.config.focus:g}", "all-0", {}),
        ("Dirichlet alone (the paper's)", "paper-0", {"focus": 0.0, "fill": False}),
        ("uniform", "uniform-0", {"masking": "uniform"}),
    ):
        model = study.train(run, study.settings(**changes))
        found[name] = study.judged(run, model)
    return found


def frames(study: Study) -> dict[str, Any]:
    """(e): video tokens of four frames, or of one; the same budgets of tokens.

    Returns:
      "measured" by name of the tokens, and "quality" of the tokenizers, as
      KIND.json has it, by name and kind.
    """
    config, folder = study.config, study.workdir / "frames"
    model = study.train("all-0", study.settings())
    found = {"4 frames": study.judged("all-0", model)}
    made = tokens_of.train(
        study.clips["train"],
        study.clips["validation"],
        folder,
        seed=0,
        video_steps=config.frame_steps,
        trajectory_steps=1,
        batch=config.tokenizer_batch,
        temporal=1,
        kinds=tokens_of.VIDEO,
        progress=config.progress,
    )
    own = tokens_of.load(folder)
    frozen = {kind: own.get(kind, t) for kind, t in study.tokenizers.items()}
    tokens = {}
    for split, clips in study.clips.items():
        path = folder / "tokens" / f"{split}.npz"
        if not path.exists():
            tokens_of.save(tokens_of.tokenize(frozen, clips), path)
        tokens[split] = tokens_of.read(path)
    single = study.train("frames-0", study.settings(), frozen=frozen, tokens=tokens)
    found["1 frame"] = study.judged("frames-0", single, tokens["test"])
    kept = Path(config.base) / "tokenizers"
    quality = {
        "4 frames": {
            kind: json_files.read(kept / f"{kind}.json")["quality"] for kind in made
        },
        "1 frame": {kind: report["quality"] for kind, report in made.items()},
    }
    return {"measured": found, "quality": quality}


def merging(study: Study) -> dict[str, Any]:
    """The model tuned for each task alone, and merges of the four.

    Returns:
      "measured": Measured, and "scales": what validation chose by method.
    """
    base = study.train("all-0", study.settings())
    layout, runs = base.modalities, study.workdir / "runs"
    tuned = {}
    for task in study.tasks:
        rows = both(study.tokens["train"], layout, task.given, task.wanted)
        settings = study.settings(
            steps=study.config.tuning_steps,
            rate=study.config.rate / 4,
            task=(task.given, task.wanted),
            evaluate_every=max(1, study.config.tuning_steps // 3),
        )
        name = f"tuned-{task.given}-{task.wanted}"
        tuned[task] = name, study.train(name, settings, rows=rows, start=base.params)

    def merged(method: str, scale: float | None) -> Model:
        out = study.workdir / "merged" / f"{method}-{scale}"
        if not out.exists():
            merge.run(
                merge.Config(
                    base=str(runs / "all-0" / "params"),
                    models=",".join(
                        str(runs / n / "params") for n, _ in tuned.values()
                    ),
                    method=method,
                    scale=scale,
                    output=str(out),
                    progress=False,
                )
            )
        return base._replace(params=load_params(out))

    chosen: dict[str, float] = {}
    path = study.workdir / "measures" / "merging.json"

    def measured() -> Measured:
        found = study.judge(study.of(base, "pretrained for all tasks"))
        for task, (_, model) in tuned.items():
            own = study.judge(study.of(model), tasks=(task,))[task.name]["model"]
            found[task.name]["tuned for this task"] = own
        others = {"average": merged("linear", None)}
        judge = judge_of(study, base)
        for name, method in (("task arithmetic", "task_arithmetic"), ("TIES", "ties")):
            scores = {s: judge(merged(method, s).params) for s in SCALES}
            chosen[name] = min(scores, key=scores.__getitem__)
            others[name] = merged(method, chosen[name])
        for name, model in others.items():
            for task, values in study.judge(study.of(model)).items():
                found[task][f"merged: {name}"] = values["model"]
        json_files.write(path, chosen)
        return found

    return {
        "measured": study.once("merging", measured),
        "scales": json_files.read(path),
    }


def judge_of(study: Study, model: Model) -> Callable[[Any], float]:
    """Parameters -> mean over tasks of the cross-entropy on validation clips."""
    tokens, parts = study.tokens["validation"], []
    for i, task in enumerate(study.tasks):
        settings = study.settings(task=(task.given, task.wanted))
        loss = jax.jit(training.loss_fn(model.modalities, model.shape, settings))
        rows = both(tokens, model.modalities, task.given, task.wanted)
        rows = rows[training.spread(len(rows), 64)]
        parts.append((loss, tokens.at(rows), jax.random.key(i), task.wanted))

    def judge(params: Any) -> float:
        # The loss itself is a mean over modalities, those without targets among them.
        each = [loss(params, x, key)[1][wanted] for loss, x, key, wanted in parts]
        return float(np.mean(each))

    return judge


def check(config: Config) -> list[str]:
    """The parts; raises ValueError for what would fail only after trainings."""
    parts = parsing.paths(config.parts) or []
    for part in parts:
        parsing.one_of("parts", part, PARTS)
    ones = ("seeds", "steps", "regressor_steps", "tuning_steps", "frame_steps")
    ones += ("tokenizer_batch", "batch", "inputs", "targets", "evaluate_every")
    least = dict.fromkeys((*ones, "slow_clips"), 1)
    parsing.at_least(config, **least, test_clips=2)
    parsing.rate_of_learning(config.rate)
    egom2p_checks.share_of_focus(config.focus)
    egom2p_checks.whole_chunks("targets", config.targets, config.size)
    return parts


def run(config: Config) -> dict[str, Any]:
    """Does the parts asked for and writes the report; returns what they found.

    Raises:
      ValueError: an unknown part, a number out of range, --base lacks what a part or a
        task needs, or --workdir is of another study.
      FileNotFoundError: --base has no tokens.
    """
    config = parsing.expanded(config, "base", "workdir")
    parts = check(config)
    study = Study(config)
    study_store.remember(config, study.workdir, FREE)
    study.agree()
    todo: dict[str, Callable[[Study], Any]] = {
        "coverage": coverage,
        "decoding": decoding,
        "specialists": specialists,
        "masking": masking,
        "frames": frames,
        "merging": merging,
    }
    # What was done before is told again: its runs and measures are there.
    file = study.workdir / "parts.json"
    done = json_files.read(file) if file.exists() else []
    found = {}
    for part in dict.fromkeys([*done, *parts]):
        start = time.perf_counter()
        found[part] = todo[part](study)
        if config.progress:
            print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
        json_files.write(file, list(dict.fromkeys([*done, *found])))
    reports.write(study.workdir, found, _about(study))
    return found


def _about(study: Study) -> list[str]:
    train, c = study.tokens["train"], study.config
    complete = int(train.present.all(axis=1).sum())
    clips: Clips = study.clips["test"]
    mirror = " with mirror images" if study.made_of["mirror"] else ""
    return [
        f"{len(train.ids)} training clips{mirror}, {complete} of them"
        f" complete; {c.size} model, {c.steps} steps of {c.batch} clips, {c.inputs}"
        f" tokens shown and {c.targets} asked at most; regressors {c.regressor_steps}"
        f" steps, tuning {c.tuning_steps}. {len(clips.names)} held-out clips of"
        f" {', '.join(sorted(set(clips.group)))}.",
    ]


if __name__ == "__main__":
    keep_freed_memory()
    flags.main(
        Config, flags.plain_errors(run, "the same command goes on from where it was")
    )
