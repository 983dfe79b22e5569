"""Runs of the study of EgoM2P's claims: each trains once, is measured once.

Legend: N clips, L tokens of a clip.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import egom2p_evaluation as measures
from experiments import egom2p_folders as folders
from experiments import egom2p_tokens as tokens_of
from experiments import egom2p_training as training
from experiments import json_files, parsing, study_store
from experiments.egom2p_evaluation import TASKS, Model, Task
from experiments.egom2p_model import load_params, save_params
from experiments.egom2p_tokens import Tokens
from experiments.egom2p_training import Settings
from multitask_jax.masked import modalities as mods
from multitask_jax.masked.tokenizers import Tokenizer
from multitask_jax.models.egom2p import SHAPES

if TYPE_CHECKING:
    from experiments.egom2p_study import Config

# Task, method, measure: [N]; as `egom2p_report.Measured`, to write to.
Measured = dict[str, dict[str, dict[str, np.ndarray]]]


class Study:
    """The data, the folders and the runs that parts share."""

    def __init__(self, config: "Config"):
        base = Path(config.base)
        self.config, self.workdir = config, Path(config.workdir)
        wanted, known = parsing.paths(config.tasks), [task.wanted for task in TASKS]
        if not wanted:
            raise ValueError(f"--tasks: got none, expected some of {', '.join(known)}")
        for name in wanted:
            parsing.one_of("tasks", name, known)
        self.tasks = tuple(task for task in TASKS if task.wanted in wanted)
        self.tokens = {}
        for split in tokens_of.LEARNT:
            path = base / "tokens" / f"{split}.npz"
            if not path.exists():
                raise FileNotFoundError(
                    f"no {path}; run `python -m experiments.egom2p --workdir={base}`,"
                    " or its --stage=tokenize"
                )
            self.tokens[split] = tokens_of.read(path)
        self.tokenizers = tokens_of.load(base / "tokenizers")
        folders.clips_there(base)
        file = base / "tokenizers" / "settings.json"
        if folders.changed(file, {"files": folders.digests(base)}, base):
            raise ValueError(
                f"{base}/tokens: made of other clips than are in {base}/clips now;"
                " remove tokenizers, tokens and model there, and make them anew"
            )
        folders.fit_together(base, "tokens")
        codes = tokens_of.tokenizers_of(base / "tokenizers")
        # Measures are of test clips, too.
        test = tokens_of.files_of(base / "clips" / "test")
        self.made_of = json_files.read(file) | {"codes": codes, "test": test}
        self.clips = {
            "train": tokens_of.read_clips(base / "clips" / "train"),
            "validation": tokens_of.read_clips(base / "clips" / "validation"),
            "test": tokens_of.read_clips(base / "clips" / "test", config.test_clips),
        }
        # Tokens of training clips are followed by those of their mirror images.
        if len(self.tokens["train"].ids) == 2 * len(self.clips["train"].names):
            self.clips["train"] = tokens_of.with_mirrored(self.clips["train"])
        self.tokens["test"] = tokens_of.tokenize(self.tokenizers, self.clips["test"])
        self.refuse_missing()

    def refuse_missing(self) -> None:
        """Raises ValueError for what parts would lack after hours of training."""
        base, parts = self.config.base, set(parsing.paths(self.config.parts) or [])
        layout, train = tokens_of.modalities_of(self.tokenizers), self.tokens["train"]
        # Clips that a part needs at least. To show a clip another's, it takes two.
        least = {"test": 2}
        if parts & {"specialists", "merging"}:  # train on a task's clips alone
            least |= {"train": 1, "validation": 1}
        for task in self.tasks:
            pair = task.given, task.wanted
            if unknown := sorted(set(pair) - set(self.tokenizers)):
                raise ValueError(
                    f"--tasks: got {task.wanted}, but {base} has no tokenizer of"
                    f" {' or '.join(unknown)}; leave it out"
                )
            for split, count in least.items():
                if (got := len(both(self.tokens[split], layout, *pair))) < count:
                    raise ValueError(
                        f"--tasks: got {task.wanted}, but {got} clips of {split} in"
                        f" {base} have both of {task.name}, expected {count} at least;"
                        " leave it out, or add some"
                    )
        unknown = sorted(set(tokens_of.VIDEO) - set(self.tokenizers))
        if "frames" in parts and unknown:
            raise ValueError(
                f"--parts: got frames, but {base} has no tokenizer of"
                f" {' or '.join(unknown)}; leave it out"
            )
        if "coverage" in parts and not train.present.all(axis=1).any():
            raise ValueError(
                "--parts: got coverage, but no training clip has all modalities; leave"
                " it out"
            )

    def agree(self) -> None:
        """Refuses a study that went on from another base."""
        file = self.workdir / "base.json"
        differ = study_store.changed(file, self.made_of)
        for name in ("codes", "test"):  # earlier versions did not tell
            if differ.get(name, ("",))[0] is None:
                differ.pop(name, None)
        if differ:
            raise ValueError(
                f"{self.workdir} goes on from another base (there, here): {differ};"
                " pass another --workdir or remove it"
            )
        json_files.write(file, self.made_of, indent=1)

    def settings(self, seed: int = 0, **changes: Any) -> Settings:
        """Of a run."""
        c = self.config
        own = Settings(
            steps=c.steps,
            batch=c.batch,
            rate=c.rate,
            inputs=c.inputs,
            targets=c.targets,
            focus=c.focus,
            evaluate_every=c.evaluate_every,
            seed=seed,
        )
        return dataclasses.replace(own, **changes)

    def train(
        self,
        name: str,
        settings: Settings,
        *,
        rows: np.ndarray | None = None,
        frozen: dict[str, Tokenizer] | None = None,
        tokens: dict[str, Tokens] | None = None,
        start: Any = None,
    ) -> Model:
        """A run of pretraining, trained unless runs/NAME has its parameters.

        Args:
          name: of the run.
          settings: of it.
          rows: of training clips to use; all if not given.
          frozen, tokens: tokenizers and their tokens; the study's own if not given.
          start: parameters to go on from; random ones with the codebooks if not given.
        """
        frozen, tokens = frozen or self.tokenizers, tokens or self.tokens
        layout, shape = tokens_of.modalities_of(frozen), SHAPES[self.config.size]
        folder = self.workdir / "runs" / name
        if name == "all-0":
            self.share(folder, settings)
        if not (folder / "params").exists():
            train, validation = tokens["train"], tokens["validation"]
            if rows is not None:
                train = train.at(rows)
            if settings.task is not None:
                validation = validation.at(both(validation, layout, *settings.task))
            begin = training.from_codebooks(frozen, settings.seed)
            spent = time.perf_counter()
            found = training.pretrain(
                train,
                validation,
                layout,
                shape,
                settings,
                start=begin if start is None else lambda _: start,
                workdir=folder,
                progress=self.config.progress,
            )
            self.keep(folder, found.history, time.perf_counter() - spent)
            save_params(folder / "params", found.params)
        return Model(load_params(folder / "params"), layout, shape, frozen)

    def share(self, folder: Path, settings: Settings) -> None:
        """Copies the base's model to `folder` if a run would train the same one."""
        model = Path(self.config.base).absolute() / "model"
        about = model / "settings.json"
        if folder.exists() or not (model / "history.json").exists():
            return
        told = dataclasses.asdict(settings) | {"size": self.config.size}
        told["targets_budget"] = told.pop("targets")
        del told["task"], told["fill"]  # it has none, and fills
        base = Path(self.config.base)
        told |= {"files": folders.digests(base), "codes": self.made_of["codes"]}
        if folders.changed(about, told, base):
            return
        history = json_files.read(model / "history.json")
        # Last of all its name: a copy that was stopped is made again.
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(model / "params", partial / "params")
        json_files.write(partial / "run.json", {"history": history})
        partial.rename(folder)

    def keep(self, folder: Path, history: list[dict[str, float]], spent: float) -> None:
        """Writes a run's learning curve and its seconds; prints the latter."""
        made = {"seconds": round(spent, 1), "history": history}
        json_files.write(folder / "run.json", made)
        if self.config.progress:
            print(f"{folder.name}: {spent:.0f} s", flush=True)

    def once(self, name: str, make: Callable[[], Measured]) -> Measured:
        """What measures/NAME.npz has, made and written unless it is there."""
        path = self.workdir / "measures" / f"{name}.npz"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            flat = {
                "|".join((task, method, measure)): x
                for task, methods in make().items()
                for method, values in methods.items()
                for measure, x in values.items()
            }
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **flat)
            partial.rename(path)
        found: Measured = {}
        with np.load(path, allow_pickle=False) as file:
            for key in file:
                task, method, measure = key.split("|")
                found.setdefault(task, {}).setdefault(method, {})[measure] = file[key]
        return found

    def pairs(self, task: Task, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a split's clips that have both of a task's, and the target [N, ...].

        Raises:
          ValueError: there is none.
        """
        clips = self.clips[split]
        rows = np.flatnonzero(clips.present[task.given] & clips.present[task.wanted])
        if not len(rows):
            raise ValueError(f"no clip of {split} has both of {task.name}")
        return rows, clips.arrays[task.wanted][rows]

    def judge(
        self,
        make: Callable[[Task, Tokens, np.ndarray], dict[str, np.ndarray]],
        tokens: Tokens | None = None,
        tasks: tuple[Task, ...] | None = None,
    ) -> Measured:
        """Scores what `make` makes of held-out clips: (task, tokens, truth) -> [N].

        `tokens`: of the test clips, if they are not the study's own.
        """
        tokens, found = tokens or self.tokens["test"], {}
        for task in self.tasks if tasks is None else tasks:
            rows, truth = self.pairs(task, "test")
            found[task.name] = {
                method: measures.score(task.wanted, x, truth)
                for method, x in make(task, tokens.at(rows), truth).items()
            }
        return found

    def judged(self, run: str, model: Model, tokens: Tokens | None = None) -> Measured:
        """What a run's model expects, measured once."""
        return self.once(run, lambda: self.judge(self.of(model), tokens))

    def of(self, model: Model, name: str = "model") -> Callable[..., Any]:
        """`judge`'s make for the mean that a model expects."""
        return lambda task, tokens, truth: {
            name: measures.means(model, tokens, (task.given,), task.wanted)
        }


def both(tokens: Tokens, layout: mods.Modalities, *names: str) -> np.ndarray:
    """Rows of clips that have all the named modalities."""
    return np.flatnonzero(tokens.present[:, mods.indices(layout, names)].all(axis=1))
