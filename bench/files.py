"""The average of checkpoints in files: CPU time, time and peak memory of ours and of others, each run in a process.

All ways run in turn, round by round. The best round of each counts: another program on the machine only adds. The
peak memory is the child's own, VmHWM: a small process between starts it, since Linux counts the memory of whoever
starts a program as the program's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.machine import OthersCpu
from bench.process import ROOT, scrub
from bench.report import FileRow
from bench.timing import rounds

OURS, RUNNING_SUM, STACK = "swafast average", "torch, running sum", "torch, stack and mean"
MERGEKIT, LIMIT = "mergekit, linear", "read all, write one, fsync"
NUM_INPUTS, ROUNDS, QUICK_ROUNDS = 5, 5, 2
LIMIT_S = 300.0
# What may differ from the float64 mean rounded once: of ours, the share of elements. Others sum in float32, and are
# only held to this distance.
OURS_DIFFER, CLOSE = 1e-6, 1e-2

# What ours may take: parts of the CPU seconds of two others, times the limit of the machine, and memory.
CPU_OF_SUM, CPU_OF_MERGEKIT, WALL_OF_LIMIT, WALL_MORE_S, PEAK_MB = 1 / 4, 1 / 6, 1.6, 0.4, 64

# A process that starts the way and prints its wall time, its CPU time and its peak memory.
_LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, used = os.wait4(pid, 0)
found = {"wall_s": time.perf_counter() - start, "cpu_s": used.ru_utime + used.ru_stime,
         "peak_bytes": used.ru_maxrss * 1024, "code": os.waitstatus_to_exitcode(status)}
sys.__stdout__.write(json.dumps(found))
"""


@dataclass(frozen=True)
class Model:
    """A decoder as Llama has it, which mergekit knows by its names."""

    dtype: str
    layers: int
    width: int = 768
    inner: int = 2048
    words: int = 32000

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.words, self.width)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name in "qkvo":
                yield f"{prefix}.self_attn.{name}_proj.weight", (self.width, self.width)
            for name in ("gate", "up"):
                yield f"{prefix}.mlp.{name}_proj.weight", (self.inner, self.width)
            yield f"{prefix}.mlp.down_proj.weight", (self.width, self.inner)
            yield f"{prefix}.input_layernorm.weight", (self.width,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.width,)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.words, self.width)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 12,
            "vocab_size": self.words,
            "torch_dtype": self.dtype,
            "tie_word_embeddings": False,
        }


# About 500 MB each.
MODELS = (Model("float32", 11), Model("bfloat16", 28))
QUICK_MODELS = (Model("float32", 2, 192, 512, 8000), Model("bfloat16", 4, 192, 512, 8000))


def write_inputs(model: Model, folder: Path, count: int = NUM_INPUTS) -> list[Path]:
    """Write checkpoints of one training, as folders of Hugging Face."""
    made = []
    for index in range(count):
        place = folder / f"checkpoint-{index + 1}"
        place.mkdir(parents=True)
        generator = torch.Generator().manual_seed(index)
        dtype = getattr(torch, model.dtype)
        state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in model.shapes()}
        save_file(state, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(model.config()))
        made.append(place / "model.safetensors")
    return made


def commands(model: Model, inputs: Sequence[Path], folder: Path, mergekit: Path | None) -> dict[str, list[str]]:
    """Return the command of each way. Its output is ``folder / "out" / way``."""
    files, script = list(map(str, inputs)), [sys.executable, "-m", "bench.file_scripts"]
    place = {way: str(output_of(folder, way)) for way in (OURS, RUNNING_SUM, STACK, LIMIT)}
    found = {  # the order of the tables
        OURS: [
            *(sys.executable, "-c", "from swafast.cli import app; app()", "average", *files),
            *("-o", place[OURS], "--force", "--quiet"),
        ],
        RUNNING_SUM: [*script, "running_sum", place[RUNNING_SUM], *files],
        STACK: [*script, "stack_and_mean", place[STACK], *files],
        LIMIT: [*script, "read_and_write", place[LIMIT], *files],
    }
    if mergekit is not None:
        lines = [f"  - model: {path.parent}\n    parameters:\n      weight: 1.0" for path in inputs]
        recipe = folder / "linear.yaml"
        recipe.write_text("\n".join(["models:", *lines, "merge_method: linear", f"dtype: {model.dtype}"]) + "\n")
        out = str(output_of(folder, MERGEKIT).parent)
        options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
        found[MERGEKIT] = [str(mergekit / "bin" / "mergekit-yaml"), str(recipe), out, *options]
    return found


def output_of(folder: Path, way: str) -> Path:
    """Return where a way writes: in a folder of its own, under the name that mergekit gives."""
    return folder / "out" / re.sub(r"\W+", "-", way) / "model.safetensors"


