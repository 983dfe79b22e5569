import pytest

from experiments import merge_cost
from experiments.merge_cost import GB, MACHINES, WORK, Machine, cost

TWO_CORES = Machine(1, 1, 2, 3 * GB, 3 * GB, 3 * GB, 3 * GB, 24 * GB)


@pytest.mark.parametrize(
    ("name", "measured"), [("ties", 7.4), ("task_arithmetic", 4.0)]
)
def test_the_formula_gives_what_was_measured(name, measured):
    """README's table of 502 M parameters, which also gave the rates."""
    assert cost(WORK[name], TWO_CORES, 502e6).seconds == pytest.approx(
        measured, rel=0.1
    )


def test_bytes_and_bounds():
    ties, laptop = WORK["ties"], MACHINES["laptop, NVMe"]
    small, large = (cost(ties, laptop, p) for p in (1e9, 70e9))
    assert ties.passes == 3
    assert small.read == 4 * 2e9  # in the page cache after the first pass
    assert large.read == 3 * 4 * 140e9
    assert large.storage == pytest.approx((3 * 560 + 140) / 3)
    assert large.seconds == pytest.approx(large.storage + merge_cost.START_UP)
    wide = cost(ties, laptop, 70e9, out_bytes=4)
    assert wide.seconds - large.seconds == pytest.approx(140 / 3)


def test_more_hosts_help_until_the_file_system_is_full():
    pod = MACHINES["v5e-256, 64 hosts"]
    times = [
        cost(WORK["ties"], pod._replace(hosts=n), 405e9).seconds
        for n in (1, 8, 64, 512)
    ]
    assert times[0] > 7 * times[1] > 7 * times[2]
    # The file system gives no more, and process 0 has more messages to answer.
    assert times[3] > 0.5 * times[2]


def test_table(capsys):
    text = merge_cost.run(merge_cost.Config())
    assert text in capsys.readouterr().out
    assert text.startswith("*Formulae, not measurements*")
    assert text.count("| 405 B |") == 6
    with pytest.raises(ValueError, match="--models: got 0, expected at least 1"):
        merge_cost.run(merge_cost.Config(models=0))
