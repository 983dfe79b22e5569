"""Time and memory of merging a 502 M parameter Llama layout, against mergekit.

    make benchmark                                      # about half an hour
    python -m experiments.benchmark_merge --nomergekit  # without mergekit
    python -m experiments.benchmark_merge --only=dare,della --repeats=1
    python -m experiments.benchmark_merge --only=svd --layers=1 --nomergekit

For every method the report is on (the default) and off (--noreport); mergekit computes
in float32 and stores bfloat16, as we do. Makes a *synthetic* base and three fine-tunes
in bfloat16 (4.0 GB; the time of a merge depends on sizes, not on what the weights
mean), then runs in turn, as whole processes: the floor (read every input byte, write
the output's bytes), our command line, and `mergekit-yaml` of mergekit 0.1.5 on CPU
torch from an environment of its own. Memory is RssAnon, sampled (mapped input files do
not count).
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from experiments import flags
from experiments.flags import flag
from multitask_jax import checkpoints
from multitask_jax.checkpoints import TensorInfo

_MERGEKIT = ("torch==2.13.0", "mergekit==0.1.5")
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"


FLOOR = "floor: read inputs, write output"


class Row(NamedTuple):
    """A method on either side; the same mathematics, as the golden files check."""

    ours: tuple[str, ...]  # flags
    theirs: str  # merge_method
    parameters: str = ""  # of theirs, in YAML
    models: int = 3
    base: bool = True


ROWS = {
    "ties over the model": Row(("--method=ties",), "ties", "density: 0.2"),
    "ties per tensor": Row(
        ("--method=ties", "--trim_scope=tensor"), "ties", "density: 0.2"
    ),
    "task_arithmetic": Row(("--method=task_arithmetic",), "task_arithmetic"),
    "breadcrumbs": Row(
        ("--method=breadcrumbs", "--density=0.9", "--gamma=0.01"),
        "breadcrumbs",
        "density: 0.9, gamma: 0.01",
    ),
    "della": Row(
        (
            *("--method=della_ties", "--density=0.5", "--epsilon=0.15"),
            *("--rescale=l1", "--election=weighted_mass", "--zero_sign=positive"),
        ),
        "della",
        "density: 0.5, epsilon: 0.15",
    ),
    "dare": Row(
        ("--method=dare", "--density=0.5", "--rescale=l1"),
        "dare_linear",
        "density: 0.5",
    ),
    "sce": Row(("--method=sce", "--topk=0.5"), "sce", "select_topk: 0.5"),
    "slerp": Row(("--method=slerp", "--t=0.5"), "slerp", "t: 0.5", 2, False),
    "nuslerp": Row(("--method=nuslerp",), "nuslerp", models=2),
    "karcher": Row(("--method=karcher",), "karcher", base=False),
    "model_stock": Row(("--method=model_stock",), "model_stock"),
}
# Ours alone: whole matrices, one after another (`--only=svd` runs these; try 1 layer,
# the time a parameter is what counts).
SVD = ("iso_c", "iso_cts", "tsv_m", "knots", "wudi")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and repeats."""

    workdir: str = flag("Folder for models and results.", ".cache/benchmark_merge")
    layers: int = flag("Blocks; 34 give 502 M parameters, 148 about 4 times that.", 34)
    width: int = flag("Width.", 1024)
    vocabulary: int = flag("Rows of the embedding.", 32000)
    repeats: int = flag("Runs of ours and of the floor; the median counts.", 3)
    mergekit_repeats: int = flag("Runs of mergekit.", 1)
    mergekit: bool = flag("Run mergekit as well (installs it on first use).", True)
    mergekit_venv: str = flag("Its environment; made under --workdir if empty.", "")
    only: str = flag("Run only these of ours, comma-separated names.", "")


def llama_layout(config: Config) -> list[TensorInfo]:
    """Names and shapes of a Llama with untied head."""
    d, f, v = config.width, config.width * 11 // 4, config.vocabulary
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for i in range(config.layers):
        block = f"model.layers.{i}"
        for name in "qkvo":
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (d, d)
        shapes[f"{block}.mlp.gate_proj.weight"] = (f, d)
        shapes[f"{block}.mlp.up_proj.weight"] = (f, d)
        shapes[f"{block}.mlp.down_proj.weight"] = (d, f)
        shapes[f"{block}.input_layernorm.weight"] = (d,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (d,)
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (v, d)}
    return [TensorInfo(name, shape, bfloat16) for name, shape in shapes.items()]


