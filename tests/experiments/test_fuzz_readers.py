"""A few hundred inputs of the fuzz, and that it notices what it is to notice."""

import time

import pytest

from experiments import fuzz_mutations, fuzz_readers, fuzz_targets
from experiments.fuzz_readers import Config
from experiments.fuzz_targets import TARGETS, Target

QUICK = [name for name in TARGETS if name not in ("EMR task", "Orbax")]


def test_readers_survive(tmp_path):
    config = Config(400, 5, ",".join(QUICK), str(tmp_path), processes=False)
    tallies = fuzz_readers.run(config)
    assert [t.reader for t in tallies] == QUICK
    assert sum(t.tried for t in tallies) >= 400
    for t in tallies:
        assert not t.crashes, t
        # Mutants that are valid get far, invalid ones are told: the fuzz sees both.
        assert t.accepted > 0 or t.reader == "recipe", t
        assert t.refused > 0, t
        assert t.accepted + t.refused == t.tried
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_inputs(tmp_path):
    (folder,) = TARGETS["msgpack"].make(tmp_path)

    def inputs(seed):
        return [fuzz_readers.damaged(folder, seed, "msgpack", i) for i in range(20)]

    assert inputs(1) == inputs(1)
    assert inputs(1) != inputs(2)


def test_mutations_of_trees_come_back_as_they_were():
    content = b'{"a":[1,2.5,"x"],"b":{"c":null,"d":true}}'
    tree = fuzz_mutations.from_json(content)
    assert fuzz_mutations.to_json(tree).encode() == content
    packed = fuzz_mutations.to_msgpack(tree)
    assert fuzz_mutations.from_msgpack(packed) == tree


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: {}["key"], "KeyError: 'key'"),
        (lambda f: (_ for _ in ()).throw(ValueError("no")), "names no file"),
        (lambda f: (_ for _ in ()).throw(ValueError(f"{f.name}\x1b")), "message of"),
        (lambda f: time.sleep(3), "Hang"),
        (lambda f: open("/etc/hostname", "rb").close(), "outside"),
    ],
)
def test_what_is_wrong_is_noticed_and_kept(tmp_path, monkeypatch, read, message):
    def make(home):
        (home / "valid").mkdir()
        (home / "valid" / "x.json").write_text('{"a": 1}')
        return [home / "valid"]

    valid = []  # the first reading is of the valid input

    def first_valid(folder):
        if valid:
            read(folder)
        valid.append(folder)

    monkeypatch.setitem(fuzz_targets.TARGETS, "mine", Target(make, first_valid))
    config = Config(2, 0, "mine", str(tmp_path), seconds=0.2, processes=False)
    (tally,) = fuzz_readers.run(config)
    assert [number for number, _ in tally.crashes] == [0, 1]
    kept = tmp_path / "crashes" / "mine-1"
    assert (kept / "x.json").exists()
    assert message in (kept / "error.txt").read_text()


def test_a_process_that_dies_is_a_crash(tmp_path, monkeypatch):
    """Numbers go on after the input that ended it."""

    class Child:
        exitcode = -9

        def __init__(self, target, args, daemon):
            *_, start, self.stop, self.to = args
            self.start_at = start

        def start(self):
            tally = fuzz_readers.Tally("msgpack")
            self.to.send(tally)
            for number in range(self.start_at, self.stop):
                if number == 3:
                    return
                tally.tried += 1
                tally.refused += 1
                self.to.send(tally)

        def kill(self):
            pass

        def join(self):
            pass

    context = fuzz_readers.multiprocessing.get_context("spawn")
    monkeypatch.setattr(type(context), "Process", Child)
    (tally,) = fuzz_readers.run(Config(6, 0, "msgpack", str(tmp_path)))
    assert (tally.tried, tally.refused) == (6, 5)
    assert tally.crashes == [(3, "the process ended with -9")]


def test_flags():
    with pytest.raises(ValueError, match="--readers: got 'zip', expected safetensors"):
        fuzz_readers.run(Config(readers="zip"))
    with pytest.raises(ValueError, match="--inputs: got 0"):
        fuzz_readers.run(Config(inputs=0))
    with pytest.raises(ValueError, match="--memory"):
        fuzz_readers.run(Config(memory="much"))
    counts = fuzz_readers.count_of(Config(inputs=1000))
    assert sum(counts.values()) >= 1000
    assert counts["Orbax"] < counts["recipe"] < counts["safetensors"]
