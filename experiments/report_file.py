"""A short report: printed, and kept in a folder."""

import os
from pathlib import Path

import numpy as np


def over_seeds(values: np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds [S]; of a single seed, its value alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def write(output_dir: str | os.PathLike[str], title: str, text: str) -> Path:
    """Prints the text and writes it to report.md under a title; returns the folder."""
    print(text)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(f"# {title}\n\n{text}")
    return folder
