"""A short report: printed, and kept in a folder."""

import os
from pathlib import Path


def write(output_dir: str | os.PathLike[str], title: str, text: str) -> Path:
    """Prints the text and writes it to report.md under a title; returns the folder."""
    print(text)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(f"# {title}\n\n{text}")
    return folder
