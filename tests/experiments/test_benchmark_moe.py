from experiments import benchmark_moe


def test_it_times_every_way(tmp_path):
    found = benchmark_moe.run(
        benchmark_moe.Config(
            tokens=32,
            width=8,
            hidden=8,
            repeats=1,
            ragged=False,
            keep_memory=False,  # the tests' process stays as it is
            output_dir=str(tmp_path),
        )
    )
    assert set(found) == {
        "dense",
        "capacity 1.25",
        "dropless",
        "capacity 1.0625, one by one",
    }
    assert all(ms > 0 for ms in found.values())
    assert "time / dense FFN" in (tmp_path / "report.md").read_text()
