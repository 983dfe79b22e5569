"""Notebooks ship without outputs, and run from top to bottom."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def test_stored_without_outputs(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("lacks", ["", "multitask_jax", "vizdoom"])
def test_the_game_engine_is_installed_where_it_lacks(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = nbformat.read(ROOT / "colab" / "egom2p.ipynb", as_version=4).cells
    (source,) = (c.source for c in cells if "%pip" in c.source)
    pip = '%pip install --quiet {REPOSITORY} "vizdoom>=1.3"'
    assert pip in source
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == lacks else name
    )
    found: dict[str, object] = {}
    exec(source.replace(pip, "asked = True"), found)
    assert found.get("asked", False) == bool(lacks)


def test_runs(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel is a process of its own: the checkout must be on its path even where
    # the package is not installed, so that the notebook skips its pip cell.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # As in tests, whose compiled programs then serve the notebooks too.
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    # In a fresh folder, so that it can't lean on files of the checkout.
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    # A notebook without code would pass without running anything.
    assert any(c.cell_type == "code" and c.execution_count for c in notebook.cells)
