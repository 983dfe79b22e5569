"""A short report: printed, and kept in a folder."""

import os
from pathlib import Path

import numpy as np


def over_seeds(values: np.ndarray, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds [S]; of a single seed, its value alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def between_seeds(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of Student's 95% interval of paired differences [S, ...], each of one seed.

    Of a single seed they are infinite: it tells nothing about another.
    """
    n, mean = len(difference), difference.mean(axis=0)
    if n == 1:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    from scipy.stats import t as student  # takes a second, which others need not wait

    half = student.ppf(0.975, n - 1) * difference.std(axis=0, ddof=1) / n**0.5
    return mean - half, mean + half


def write(output_dir: str | os.PathLike[str], title: str, text: str) -> Path:
    """Prints the text and writes it to report.md under a title; returns the folder."""
    print(text)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(f"# {title}\n\n{text}")
    return folder
