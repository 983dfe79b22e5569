"""What `fuzz_readers` damages: valid files of each kind, and how each is read whole."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from multitask_jax import checkpoints, merging
from multitask_jax.checkpoints import Reader, TensorInfo
from multitask_jax.merging.emr_files import TaskFile, TaskReader
from multitask_jax.merging.mergekit import companions, vocabularies
from multitask_jax.merging.task_statistics import StatisticsFile


class Target(NamedTuple):
    """A kind of input.

    `make(home)` writes valid inputs, a folder each, below a folder; `read(folder)`
    opens one and reads everything in it.
    """

    make: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], None]
    cost: int = 1  # a target of cost c gets 1 / c of the inputs of a cheap one


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(path: Path, arrays: Mapping[str, np.ndarray], **options: Any) -> Path:
    """A checkpoint of these arrays."""
    infos = [TensorInfo(k, v.shape, v.dtype) for k, v in arrays.items()]
    with checkpoints.create(path, infos, **options) as writer:
        for name, x in arrays.items():
            writer.write(name, 0, x.reshape(-1))
    return path


def read_all(reader: Reader) -> None:
    """Every tensor whole, and a part of it, as large as promised."""
    with np.errstate(all="ignore"):  # what the numbers are is not the reader's matter
        for name, info in [*reader.tensors.items()]:
            whole = reader.read(name)
            start, stop = info.size // 3, info.size // 2 + (info.size > 0)
            part = reader.read(name, start, stop)
            assert whole.shape == (info.size,), (name, whole.shape, info)
            assert part.shape == (stop - start,), (name, part.shape, info)
            assert whole.dtype == part.dtype == info.dtype, (name, whole.dtype, info)
            whole.reshape(info.shape)
        for alias in reader.aliases:
            reader.read(alias)
    reader.close()


_MODEL = {
    "model.embed.weight": numbers(6, 4, seed=1),
    "model.layers.0.q.weight": numbers(4, 4, seed=2),
    "model.layers.0.q.bias": numbers(4, seed=3),
    "model.layers.1.q.weight": numbers(4, 4, seed=4),
    "model.layers.1.q.bias": numbers(4, seed=5),
    "model.conv.weight": numbers(3, 2, 2, seed=6),
    "lm_head.weight": numbers(6, 4, seed=1),
    "model.empty": numbers(0, 4),
    "model.steps": np.arange(3),
}
_CONFIG = {"vocab_size": 6, "num_hidden_layers": 2, "tie_word_embeddings": True}


def _base(folder: Path) -> Reader:
    return checkpoints.open(folder.parent / "base")


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


# -- safetensors -----------------------------------------------------------------------


def _safetensors(home: Path) -> list[Path]:
    import ml_dtypes

    mixed = {
        "matrix": numbers(3, 4),
        "half": numbers(4).astype(np.float16),
        "brain": numbers(2, 3).astype(ml_dtypes.bfloat16),
        "scalar": np.float64(2.5),
        "empty": numbers(0, 7),
        "flag": np.array([True, False, True]),
        "long": np.array([2**40 + 1, -5]),
    }
    mixed = {k: np.asarray(v) for k, v in mixed.items()}
    return [write(home / "mixed", mixed), write(home / "model", _MODEL)]


def _indexed(home: Path) -> list[Path]:
    write(home / "outside", _MODEL)  # what no index may reach
    (home / "outside" / "model.safetensors").rename(home / "outside.safetensors")
    folder = write(home / "sharded", _MODEL, max_shard_size=150)
    _json(folder / "config.json", _CONFIG)
    return [folder]


# -- changes of a base -----------------------------------------------------------------


def _lora(home: Path) -> list[Path]:
    write(home / "base", _MODEL)
    q, prefix = "model.layers.{}.q", "base_model.model."
    plain = {
        f"{prefix}{q.format(0)}.lora_A.weight": numbers(2, 4),
        f"{prefix}{q.format(0)}.lora_B.weight": numbers(4, 2),
        f"{prefix}{q.format(0)}.lora_B.bias": numbers(4),
        f"{prefix}{q.format(1)}.lora_A.weight": numbers(3, 4),
        f"{prefix}{q.format(1)}.lora_B.weight": numbers(4, 3),
    }
    wide = {
        f"{prefix}model.embed.lora_embedding_A": numbers(2, 6),
        f"{prefix}model.embed.lora_embedding_B": numbers(4, 2),
        f"{prefix}model.conv.lora_A.weight": numbers(2, 2, 2),
        f"{prefix}model.conv.lora_B.weight": numbers(3, 2, 1),
        f"{prefix}{q.format(1)}.bias": numbers(4),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    settings = [
        config
        | {"rank_pattern": {r".*layers\.1\.(q|k)": 3}, "target_modules": ["q"]}
        | {"alpha_pattern": {"layers.0.q": 1.5}, "use_rslora": True},
        config | {"target_modules": "all-linear", "fan_in_fan_out": False},
    ]
    folders = []
    for i, (tensors, setting) in enumerate(zip((plain, wide), settings, strict=True)):
        folder = write(home / f"adapter{i}", tensors, stem="adapter_model")
        _json(folder / "adapter_config.json", setting)
        folders.append(folder)
    return folders


def _delta(home: Path) -> list[Path]:
    base = {"a": numbers(70_000), "b": numbers(5, 8), "c": np.arange(4), "d": numbers()}
    write(home / "base", {k: np.asarray(v) for k, v in base.items()})
    reader = checkpoints.open(home / "base")
    tau = {"a": np.zeros(70_000, np.float32), "b": numbers(5, 8, seed=1)}
    tau["a"][::5000] = 1
    return [write(home / "delta", tau, format="delta", base=reader)]


def _emr(home: Path) -> list[Path]:
    floats = {k: v for k, v in _MODEL.items() if v.dtype == np.float32}
    base = write(home / "base", floats)
    models = []
    for t in (7, 8):
        tuned = {k: v + numbers(*v.shape, seed=t) for k, v in floats.items()}
        models.append(write(home / f"m{t}", tuned))
    merging.merge_checkpoints(
        merging.METHODS["emr"](), base, models, home / "merged", progress=False
    )
    folder = home / "task"
    folder.mkdir()
    task = next((home / "merged" / "tasks").iterdir())
    (folder / "task.safetensors").write_bytes(task.read_bytes())
    return [folder]


def _read_task(folder: Path) -> None:
    task = TaskFile(folder / "task.safetensors")
    merged = checkpoints.open(folder.parent / "merged")
    read_all(TaskReader(_base(folder), merged, task))


def _statistics(home: Path) -> list[Path]:
    fisher = {k: v**2 for k, v in _MODEL.items() if v.dtype == np.float32}
    gram = {
        f"model.layers.{i}.q.weight": merging.Gram(np.eye(4, dtype=np.float32), (1,))
        for i in range(2)
    }
    for kind, x in (("fisher", fisher), ("gram", gram)):
        merging.save_statistics(home / kind / "s.safetensors", x, examples=3)
    return [home / "fisher", home / "gram"]


def _read_statistics(folder: Path) -> None:
    file = StatisticsFile(folder / "s.safetensors")
    for name, spec in file.specs.items():
        size = file.nbytes(name) // 4
        with np.errstate(all="ignore"):
            file.read(name, 0, size, lambda x, s=spec: x)
    file.close()


# -- msgpack, Orbax --------------------------------------------------------------------


def _msgpack(home: Path) -> list[Path]:
    def array(x: np.ndarray, code: int = 1) -> msgpack.ExtType:
        triple = (x.shape, x.dtype.name, x.tobytes())
        return msgpack.ExtType(code, msgpack.packb(triple))

    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": array(numbers(4)), "1": array(numbers(2))},
    }
    tree = {
        "params": {"dense": {"kernel": array(numbers(3, 2)), "bias": chunked}},
        "step": 7,
        "scales": [1.5, True, array(np.asarray(np.float16(2)), 3)],
        "empty": array(numbers(0, 3)),
    }
    folder = home / "flax"
    folder.mkdir()
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    return [folder]


def _orbax(home: Path) -> list[Path]:
    named = {"params/a/w": numbers(3, 4), "params/b": np.arange(5), "s": numbers(1)}
    return [write(home / "orbax", named, format="orbax")]


# -- recipes and tokenizers ------------------------------------------------------------

_RECIPES = (
    """merge_method: ties
