"""A merge that processes share: the same bytes, here with threads for processes."""

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import CheckpointError, TensorInfo
from multitask_jax.merging import execution, plan, shares
from multitask_jax.merging.processes import ALONE, Group
from multitask_jax.merging.selection import Bracket, Selection, keys_of
from multitask_jax.merging.totals import SumTotal
from tests.merging.common import make_models, save


class Memory:
    """A key-value store for threads that stand for processes."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout=60)
            return self.values[key]

    def delete(self, key):
        with self.changed:
            for k in [k for k in self.values if k == key or k.startswith(f"{key}/")]:
                del self.values[k]


def together(count, work):
    """[work(group of process 0), ...], all at once."""
    store = Memory()
    groups = [Group(i, count, store) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work, group) for group in groups]
        return [f.result() for f in futures]


def digests(folder: Path) -> dict[str, str]:
    """Files by hash; what a report says of seconds left out."""
    out = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        if file.name == "merge_report.json":
            data = repr(json.loads(data) | {"seconds": 0}).encode()
        if file.name == "merge_report.md":
            data = data.rpartition(b" written in")[0]
        out[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return out


# -- exchange --------------------------------------------------------------------------


def test_combine_gives_everyone_what_process_0_made_of_all_values():
    def work(group):
        first = group.combine([group.index, 0.1], lambda rows: rows[::-1])
        second = group.add([group.index, 2**60])
        long = group.combine("x" * (3 << 20), lambda values: "".join(values))
        return first, second, len(long)

    expected = ([[2, 0.1], [1, 0.1], [0, 0.1]], [3, 3 * 2**60], 9 << 20)
    assert together(3, work) == [expected] * 3
    assert ALONE.add([1, 2]) == [1, 2]


def test_nothing_of_earlier_exchanges_is_kept():
    store = Memory()

    def work(group):
        for _ in range(5):
            group.barrier()

    with ThreadPoolExecutor(2) as pool:
        [f.result() for f in [pool.submit(work, Group(i, 2, store)) for i in (0, 1)]]
    assert len(store.values) == 1


def test_disagreement_names_the_process():
    def work(group):
        with pytest.raises(ValueError, match=r"processes 1 got other flags than proc"):
            group.agree("flags", {"scale": 1.0 if group.index != 1 else 2.0})
        group.agree("flags", "same")

    together(3, work)


# -- shares ----------------------------------------------------------------------------


def plan_of(tmp_path, base, models):
    readers = [checkpoints.open(save(tmp_path / "b", base))]
    readers += [checkpoints.open(save(tmp_path / f"{i}", m)) for i, m in models]
    return plan.plan_merge(merging.ties(), readers[0], readers[1:])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shares_are_runs_that_cover_all_tensors_evenly(tmp_path, count):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 400, 20)
    base = {f"t{i:02d}": np.ones(n, np.float32) for i, n in enumerate(sizes)}
    whole = plan_of(tmp_path, base, [(0, base), (1, base)])
    outputs = whole.outputs
    names = [t.name for t in outputs]
    parts = [shares.split([whole], outputs, Group(i, count)) for i in range(count)]
    assert [n for part in parts for n in names if n in part] == names
    size = {t.name: t.nbytes for t in outputs}
    loads = [sum(size[n] for n in part) for part in parts]
    assert max(loads) <= sum(loads) / count + max(size.values())


# -- statistics ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [64, 1 << 22])
@pytest.mark.parametrize("start", [None, Bracket(0, 10, 5), "sample"])
def test_selection_over_processes_is_exact(monkeypatch, limit, start):
    """With brackets that fit, miss, or were narrowed by each process on its own."""
    monkeypatch.setattr("multitask_jax.merging.selection._LIMIT", limit)
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal(n).astype(np.float32) for n in (3000, 0, 500)]
    parts[0][::3] = np.float32(0.5)  # many are equal
    every = np.sort(keys_of(np.concatenate(parts)))[::-1]
    middle = int(every[900])
    if start == "sample":
        start = Bracket(middle - (1 << 22), middle + (1 << 22), middle)

    def work(group):
        found = []
        for k in (1, 900, 1300, 3500):
            selection = Selection(k, start)
            for _ in range(5):
                keys = keys_of(parts[group.index])
                for chunk in np.array_split(keys, 9):
                    selection.add(chunk)
                if (key := selection.result(group)) is not None:
                    break
            found.append(key)
        return found

    expected = [int(every[k - 1]) for k in (1, 900, 1300, 3500)]
    assert together(3, work) == [expected] * 3


def test_sums_do_not_depend_on_processes_or_order():
    rng = np.random.default_rng(0)
    terms = (rng.standard_normal(9000) * 10.0 ** rng.integers(-12, 12, 9000)).tolist()

    def work(group):
        total = SumTotal(lambda x: (x, -x), "sum", np.dtype(np.float64))
        mine = terms[group.index :: group.count]
        for x in mine[::-1] if group.index else mine:
            total.add(x)
        return total.result(group)

    (alone,) = together(1, work)
    assert together(3, work) == [alone] * 3
    naive = sum(terms)
    assert alone[0] != naive or sum(terms[::-1]) != naive  # order matters to others


# -- merges ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    base, models = make_models(3, rows=2200)  # more than 2**20 entries: brackets
    for i, x in enumerate([base, *models]):
        x["steps"] = np.array([i, 2**40 + 1], np.int64)
    save(folder / "base", base)
    for i, m in enumerate(models):
        save(folder / f"m{i}", m)
    (folder / "base" / "config.json").write_text("{}")
    return folder


METHODS = {
    "ties": merging.ties(density=0.2),
    "lines norm": merging.with_lines(merging.task_arithmetic(), alpha="norm", beta=0.5),
    "per tensor, random": merging.dare(density=0.5, seed=3, rescale="l1"),
}


def merge(folder, output, method, group=ALONE, **kwargs):
    return merging.merge_checkpoints(
        method,
        folder / "base",
        [folder / f"m{i}" for i in range(3)],
        output,
        progress=False,
        group=group,
        **kwargs,
    )


@pytest.fixture
def compile_once(monkeypatch):
    """Threads that stand for processes use one program, which each would compile."""
    original, streams = execution.Stream, []

    def stream(*args, **kwargs):
        programs = streams[0].programs if streams else None
        streams.append(original(*args, **kwargs | {"programs": programs}))
        return streams[-1]

    monkeypatch.setattr(execution, "Stream", stream)


@pytest.mark.usefixtures("compile_once", "figures")
@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_are_those_of_one_process(inputs, tmp_path, name):
    kwargs = {"max_shard_size": 1 << 20, "recipe": {"method": name}}
    kwargs["report_files"] = name != "lines norm"
    alone = merge(inputs, tmp_path / "1", METHODS[name], **kwargs)
    # 14 are more than there are tensors with entries.
    counts = {"ties": (2, 4), "lines norm": (3,), "per tensor, random": (14,)}[name]
    for count in counts:
        results = together(
            count,
            lambda g: merge(
                inputs, tmp_path / f"{g.count}", METHODS[name], g, **kwargs
            ),
        )
        assert digests(tmp_path / f"{count}") == digests(tmp_path / "1")
        assert len(digests(tmp_path / "1")) > (8 if kwargs["report_files"] else 4)
        for r in results:
            assert any("steps (int64) differs in" in note for note in r.notes)
            assert sorted(r.notes) == sorted(alone.notes)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_formats_of_one_process_are_refused(inputs, tmp_path):
    def work(group):
        with pytest.raises(ValueError, match="got orbax, which one process writes"):
            merge(inputs, tmp_path / "o", METHODS["ties"], group, output_format="orbax")

    together(2, work)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_shared_is_told(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "_VISIBLE", 0.1)
    info = [TensorInfo("a", (4,), np.dtype(np.float32))]

    def work(group):
        path = tmp_path / f"host{group.index}" / "out"
        mine = frozenset("a") if group.index == 0 else frozenset()
        if group.index == 0:
            return group.combine("name", lambda names: names[0])
        with (
            pytest.raises(CheckpointError, match="process 1 does not see what process"),
            shares.create(group, path, info, mine, {}),
        ):
            pass

    together(2, work)


# -- what killed processes left --------------------------------------------------------


def test_staging_of_another_host_is_removed_when_it_is_quiet(tmp_path, monkeypatch):
    info = [TensorInfo("a", (4,), np.dtype(np.float32))]

    def write():
        with checkpoints.create(tmp_path / "out", info, overwrite=True) as writer:
            writer.write("a", 0, np.ones(4, np.float32))

    left = tmp_path / f".out.partial-0-elsewhere-{os.getpid()}"
    left.mkdir()
    write()
    assert left.exists()  # perhaps in use
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    write()
    assert not left.exists()


def test_several_processes_keep_no_journal(inputs, tmp_path):
    def work(group):
        with pytest.raises(ValueError, match="resume: got 2 processes; one process"):
            merge(inputs, tmp_path / "o", METHODS["ties"], group, resume=True)

    together(2, work)
    assert list(tmp_path.iterdir()) == []
