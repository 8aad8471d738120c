"""The pictures of the documents beside those of reports: drawn from what is counted, planned or computed, not timed.

``python -m bench pictures`` writes them into docs/pictures, and the form for phones of all pictures of the pages into
docs/pictures/narrow. They have a white ground; in the dark the site inverts it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import front, internals, plot, plot_files, stacked
from bench.accuracy import EQUAL, TORCH_BF16
from bench.plot import FAINT, GRID, INK, NARROW_IN, OURS_COLOR, dress
from bench.plot_accuracy import COLORS, accuracy_figure
from bench.report import Report
from bench.workloads import WORKLOADS, Workload, build
from swafast import ExponentialAverage, FusedAveragedModel

FOLDER = Path("docs/pictures")
WIDTH_IN = 8.0
OP_COLOR, WAIT_COLOR = "#aab4be", "#d9480f"


def draw_all(folder: Path, results: Path) -> list[Path]:
    """Draw every picture, and under ``narrow`` the form for phones of each, also of the reports'. Return the files."""
    speed, accuracy, files = (Report.read(results / f"{name}.json") for name in ("cpu", "accuracy", "files"))
    gigabytes, updates = planned_gb(WORKLOADS["llama3_8b"], RANKS), counted_updates()
    shown = {"whole": gigabytes[WHOLE], "sharded": gigabytes["FSDP2"]}
    gains = front.speedups(speed), front.errors_of_bf16(accuracy), accuracy.updates, shown
    drawn = []
    for is_narrow, place in ((False, folder), (True, folder / "narrow")):
        figures = {
            "front": front.front_figure(*gains, is_narrow=is_narrow),
            "formats": formats_figure(accuracy, is_narrow=is_narrow),
            "memory": memory_figure(gigabytes, is_narrow=is_narrow),
            "one_update": update_figure(updates, is_narrow=is_narrow),
        }
        drawn += [save_svg(figure, place / f"{name}.svg") for name, figure in figures.items()]
    of_reports = {
        "cpu": plot.speed_figure(speed, plot.NARROW),
        "accuracy": accuracy_figure(accuracy, is_narrow=True),
        "files": plot_files.files_figure(files, is_narrow=True),
    }
    for name, figure in of_reports.items():
        if figure is not None:
            plot.save(figure, folder / "narrow" / f"{name}.png")
            drawn.append(folder / "narrow" / f"{name}.png")
    return [*drawn, *stacked.stack_all(FOLDER, folder / "narrow")]


