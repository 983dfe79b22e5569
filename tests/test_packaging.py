"""What holds for the repository as a whole: imports, documents, sizes, pins."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from multitask_jax.merging import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
CODE = ("multitask_jax", "experiments", "tests")


def source_files(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_name(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name
    return name[0].lower().replace("_", "-")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("multitask_jax", ("jax", "numpy")),
        ("multitask_jax.tree", ("flax", "orbax", "matplotlib", "tensorflow")),
        (
            "multitask_jax.merging",
            ("flax", "optax", "orbax", "matplotlib", "sklearn", "tensorflow"),
        ),
        (
            "multitask_jax.checkpoints",
            ("flax", "orbax", "matplotlib", "sklearn", "tensorflow", "torch"),
        ),
        (
            "multitask_jax.training",
            ("flax", "orbax", "tensorstore", "matplotlib", "sklearn", "tensorflow"),
        ),
    ],
)
def test_import_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    loaded = out.stdout.split()
    assert module in loaded
    assert not set(unwanted) & set(loaded)


@pytest.mark.parametrize("name", METHODS)
def test_recipe_documents_itself(name: str) -> None:
    recipe = METHODS[name]
    first, _, rest = (recipe.__doc__ or "").partition("\n")
    assert re.fullmatch(r"\S.*\.", first), "the first line is the method's --help"
    assert not rest.strip() or rest.startswith("\n")
    for p in inspect.signature(recipe).parameters.values():
        assert p.kind is p.KEYWORD_ONLY, f"{p.name} is a flag: keyword-only"
        assert p.default is not p.empty, f"{p.name} needs a default"


@pytest.mark.parametrize("folder", CODE)
def test_files_stay_short(folder: str) -> None:
    files = source_files(folder)
    assert files
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().split("\n")) for p in files}
    assert {p: n for p, n in lengths.items() if n > 501} == {}


def test_third_party_imports_are_declared() -> None:
    """Every import of the packages belongs to a distribution that pip installs."""
    extras = project()["project"]["optional-dependencies"]
    required = [*project()["project"]["dependencies"]]
    required += [r for name, rs in extras.items() if name != "test" for r in rs]
    declared = {requirement_name(r) for r in required}
    ours = {"multitask_jax", "experiments"}
    owners = importlib.metadata.packages_distributions()
    undeclared = {}
    for path in source_files("multitask_jax", "experiments"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}"]
            else:
                continue
            for root in {n.partition(".")[0] for n in names} - ours:
                if root in sys.stdlib_module_names:
                    continue
                dists = {d.lower().replace("_", "-") for d in owners.get(root, [root])}
                if not dists & declared:
                    undeclared[root] = str(path.relative_to(ROOT))
    assert undeclared == {}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, re.MULTILINE))
    # Only what is set as code: "make sure" in a sentence is no command.
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))
    used = set(re.findall(r"\bmake ([a-z]+)\b", code))
    assert used, f"{document} shows no make command"
    assert used <= targets
    for module in re.findall(r"python -m (experiments[\w.]+)", code):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for flagfile in re.findall(r"--flagfile[= ](experiments/[\w./-]+)", code):
        assert (ROOT / flagfile).is_file(), flagfile


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_documents_exist(document: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / document).read_text())
    local = [x for x in links if not re.match(r"[a-z]+:", x)]
    assert local
    assert [x for x in local if not (ROOT / x).exists()] == []


def test_programs_of_makefile_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    modules = re.findall(r"-m (experiments\.\w+)", makefile)
    flagfiles = re.findall(r"--flagfile=(\S+)", makefile)
    assert modules
    assert flagfiles
    paths = [ROOT / f"{m.replace('.', '/')}.py" for m in modules]
    paths += [ROOT / f for f in flagfiles]
    assert [str(p) for p in paths if not p.is_file()] == []


def test_ruff_is_pinned_once() -> None:
    extras = project()["project"]["optional-dependencies"]["test"]
    (pin,) = [r.partition("==")[2] for r in extras if r.startswith("ruff")]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{pin} " in hooks