def make_models(config: Config, folder: Path) -> list[Path]:
    """Base and three fine-tunes: N(0, .02) and, on top, N(0, .001), in bfloat16."""
    names = ["base", "ft1", "ft2", "ft3"]
    layout = llama_layout(config)
    size = sum(t.size for t in layout)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": config.width * 11 // 4,
        "num_attention_heads": config.width // 64,
        "num_key_value_heads": config.width // 64,
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    paths = [folder / f"models-{size}" / name for name in names]
    if all((p / "config.json").exists() for p in paths):
        return paths
    for k, path in enumerate(paths):
        print(f"making {path} ({size / 1e6:.0f} M parameters, synthetic)", flush=True)
        base, noise = np.random.default_rng(0), np.random.default_rng(k)
        with checkpoints.create(path, layout, overwrite=True) as writer:
            for t in layout:
                for start in range(0, t.size, 1 << 22):
                    n = min(1 << 22, t.size - start)
                    x = base.standard_normal(n, np.float32) * np.float32(0.02)
                    if k:
                        x = x.astype(t.dtype).astype(np.float32)
                        x += noise.standard_normal(n, np.float32) * np.float32(1e-3)
                    writer.write(t.name, start, x.astype(t.dtype))
            text = json.dumps(settings, indent=2)
            (writer.directory / "config.json").write_text(text)
    return paths


def floor(paths: list[Path], out: Path) -> list[str]:
    """A process that reads every input byte and writes as many as the output has."""
    files = [str(p / "model.safetensors") for p in paths]
    code = f"""
import os
buffer = bytearray(1 << 22)
for f in {files!r}:
    with open(f, "rb", buffering=0) as h:
        while h.readinto(buffer):
            pass
with open({str(out)!r}, "wb", buffering=0) as h:
    for start in range(0, os.path.getsize({files[0]!r}), 1 << 22):
        h.write(buffer)
"""
    return [sys.executable, "-c", code]


def ours(paths: list[Path], out: Path, row: Row, *options: str) -> list[str]:
    """Our command line."""
    base, *models = map(str, paths)
    inputs = [f"--models={','.join(models[: row.models])}", f"--output={out}"]
    if row.base:
        inputs.append(f"--base={base}")
    return [
        *(sys.executable, "-m", "experiments.merge", *inputs),
        *("--overwrite", "--noprogress", *row.ours, *options),
    ]


def install_mergekit(config: Config) -> Path:
    """mergekit-yaml in an environment of its own, made if need be."""
    venv = Path(config.mergekit_venv or Path(config.workdir) / "mergekit-venv")
    venv = venv.absolute()
    if not (venv / "bin" / "mergekit-yaml").exists():
        print(f"installing {' '.join(_MERGEKIT)} into {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        for package in _MERGEKIT:  # torch first: mergekit's own choice has CUDA
            pip = [str(venv / "bin" / "pip"), "install", "-q", package]
            subprocess.run(pip, check=True)
    return venv / "bin" / "mergekit-yaml"


def mergekit(
    program: Path, workdir: Path, paths: list[Path], out: Path, row: Row
) -> list[str]:
    """mergekit-yaml with a recipe of a row; weights are 1."""
    base, *models = [str(p.absolute()) for p in paths]
    models = models[: row.models]
    lines = [f"merge_method: {row.theirs}", "models:"]
    weight = row.theirs not in ("slerp", "sce", "karcher", "model_stock")
    for model in models:
        lines.append(f"- model: {model}")
        if weight:
            lines += ["  parameters:", "    weight: 1.0"]
    if row.base or row.theirs == "slerp":
        lines.append(f"base_model: {base if row.base else models[0]}")
    if row.parameters:
        lines.append(f"parameters: {{{row.parameters}}}")
    lines += ["dtype: float32", "out_dtype: bfloat16"]
    recipe = workdir / f"mergekit-{row.theirs}.yml"
    recipe.write_text("\n".join(lines) + "\n")
    return [str(program), str(recipe), str(out)]


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak RssAnon in MB) of a command and what it starts.

    The peak is 0 where none is seen: without /proc, as elsewhere than under Linux.
    """
    started = time.perf_counter()
    # Compiled modules are kept, as those of installed packages are.
    environment = {k: v for k, v in os.environ.items() if k != _NO_BYTECODE}
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, rss_anon(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _, errors = process.communicate()
    except BaseException:  # ctrl-c, or a scheduler's end: not without the child
        process.kill()
        raise
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed:\n{errors[-2000:]}")
    return seconds, peak / 1e6


def rss_anon(pid: int) -> int:
    """Bytes of a process and its children; 0 where they, or /proc, are not there."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return total + sum(rss_anon(int(child)) for child in children)
    except OSError:
        return total