def save_svg(figure: Figure, path: Path) -> Path:
    """Write a picture, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "swafast"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return path


# Errors of formats

STREAM = "drifting"
LEAST = 1e-9  # an error of 0 is drawn there, below the axis
SHOWN_RULES = {"EMA 0.999": "EMA, decay 0.999", EQUAL: "equal mean"}
FORMAT_LABELS = {
    TORCH_BF16: "torch's class, bf16",
    "half": "half, 2 bytes",
    "compact": "compact, 3 bytes",
    "float32": "float32 and exact, 4 bytes",
    "compensated": "compensated, 8 bytes",
}


def formats_figure(report: Report, *, is_narrow: bool = False) -> Figure:
    """Draw the error of each format over the updates, of params that drift."""
    figure = Figure(figsize=(NARROW_IN, 6.4) if is_narrow else (WIDTH_IN, 3.3), facecolor="white")
    updates = np.array(report.updates)
    by_kind = {(curve.stream, curve.rule, curve.format): curve.errors for curve in report.curves}
    for index, (rule, title) in enumerate(SHOWN_RULES.items()):
        narrow_box = (0.12, 0.63 - 0.43 * index, 0.83, 0.31)
        axes = figure.add_axes(narrow_box if is_narrow else (0.07 + 0.49 * index, 0.27, 0.415, 0.62))
        for kind, label in FORMAT_LABELS.items():
            errors = by_kind[STREAM, rule, kind]
            axes.plot(updates, np.maximum(errors, LEAST), color=COLORS[kind], linewidth=1.8, label=label)
        axes.set(xscale="log", yscale="log", xlim=(1, updates[-1]), ylim=(5e-9, 3))
        dress(axes, title, 9.5, weight="normal", grid="both")
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=3 - is_narrow, frameon=False, fontsize=8)
    figure.text(0.5, 0.137 if is_narrow else 0.165, "models averaged", fontsize=8, color=FAINT, ha="center")
    return figure


# Memory of one rank

RANKS = 8
#: How the model is spread, and the shape of the mesh; None: it is replicated.
MODES: Mapping[str, tuple[tuple[int, ...] | None, bool]] = {
    "DDP": (None, False),
    "FSDP2": ((RANKS,), False),
    "HSDP, 2 replicas of 4 shards": ((2, RANKS // 2), False),
    "the same, share_replicas=True": ((2, RANKS // 2), True),
}
WHOLE = "FusedAveragedModel on each rank"
BYTES_PER_PARAM = internals.planes_nbytes("exact")


def planned_gb(workload: Workload, ranks: int) -> dict[str, float]:
    """Return the bytes of averages in the format ``exact`` on the first rank, by mode, as the plans have them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    meta = torch.device("meta")
    found = {WHOLE: float(workload.num_params * BYTES_PER_PARAM)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        for mode, (mesh, share_replicas) in MODES.items():
            model = _spread(build(workload, torch.bfloat16, meta), mesh)
            numel = internals.plan_shares(model, 0, ranks, share_replicas=share_replicas)
            found[mode] = float(numel * BYTES_PER_PARAM)
    finally:
        dist.destroy_process_group()
    return {mode: nbytes / 1e9 for mode, nbytes in found.items()}


def _spread(model: nn.Module, mesh: tuple[int, ...] | None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if mesh is not None:
        names = ("replica", "shard")[-len(mesh) :]
        fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    return model


def memory_figure(gigabytes: Mapping[str, float], *, is_narrow: bool = False) -> Figure:
    """Draw a bar for each mode."""
    figure = Figure(figsize=(NARROW_IN if is_narrow else WIDTH_IN, 2.5), facecolor="white")
    axes = figure.add_axes((0.37, 0.03, 0.48, 0.8) if is_narrow else (0.3, 0.06, 0.6, 0.78))
    columns = 20 if is_narrow else 40
    places = range(len(gigabytes))[::-1]
    colors = [FAINT if mode == WHOLE else OURS_COLOR for mode in gigabytes]
    axes.barh(places, list(gigabytes.values()), height=0.6, color=colors)
    axes.set_yticks(places, [textwrap.fill(mode, columns) for mode in gigabytes])
    for place, value in zip(places, gigabytes.values(), strict=True):
        axes.text(value + max(gigabytes.values()) * 0.012, place, f"{value:.1f} GB", va="center", fontsize=9, color=INK)
    axes.set(xlim=(0, max(gigabytes.values()) * 1.02))
    title = f"Averages of Llama-3-8B in bfloat16 on one of {RANKS} ranks"
    dress(axes, "" if is_narrow else title)
    if is_narrow:
        figure.text(0.02, 0.92, title, fontsize=8.5, fontweight="bold", color=INK)
    axes.set_xticks([])
    return figure


# One update

OP, WAIT, OURS = "operation of torch", "wait of the host for the device", "launch of swafast"
NUM_LAYERS = 10
_MAKES_NO_LAUNCH = ("detach", "empty", "empty_like", "empty_strided", "alias")


class _Noting(TorchDispatchMode):
    """Notes operations that compute or copy, and reads of a value by the host, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.noted.append(WAIT)
        elif not func.is_view and name not in _MAKES_NO_LAUNCH:
            self.noted.append(OP)
        return func(*args, **(kwargs or {}))


def counted_updates() -> dict[str, list[str]]:
    """Return what one update does, after the first one, by each way to average a small model."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(NUM_LAYERS)))
    theirs = {
        "torch's class, get_swa_multi_avg_fn()": AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn()),
        "torch's class, get_ema_multi_avg_fn(0.999)": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
        "torch's class as it comes, on a CPU": AveragedModel(model),
    }
    found = {name: _noted(partial(each.update_parameters, model)) for name, each in theirs.items()}
    pairs = [(param.detach().clone(), param.detach().bfloat16()) for param in model.parameters()]

    def loop() -> None:
        for average, param in pairs:
            average.lerp_(param.float(), 0.001)

    found["a loop that keeps a float32 average of bf16"] = _noted(loop)
    with internals.counted_launches() as launches:
        averaged = FusedAveragedModel(model, rule=ExponentialAverage(0.999))
        noted = _noted(lambda: averaged.update_parameters(model), launches)
        found["swafast"] = noted + [OURS] * launches.total()
    return found


def _noted(update: Callable[[], object], launches: Counter[str] | None = None) -> list[str]:
    for _ in range(2):  # the first copies, and what is made on first use is made
        update()
    if launches is not None:
        launches.clear()
    with torch.no_grad(), _Noting() as noting:
        update()
    return noting.noted


def update_figure(updates: Mapping[str, Sequence[str]], *, is_narrow: bool = False) -> Figure:
    """Draw a row for each way: its operations, waits and launches from left to right."""
    figure = Figure(figsize=(NARROW_IN, 4.4) if is_narrow else (WIDTH_IN, 3.0), facecolor="white")
    axes = figure.add_axes((0.03, 0.16, 0.94, 0.76) if is_narrow else (0.36, 0.16, 0.45, 0.72))
    longest = max(map(len, updates.values()))
    for place, (way, noted) in zip(range(len(updates))[::-1], updates.items(), strict=True):
        _draw_row(axes, place - 0.12 * is_narrow, noted, 0.5 if is_narrow else 0.8)
        counts = Counter(noted)
        work = f"{counts[OURS]} launch" if counts[OURS] else f"{counts[OP]} operations"
        text = f"{work}, {counts[WAIT]} waits"
        if is_narrow:  # above the row
            axes.text(0, place + 0.38, f"{way}:\n{text}", va="center", fontsize=8.5, color=INK)
        else:
            axes.text(longest + 1, place, text, va="center", fontsize=8.5, color=INK)
    axes.set(xlim=(-0.5, longest), ylim=(-0.6, len(updates) - 0.4))
    axes.set_yticks(range(len(updates))[::-1], ["" if is_narrow else way for way in updates])
    dress(axes, f"One update of {2 * NUM_LAYERS} parameters")
    axes.set_xticks([])
    axes.grid(visible=False)
    marks = {OP: OP_COLOR, WAIT: WAIT_COLOR, OURS: OURS_COLOR}
    handles = [Patch(color=color) for color in marks.values()]
    figure.legend(handles, list(marks), loc="lower center", ncols=3 - 2 * is_narrow, frameon=False, fontsize=8.5)
    return figure


def _draw_row(axes: Axes, place: float, noted: Sequence[str], height: float) -> None:
    """Draw the marks of one way; ``height`` is that of a wait."""
    axes.axhline(place, color=GRID, linewidth=0.8, zorder=0)
    for at, kind in enumerate(noted):
        if kind == WAIT:
            axes.bar(at, height, width=0.5, bottom=place - height / 2, color=WAIT_COLOR)
        else:
            axes.bar(
                at,
                0.55 * height,
                width=0.8,
                bottom=place - 0.275 * height,
                color=OURS_COLOR if kind == OURS else OP_COLOR,
            )
