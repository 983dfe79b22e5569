import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from experiments import verify
from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import CheckpointError, TensorInfo, checksums


def params():
    rng = np.random.default_rng(0)
    out = {f"layers/{i}": rng.standard_normal((6, 4)) for i in range(4)}
    out = {k: v.astype(np.float32) for k, v in out.items()}
    half = rng.standard_normal(600_000).astype(ml_dtypes.bfloat16)  # several chunks
    return out | {
        "half": half,
        "step": np.array(2**40 + 1, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def save(path, tensors, **kwargs):
    infos = [TensorInfo(k, v.shape, v.dtype) for k, v in tensors.items()]
    with checkpoints.create(path, infos, **kwargs) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, value.reshape(-1))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    path = save(tmp_path / "a", params(), max_shard_size=100)
    (path / "config.json").write_text("{}")
    checksums.write(path)
    return path


def check(path, against=None, **kwargs):
    against = None if against is None else str(against)
    config = verify.Config(str(path), against, progress=False, **kwargs)
    return verify.run(config)


def test_all_as_it_was(checkpoint, capsys):
    found = check(checkpoint)
    assert found.same
    assert found.checked == 7
    assert "7 tensors and 1 files checked: all as they were" in capsys.readouterr().out


def test_it_is_a_plain_sha256_of_a_tensor(checkpoint):
    import hashlib

    known = checksums.read(checkpoint)["tensors"]["half"]
    data = b"bfloat16 [600000]\n" + params()["half"].tobytes()
    assert known["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_flipped_bit_is_found_and_its_file_named(checkpoint, capsys):
    name = "layers/2"
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    file = checkpoint / weight_map["weight_map"][name]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = check(checkpoint)
    assert found.tensors == [(name, f"differs (in {file.name})")]
    assert f"tensor {name}: differs (in {file.name})" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        verify._script(verify.Config(str(checkpoint), progress=False))
    assert e.value.code == 1


def test_copies_other_shards_and_other_formats_have_the_same(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert check(tmp_path / "copy").same
    one = save(tmp_path / "one", params())
    orbax = save(tmp_path / "orbax", {k: v for k, v in params().items() if v.size})
    for other in (one, orbax):
        found = check(other, checkpoint, files=False)
        assert [n for n, _ in found.tensors] in ([], ["empty"])
    assert check(one, checkpoint).files == [("config.json", "missing")]


def test_everything_that_differs_is_told(checkpoint, tmp_path):
    other = params()
    del other["layers/0"]
    other["layers/1"] = other["layers/1"].T.copy()
    other["layers/2"] = other["layers/2"].astype(np.float64)
    other["half"][-1] += 1
    other["step"] += 1
    other["new"] = np.zeros(2, np.float32)
    save(tmp_path / "b", other)
    (tmp_path / "b" / "config.json").write_text('{"changed": true}')
    found = check(tmp_path / "b", checkpoint, most=2)
    assert dict(found.tensors) == {
        "layers/0": "missing",
        "layers/1": "got float32 [4, 6], expected float32 [6, 4]",
        "layers/2": "got float64 [6, 4], expected float32 [6, 4]",
        "half": "differs (in model.safetensors)",
        "step": "differs (in model.safetensors)",
        "new": "not in the checksums",
    }
    assert found.files == [("config.json", "differs")]


def test_no_checksums_and_damaged_ones(tmp_path):
    path = save(tmp_path / "a", params())
    with pytest.raises(CheckpointError, match=r"no checksums there.*--verify"):
        check(path)
    for text in ("[]", "{", '{"tensors": 3}', '{"tensors": {"a": {}}}'):
        (path / "checksums.json").write_text(text)
        with pytest.raises(CheckpointError):
            check(path)
    outside = {"tensors": {}, "files": {"../secret": "0", "/etc/passwd": "0", "": "0"}}
    found = checksums.compare(path, outside)
    assert {what for _, what in found.files} == {"missing"}
    with pytest.raises(ValueError, match="got no checkpoint"):
        verify.run(verify.Config())


@pytest.mark.parametrize("output_format", ["safetensors", "orbax", "msgpack", "delta"])
@pytest.mark.parametrize("report", [True, False])
def test_a_merge_writes_them(tmp_path, output_format, report):
    base = {k: v for k, v in params().items() if v.size}
    save(tmp_path / "base", base)
    (tmp_path / "base" / "config.json").write_text("{}")
    model = {k: v + v.dtype.type(1) for k, v in base.items()}
    save(tmp_path / "model", model)
    merging.merge_checkpoints(
        merging.task_arithmetic(),
        tmp_path / "base",
        [tmp_path / "model"],
        tmp_path / "out",
        output_format=output_format,
        report_files=report,
        verify=True,
        progress=False,
    )
    file = tmp_path / "out" / ("merge_report.json" if report else "checksums.json")
    assert file.exists()
    assert (tmp_path / "out" / "checksums.json").exists() != report
    found = check(tmp_path / "out")
    assert found.same
    # A delta has no integers.
    assert found.checked == 6 - (output_format == "delta")
    if output_format != "delta":
        assert checksums.read(file)["files"].keys() == {"config.json"}
