"""Checks a merged checkpoint against the checksums that a merge wrote.

    python -m experiments.merge ... --verify --output=OUT   # writes them
    python -m experiments.verify OUT                        # checks them

Prints every tensor that differs, is missing or was added, and files beside the weights
that changed (config.json, tokenizer); exits with 1 if there is any. Checksums are of
tensors, not of files: a copy on another machine, a checkpoint with other shards or one
converted to another format has the same. For such a copy name the checksums:

    python -m experiments.verify COPY --checksums=OUT/merge_report.json --nofiles
"""

import dataclasses
import sys
import threading
from pathlib import Path

from experiments import flags, parsing
from experiments.flags import flag
from multitask_jax.checkpoints import checksums


@dataclasses.dataclass(frozen=True)
class Config:
    """What to check, and against what."""

    checkpoint: str = flag(
        "The checkpoint; its flag may be left out: `verify DIR`.", ""
    )
    checksums: str | None = flag(
        "A merge_report.json or checksums.json, or a directory with one (CHECKPOINT)."
    )
    files: bool = flag("Check config, tokenizer and other files as well.", True)
    most: int = flag("Differences to print.", 50)
    progress: bool = flag("Show a progress bar.", True)
    threads: int = flag("Threads that read.", 2)


def run(config: Config) -> checksums.Comparison:
    """Compares and prints what differs.

    Raises:
      CheckpointError: no checkpoint, or no checksums.
    """
    if not config.checkpoint:
        raise ValueError("got no checkpoint; write `python -m experiments.verify DIR`")
    parsing.at_least(config, threads=1)
    path = Path(config.checkpoint).expanduser()
    expected = checksums.read(config.checksums or path)
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(
        total=checksums.nbytes(path),
        unit="B",
        unit_scale=True,
        desc="reading",
        disable=not config.progress,
    ) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        found = checksums.compare(
            path,
            expected,
            files=config.files,
            advance=advance,
            threads=config.threads,
        )
    lines = [f"tensor {name}: {what}" for name, what in found.tensors]
    lines += [f"file {name}: {what}" for name, what in found.files]
    for line in lines[: config.most]:
        print(line)
    if len(lines) > config.most:
        print(f"... and {len(lines) - config.most} more")
    verdict = "all as they were" if found.same else f"{len(lines)} differences"
    files = f" and {len(expected.get('files', {}))} files" if config.files else ""
    print(f"{path}: {found.checked} tensors{files} checked: {verdict}")
    return found


def _script(config: Config) -> None:
    if not run(config).same:
        sys.exit(1)


if __name__ == "__main__":
    flags.main(Config, flags.plain_errors(_script, "not all was checked"), "checkpoint")