def launch(command: Sequence[str]) -> tuple[dict[str, float], str]:
    """Run a command, and return what it took and what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-S", "-E", "-c", _LAUNCHER, *command]
    done = subprocess.run(
        launcher, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT_S
    )
    printed, _, found = done.stdout.rpartition("{")
    return json.loads("{" + found), printed + done.stderr


def differing(inputs: Sequence[Path], out: Path) -> tuple[float, float]:
    """Return the share of elements that are not the float64 mean rounded once, and the largest relative distance."""
    off, total, worst = 0, 0, 0.0
    with safe_open(str(out), "pt") as written:
        files = [safe_open(str(path), "pt").__enter__() for path in inputs]
        for name in files[0].keys():  # noqa: SIM118
            values = [file.get_tensor(name).double() for file in files]
            exact = sum(values[1:], values[0]) / len(values)
            found = written.get_tensor(name)
            off += int((found != exact.to(found.dtype)).sum())
            total += found.numel()
            scale = max(float(value.abs().max()) for value in values)
            worst = max(worst, float((found.double() - exact).abs().max()) / max(scale, 1e-30))
        for file in files:
            file.__exit__(None, None, None)
    return off / total, worst


def measure(
    models: Sequence[Model],
    folder: Path,
    mergekit: Path | None = None,
    *,
    count: int = ROUNDS,
    progress: Callable[[str], object] = lambda text: None,
) -> list[FileRow]:
    """Measure every way on every model; files are in ``folder``, one model at a time."""
    found = []
    for model in models:
        progress(f"{model.dtype}: writing {NUM_INPUTS} inputs")
        place = folder / model.dtype
        inputs = write_inputs(model, place)
        found += _measure_model(model, inputs, place, mergekit, count, progress)
        shutil.rmtree(place)
    return found


def _measure_model(
    model: Model, inputs: list[Path], folder: Path, mergekit: Path | None, count: int, progress: Callable[[str], object]
) -> list[FileRow]:
    ways = commands(model, inputs, folder, mergekit)
    checked = {}
    for way in ways:  # a warm-up too, after which all inputs are in the page cache
        progress(f"{model.dtype}: checking {way}")
        checked[way] = _check(way, ways[way], inputs, output_of(folder, way))
    if mergekit is None:
        checked[MERGEKIT] = {"status": "not installed", "reason": "pip install mergekit==0.1.5, and give --mergekit"}
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in checked}
    others = OthersCpu()
    for way in rounds([way for way, found in checked.items() if "status" not in found], 0.0, least=count):
        progress(f"{model.dtype}: {way}, round {len(samples[way]) + 1} of {count}")
        samples[way].append(launch(ways[way])[0])
    share = others.share()
    blank = FileRow("", model.dtype, len(inputs), inputs[0].stat().st_size, others_cpu=share)
    return [replace(blank, way=way, **found, **_best(samples[way])) for way, found in checked.items()]


def _check(way: str, command: list[str], inputs: list[Path], out: Path) -> dict[str, Any]:
    """Run a way once. Return the share of elements that differ, or why the way has no figures."""
    out.parent.mkdir(parents=True, exist_ok=True)
    taken, printed = launch(command)
    if taken["code"]:
        lines = [line for line in printed.splitlines() if re.search("[a-z]", line)]
        return {"status": "failed", "reason": scrub(lines[-1].strip()) if lines else f"code {taken['code']}"}
    if way == LIMIT:
        return {}
    share, worst = differing(inputs, out)
    if worst > CLOSE or (way == OURS and share > OURS_DIFFER):
        return {"status": "wrong", "reason": f"{share:.1e} of the elements differ, by up to {worst:.1e}"}
    return {"differing": share}


def _best(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Return the least times and the largest memory of all rounds."""
    if not samples:
        return {}
    wall_s, cpu_s = (min(each[key] for each in samples) for key in ("wall_s", "cpu_s"))
    peak = int(max(each["peak_bytes"] for each in samples))
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak, "rounds": len(samples)}


# Bars


def bars(rows: Sequence[FileRow]) -> list[tuple[str, float, float]]:
    """Return each requirement with its limit and what was measured, by the dtype of the inputs."""
    found = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        by_way = {row.way: row for row in rows if row.dtype == dtype and row.rounds}
        ours = by_way.get(OURS)
        if ours is None:
            continue
        for way, part in ((RUNNING_SUM, CPU_OF_SUM), (MERGEKIT, CPU_OF_MERGEKIT)):
            if way in by_way:
                found.append((f"{dtype}: CPU seconds, of {way}", part, ours.cpu_s / by_way[way].cpu_s))
        if LIMIT in by_way:
            limit_s = WALL_OF_LIMIT * by_way[LIMIT].wall_s + WALL_MORE_S
            found.append((f"{dtype}: seconds", limit_s, ours.wall_s))
        found.append((f"{dtype}: peak memory, MB", PEAK_MB, ours.peak_bytes / 1e6))
    return found