base_model: ../base
models:
- model: ../a
  parameters:
    weight: [0, 0.5, 1]
    density: [{filter: q, value: 0.3}, {value: 1.0}]
- model: ../b
  parameters: {weight: 1}
parameters: {normalize: true, int8_mask: true}
dtype: float32
tokenizer_source: base
""",
    """merge_method: slerp
base_model: ../a
slices:
- sources:
  - {model: ../a, layer_range: [0, 1]}
  - {model: ../b, layer_range: [0, 1]}
- sources:
  - {model: ../a, layer_range: [1, 2]}
  - {model: ../b, layer_range: [1, 2]}
parameters:
  t: 0.5
out_dtype: bfloat16
""",
    """merge_method: passthrough
slices:
- sources: [{model: ../a, layer_range: [0, 2]}]
- sources: [{model: ../b, layer_range: [1, 2], parameters: {scale: 0.5}}]
tokenizer: {source: union, pad_to_multiple_of: 8}
""",
)


def _recipe(home: Path) -> list[Path]:
    for name in ("base", "a", "b"):
        folder = write(home / name, _MODEL)
        _json(folder / "config.json", _CONFIG | {"tie_word_embeddings": False})
        _json(folder / "vocab.json", {"a": 0, "b": 1, name: 2})
    folders = []
    for i, text in enumerate(_RECIPES):
        folders.append(home / f"recipe{i}")
        folders[-1].mkdir()
        (folders[-1] / "recipe.yaml").write_text(text)
    return folders


def _read_recipe(folder: Path) -> None:
    merging.merge_mergekit(folder / "recipe.yaml", "", dry_run=True, progress=False)


def _tokenizer(home: Path) -> list[Path]:
    fast, slow, words = (home / n for n in ("fast", "slow", "words"))
    for folder in (fast, slow, words):
        folder.mkdir()
        _json(folder / "config.json", _CONFIG)
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
    }
    _json(fast / "tokenizer.json", content)
    _json(slow / "vocab.json", {"a": 0, "b": 1, "c": 2})
    _json(slow / "added_tokens.json", {"<pad>": 3})
    (words / "vocab.txt").write_text("[PAD]\na\nb\n")
    return [fast, slow, words]


def _read_tokenizer(folder: Path) -> None:
    config = companions.read_config(folder)
    companions.vocabulary_size(config)
    companions.ties_embeddings(config)
    vocabulary = vocabularies.read_vocabulary(folder, 6)
    if vocabulary is not None:
        both = vocabularies.union(vocabulary, [vocabulary])
        assert both.size == vocabulary.size


TARGETS: dict[str, Target] = {
    "safetensors": Target(
        _safetensors, lambda f: read_all(checkpoints.open(f / "model.safetensors"))
    ),
    "index": Target(_indexed, lambda f: read_all(checkpoints.open(f))),
    "LoRA": Target(_lora, lambda f: read_all(checkpoints.open(f, _base(f)))),
    "delta": Target(_delta, lambda f: read_all(checkpoints.open(f, _base(f)))),
    "EMR task": Target(_emr, _read_task, cost=2),
    "statistics": Target(_statistics, _read_statistics),
    "msgpack": Target(_msgpack, lambda f: read_all(checkpoints.open(f))),
    "recipe": Target(_recipe, _read_recipe, cost=4),
    "tokenizer": Target(_tokenizer, _read_tokenizer, cost=2),
    "Orbax": Target(_orbax, lambda f: read_all(checkpoints.open(f)), cost=20),
}
