import json

import pytest

from multitask_jax.training import writers


def test_a_resumed_run_takes_back_what_it_trains_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = writers.jsonl(path)
    writer.rewind(0)  # no file yet
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1 / step})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": s, "loss": 1 / s} for s in (10, 20, 30)
    ]
    with path.open("a") as file:
        file.write('{"step": 5')  # killed while writing
    writer.rewind(20)
    assert path.read_text().splitlines() == [
        '{"step": 10, "loss": 0.1}',
        '{"step": 20, "loss": 0.05}',
    ]
    writer.write(25, {"loss": 2.0})
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 25
    writers.jsonl(path).rewind(0)
    assert path.read_text() == ""
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_line_without_an_end_goes_even_if_it_reads_well(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    writers.jsonl(path).rewind(5)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"loss": 1}'])
def test_a_file_of_something_else_is_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="line 1"):
        writers.jsonl(path).rewind(5)
    assert path.read_text().startswith(line)


def test_lines_for_people_and_several_writers(tmp_path):
    lines = []
    path = tmp_path / "metrics.jsonl"
    writer = writers.combine(writers.log(lines.append), writers.jsonl(path))
    writer.write(3, {"loss": 0.123456789, "eval/accuracy": 1.0})
    assert lines == ["step 3: loss 0.123457, eval/accuracy 1"]
    assert json.loads(path.read_text())["loss"] == 0.123456789
    writer.rewind(2)
    assert path.read_text() == ""
