"""Text tasks as tensorflow-datasets builders, without TensorFlow.

    task = read(builder("tasks/mood"))     # records made from the folder of text_tasks
    task = glue("sst2")                    # downloads GLUE, so it needs the internet
    write("tasks/sst2", task)              # a folder that experiments read

Records are array_record files, read with random access. GLUE (Wang et al. 2018, arXiv
1804.07461) is tensorflow-datasets' own; labels of its test sets are hidden, so
that what it calls validation is our test, and our validation comes from its train.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from multitask_jax.data import records, text_tasks
from multitask_jax.data.text_tasks import PARTS, Rows, Task

# Sentences of a row, by their names in tensorflow-datasets.
GLUE = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
_COLUMNS = {1: ("sentence",), 2: ("sentence1", "sentence2")}


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderConfig(tfds.core.BuilderConfig):
    """A folder of train.tsv, validation.tsv and test.tsv."""

    folder: str


class TextTask(tfds.core.GeneratorBasedBuilder):
    """A folder of three files (see text_tasks) as records."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        task = text_tasks.read(self.builder_config.folder)
        features = {"label": tfds.features.ClassLabel(names=task.labels)}
        features |= {name: tfds.features.Text() for name in _COLUMNS[task.width]}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Classification of text: {task.name}.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # rows as they are in the files
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        task = text_tasks.read(self.builder_config.folder)
        return {p: self._generate_examples(getattr(task, p)) for p in PARTS}

    def _generate_examples(self, rows: Rows) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, sentences in enumerate(rows.sentences):
            names = _COLUMNS[len(sentences)]
            row = dict(zip(names, sentences, strict=True))
            yield i, {"label": int(rows.labels[i]), **row}


def builder(
    folder: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None
) -> TextTask:
    """Makes the records of a folder, unless they are there already.

    Args:
      folder: as `text_tasks.read` takes it; other contents make other records.
      data_dir: where records go; tensorflow-datasets' own place if not given.

    Raises:
      FileNotFoundError, ValueError: as `text_tasks.read`.
    """
    folder = Path(folder).resolve()
    text_tasks.read(folder)
    contents = hashlib.sha256()
    for part in PARTS:
        contents.update(hashlib.sha256((folder / f"{part}.tsv").read_bytes()).digest())
    config = FolderConfig(
        name=f"{folder.name}-{contents.hexdigest()[:12]}", folder=str(folder)
    )
    made = TextTask(
        config=config,
        file_format=records.FORMAT,
        data_dir=None if data_dir is None else os.fspath(data_dir),
    )
    made.download_and_prepare()
    return made


def read(made: TextTask) -> Task:
    """The task that a builder's records hold."""
    names = tuple(made.info.features["label"].names)
    columns = [name for name in made.info.features if name != "label"]
    columns.sort()
    parts = [rows(made.as_data_source(part), columns) for part in PARTS]
    return Task(Path(made.builder_config.folder).name, names, *parts)


def rows(source: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Rows:
    """Rows of a data source whose records have a `label` and these sentences."""
    labels, sentences = [], []
    for i in range(len(source)):
        record = source[i]
        labels.append(record["label"])
        sentences.append(tuple(records.plain(record[name]) for name in columns))
    return Rows(np.array(labels, np.int32), sentences)


def glue(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Task:
    """A task of GLUE; downloads it on first use.

    Args:
      name: "sst2", "mrpc", ...: those of GLUE that classify.
      data_dir: where records go; tensorflow-datasets' own place if not given.
      validation: share of its train that is our validation.
      seed: of the choice of these.

    Raises:
      ValueError: not a name of `GLUE`, or a share out of (0, 1).
      OSError: it can't be downloaded.
    """
    check_glue(name)
    if not 0 < validation < 1:
        raise ValueError(f"got validation={validation}, expected a share in (0, 1)")
    made = tfds.builder(
        f"glue/{name}",
        file_format=records.FORMAT,
        data_dir=None if data_dir is None else os.fspath(data_dir),
    )
    try:
        made.download_and_prepare()
    except (OSError, tfds.download.DownloadError) as e:
        raise OSError(
            f"glue/{name} can't be downloaded ({type(e).__name__}: {e}); it needs the"
            f" internet once. Or copy a prepared glue/{name} under data_dir, or make a"
            " folder of train.tsv, validation.tsv and test.tsv"
        ) from e
    there = "validation_matched" if name == "mnli" else "validation"
    all_rows, test = (
        rows(made.as_data_source(p), GLUE[name]) for p in ("train", there)
    )
    count = len(all_rows.labels)
    chosen = np.zeros(count, bool)
    cut = min(max(round(count * validation), 1), count - 1)
    chosen[np.random.default_rng(seed).permutation(count)[:cut]] = True
    parts = [text_tasks.at(all_rows, np.flatnonzero(c)) for c in (~chosen, chosen)]
    return Task(name, tuple(made.info.features["label"].names), *parts, test)


def check_glue(name: str) -> None:
    """Raises ValueError for what is not a name of `GLUE`."""
    if name not in GLUE:
        raise ValueError(f"got GLUE task {name!r}, expected one of {', '.join(GLUE)}")


def write(folder: str | os.PathLike[str], task: Task) -> None:
    """Writes a task as a folder that `text_tasks.read` takes.

    Tabs and line ends within sentences become spaces.

    Raises:
      FileExistsError: the folder is there already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    for part in PARTS:
        given = getattr(task, part)
        lines = [("label", *_COLUMNS[task.width])]
        for label, sentences in zip(given.labels, given.sentences, strict=True):
            lines.append(
                (task.labels[label], *(" ".join(s.split()) for s in sentences))
            )
        text = "".join("\t".join(line) + "\n" for line in lines)
        (folder / f"{part}.tsv").write_text(text, encoding="utf-8")