def run(config: Config) -> list[dict[str, Any]]:
    """Measures everything in turn; returns one row a contestant."""
    workdir = Path(config.workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    paths = make_models(config, workdir)
    out = workdir / "out"
    chosen = [name.strip() for name in config.only.split(",") if name.strip()]
    if chosen == ["svd"]:
        chosen = list(SVD)
    every = ROWS | {name: Row((f"--method={name}",), "") for name in SVD}
    if unknown := [name for name in chosen if name not in every]:
        raise ValueError(f"--only: got {unknown}, expected some of {list(every)}")
    rows = {k: every[k] for k in chosen or ROWS}
    commands = {FLOOR: floor(paths, workdir / "floor.bin")}
    program = install_mergekit(config) if config.mergekit else None
    for name, row in rows.items():
        commands[name] = ours(paths, out, row)
        commands[f"{name} --noreport"] = ours(paths, out, row, "--noreport")
        theirs = f"mergekit {row.theirs}"
        if program is not None and row.theirs and theirs not in commands:
            commands[theirs] = mergekit(
                program, workdir, paths, workdir / "out-mergekit", row
            )
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for repeat in range(max(config.repeats, config.mergekit_repeats)):
        for name, command in commands.items():
            theirs = name.startswith("mergekit")
            if repeat < (config.mergekit_repeats if theirs else config.repeats):
                os.sync()  # do not pay for what the one before wrote
                runs[name].append(measure(command))
                seconds, memory = runs[name][-1]
                print(f"{name}: {seconds:.1f} s, {memory:.0f} MB", flush=True)
    size = sum(t.size for t in llama_layout(config))
    results = summarise(runs, rows, size)
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    load = os.getloadavg()[0]
    text = (
        f"{size / 1e6:.0f} M parameters, base + 3 models (slerp, nuslerp: 2);"
        f" load {load:.1f}\n\n{as_table(results)}"
    )
    (workdir / "report.md").write_text(text)
    print(text)
    return results


def summarise(
    runs: dict[str, list[tuple[float, float]]], rows: dict[str, Row], size: int
) -> list[dict[str, Any]]:
    """Medians, and ratios to the floor, to mergekit's same method and to the size."""
    median = {k: statistics.median(s for s, _ in r) for k, r in runs.items() if r}
    out = []
    for name, results in runs.items():
        seconds = [s for s, _ in results]
        row = rows.get(name.removesuffix(" --noreport"))
        theirs = median.get(f"mergekit {row.theirs}") if row else None
        out.append(
            {
                "name": name,
                "seconds": median[name],
                "fastest": min(seconds),
                "slowest": max(seconds),
                "memory_mb": max(m for _, m in results) or None,
                "ns_per_parameter": 1e9 * median[name] / size,
                "times_floor": median[name] / median[FLOOR],
                "times_faster": theirs / median[name] if theirs else None,
            }
        )
    return out


def as_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | seconds (fastest-slowest) | x floor | faster than mergekit | RssAnon MB |"
        " ns a parameter |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = f"{r['times_floor']:.1f}" if r["times_floor"] else ""
        faster = f"{r['times_faster']:.1f} x" if r["times_faster"] else ""
        memory = f"{r['memory_mb']:.0f}" if r["memory_mb"] else ""
        spread = f"{r['seconds']:.1f} ({r['fastest']:.1f}-{r['slowest']:.1f})"
        lines.append(
            f"| {r['name']} | {spread} | {ratio} | {faster} | {memory}"
            f" | {r['ns_per_parameter']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    flags.main(Config, run)
