"""The e-mail experiment as a tensorflow-datasets builder, without TensorFlow.

    table = read(builder("hillstrom.csv"))   # records made from a local file
    table = read(builder())                  # downloads it, so it needs the internet

Records are array_record files, read with random access; they hold the file's values,
numbers with the digits of a float32, a missing one as NaN.
"""

import dataclasses
import hashlib
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from multitask_jax.data import hillstrom, records
from multitask_jax.data.hillstrom import SCHEMA
from multitask_jax.data.trial_table import Table

URL = (
    "http://www.minethatdata.com/Kevin_Hillstrom_MineThatData_E-MailAnalytics"
    "_DataMiningChallenge_2008.03.20.csv"
)


@dataclasses.dataclass(eq=False, kw_only=True)
class FileConfig(tfds.core.BuilderConfig):
    """A local file, or the public one if it is None."""

    path: str | None


class Hillstrom(tfds.core.GeneratorBasedBuilder):
    """One record a person, in the order of the file."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        number = tfds.features.Scalar(np.float32)  # a record holds no other floats
        kinds = {
            name: text if kind == "category" else number
            for name, kind in SCHEMA.features.items()
        }
        kinds[SCHEMA.arm] = tfds.features.ClassLabel(names=SCHEMA.arms)
        kinds |= dict.fromkeys(SCHEMA.outcomes, number)
        return tfds.core.DatasetInfo(
            builder=self,
            description="MineThatData e-mail experiment (Hillstrom 2008).",
            homepage="https://blog.minethatdata.com",
            features=tfds.features.FeaturesDict(kinds),
            disable_shuffling=True,  # rows as they are in the file
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        path = self.builder_config.path or dl_manager.download(URL)
        return {"train": self._generate_examples(hillstrom.read(path))}

    def _generate_examples(self, table: Table) -> Iterator[tuple[int, dict[str, Any]]]:
        columns = {
            **{name: x.tolist() for name, x in table.columns.items()},
            SCHEMA.arm: table.arm.tolist(),
            **dict(zip(SCHEMA.outcomes, table.y.T.tolist(), strict=True)),
        }
        for i, row in enumerate(zip(*columns.values(), strict=True)):
            yield i, dict(zip(columns, row, strict=True))


def builder(
    path: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Hillstrom:
    """Makes the records, unless they are there already.

    Args:
      path: a file as `hillstrom.read` takes it; the public one, downloaded, if not
        given. Other contents make other records.
      data_dir: where records go; tensorflow-datasets' own place if not given.

    Raises:
      FileNotFoundError, ValueError: as `hillstrom.read`.
      OSError: the public file can't be downloaded.
    """
    if path is None:
        config = FileConfig(name="public", path=None)
    else:
        path = Path(path).resolve()
        hillstrom.read(path)  # its errors first, before anything is written
        contents = hashlib.sha256(path.read_bytes()).hexdigest()
        config = FileConfig(name=f"file-{contents[:12]}", path=str(path))
    made = Hillstrom(
        config=config,
        file_format=records.FORMAT,
        data_dir=None if data_dir is None else os.fspath(data_dir),
    )
    try:
        if path is None and not made.is_prepared():
            # Fails at once, where tensorflow-datasets would try for minutes.
            urllib.request.urlopen(URL, timeout=30).close()
        made.download_and_prepare()
    except (OSError, tfds.download.DownloadError) as e:
        if path is not None:
            raise
        raise OSError(
            f"{URL} can't be downloaded ({type(e).__name__}: {e}); it needs the"
            " internet once. Or download it elsewhere and give its path"
        ) from e
    return made


def read(made: Hillstrom) -> Table:
    """The table that a builder's records hold; numbers with a float32's digits."""
    source = made.as_data_source("train")
    people = [source[i] for i in range(len(source))]
    columns = {
        name: np.array([records.plain(p[name]) for p in people])
        for name in (*SCHEMA.features, SCHEMA.arm, *SCHEMA.outcomes)
    }
    y = np.stack([columns.pop(name) for name in SCHEMA.outcomes], axis=1)
    arm = columns.pop(SCHEMA.arm).astype(np.int32)
    for name, kind in SCHEMA.features.items():
        if kind != "category":
            columns[name] = columns[name].astype(np.float64)
    return Table(columns, arm, y.astype(np.float32))
