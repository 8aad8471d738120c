"""A report survives its JSON, and pages, bars, tables and pictures come from it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.markdown import Markdown

from bench import bars, gpu, names, pages, plot, plot_accuracy, tables
from bench.bars import Bar
from bench.cases import SWEPT, gpu_cases
from bench.lookup import failures, left_out, merged
from bench.loop import ATTACHED, NONE, OVERLAP
from bench.providers import UPDATE_PROVIDERS
from bench.report import Curve, Part, Report, Row, StepRow, Times, count_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
ENVIRONMENT = {
    "command": "python -m bench",
    "device_name": "some CPU",
    "threads": 2,
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
}


def times(seconds: float) -> Times:
    # The median is the middle one, so the two others must not show.
    return Times.of([seconds, seconds * 9, seconds / 9])


def row(workload: str, dtype: str, provider: str, seconds: float, **more: Any) -> Row:
    return replace(Row(workload, workload, dtype, provider, 100, 2, 1200, wall=times(seconds)), **more)


@pytest.fixture
def report() -> Report:
    fp32 = {names.TORCH_CLASS: 0.5, names.TORCH_EMA: 0.12, names.OURS: 0.1, names.FLAT_LERP: 0.08}
    bf16 = {names.TORCH_CLASS: 0.1, names.MUL_ADD: 0.64, names.LERP_FLOAT: 0.56, names.OURS_EXACT: 0.08}
    bf16 |= {names.OURS_FLOAT32: 0.08, names.FLAT_LERP: 0.07}
    rows = [row("gpt2_medium", "float32", name, seconds) for name, seconds in fp32.items()]
    rows += [row("gpt2_medium", "bfloat16", name, seconds) for name, seconds in bf16.items()]
    formats, several = {"group": names.FORMATS}, {"group": names.SEVERAL}
    rows += [
        Row("3000x64", "3000x64", "float32", names.OURS, 1, 1, 12, status="wrong", reason="off"),
        row("gpt2_medium", "float32", "float32", 0.1, held_bytes=400, **formats),
        row("gpt2_medium", "float32", "compact", 0.12, held_bytes=300, counted_bytes=1000, **formats),
        row("gpt2_medium", "float32", names.ONE, 0.1, **several),
        row("gpt2_medium", "float32", names.THREE, 0.28, counted_bytes=2800, **several),
    ]
    added = Times.of([0.1, 0.15]), Times.of([0.05, 0.07])
    steps = [StepRow("demo", NONE, 10**6, times(2.0)), StepRow("demo", OVERLAP, 10**6, times(2.1), None, *added, 3)]
    curves = [Curve("zero-mean", "equal mean", "exact", [0.0, 1e-7])]
    return Report(ENVIRONMENT, rows, steps, curves, [1, 2], [Part("build", "ok", facts={"a": 1})])


def test_a_report_survives_its_json(report: Report, tmp_path: Path) -> None:
    path, samples = tmp_path / "cpu.json", tmp_path / "cpu.samples.jsonl"
    report.rows[0] = replace(report.rows[0], waits=False, launches=0)  # found to be nothing: not the defaults
    report.write(path)
    written = Report.read(path)
    assert written.rows[0].wall == Times(0.5, 0.277778, 2.5, 3)
    assert (written.rows[0].waits, written.rows[0].launches, written.steps[1].differing) == (False, 0, 3)
    written.write(path)
    assert Report.read(path) == written
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
    report.write_samples(samples)
    back = Report()
    for line in samples.read_text().splitlines():
        back.add(line)
    assert (back.rows, back.steps) == (written.rows, written.steps)
    assert back.rows[0].wall is not None
    assert back.rows[0].wall.samples == (0.5, 4.5, pytest.approx(0.5 / 9, rel=1e-4))
    path.write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="schema must be 2, got 1"):
        Report.read(path)


def test_the_committed_reports_are_small_and_hold_no_samples() -> None:
    files = sorted(RESULTS.glob("*.json*"))
    assert [file.name for file in files] == [
        "accuracy.json",
        "cpu.json",
        "files.json",
        "host.json",
        "loop.json",
        "sharded.json",
        "swag.json",
    ]
    assert sum(file.stat().st_size for file in files) < 200_000
    assert not any("samples" in file.read_text() for file in files)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pages with empty blocks."""
    for page in {block.page for block in pages.BLOCKS}:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        blocks = [block for block in pages.BLOCKS if block.page == page]
        (tmp_path / page).write_text("\n".join(f"a\n{b.markers[0]}\nold\n{b.markers[1]}\nb" for b in blocks))
    return tmp_path


def test_every_block_is_filled_and_nothing_else_changed(root: Path) -> None:
    assert pages.fill(ROOT, RESULTS, check=True) == [], "run: python -m bench pages"
    assert len(pages.fill(root, RESULTS, check=True)) == len(pages.BLOCKS)
    assert pages.fill(root, RESULTS) == pages.fill(root, RESULTS) == []
    assert pages.fill(root, RESULTS, check=True) == []
    for page in {block.page for block in pages.BLOCKS}:
        blocks = [block for block in pages.BLOCKS if block.page == page]
        inside = [(b.markers[0], b.make(Report.read(RESULTS / b.report)), b.markers[1]) for b in blocks]
        text = (root / page).read_text()
        assert text == "\n".join(f"a\n{begin}\n{made}\n{end}\nb" for begin, made, end in inside)
        assert max(map(len, text.splitlines())) <= 120, page
    path = root / "docs" / "loop.md"
    path.write_text(path.read_text().replace("|", "!", 1))
    assert pages.fill(root, RESULTS, check=True) == ["docs/loop.md: the block loop is not what loop.json gives"]


@pytest.mark.parametrize("text", ["", "BEGIN", "END", "ENDBEGIN", "BEGINENDBEGINEND"])
def test_a_page_without_its_markers_or_with_others_is_a_problem_and_stays(text: str, root: Path) -> None:
    page = root / "docs" / "loop.md"
    page.write_text(text.replace("BEGIN", "<!-- loop:begin -->").replace("END", "<!-- loop:end -->"))
    before = page.read_text()
    (root / "README.md").write_text((root / "README.md").read_text() + "<!-- sharded:begin -->")
    (root / "docs" / "speed.md").unlink()
    *missing, problem, unknown = sorted(pages.fill(root, RESULTS), key=lambda line: line.startswith(("docs/l", "R")))
    assert missing == [f"docs/speed.md is missing: it must hold the block {n}" for n in ("bench", "checked", "host")]
    assert problem.startswith("docs/loop.md must hold")
    assert unknown == "README.md: no report fills the block sharded"
    assert page.read_text() == before
    assert problem in pages.fill(root, RESULTS, check=True)


def test_blocks_have_the_medians(report: Report) -> None:
    short, full = tables.short_block(report).splitlines(), tables.full_block(report)
    assert short[2] == "| gpt2_medium, fp32 | 500 | 120 | 100 | 1.2x |"
    assert short[3] == "| gpt2_medium, bf16, `exact` | 100 | 560 | 80 | 7.0x |"
    assert "| gpt2_medium, bf16, `exact` | 100 | 560 |  | 80 | 7.0x | 88% |" in full
    assert "`python -m bench` on some CPU, 2 threads, torch 2.13.0, 2026-01-02" in full
    loop = tables.loop_block(report)
    assert f"| demo, 1M parameters | {NONE} | 2000 |  |  |  |" in loop
    assert f"|  | {OVERLAP} | 2100 | 125 | 113 to 137 | 6.0% |" in loop
    assert "differ from the plain ones in 3 elements" in loop.replace("\n", " ")
    formats = tables.passes_block(report, names.FORMATS)
    assert "| gpt2_medium, fp32 | compact | 120 | 3 | 10 | 1.20x | 0.83x |" in formats


def gpu_report(scale: Callable[[str, int], float] = lambda workload, averages: 1.0, **more: Any) -> Report:
    """Return a whole report of invented numbers for models of 1e9 params; ``scale`` bends our times."""
    rows, numel = [], 10**9
    ours_have = {"launches": 1, "transfers": 0, "waits": False, "allocated_bytes": 0}
    ours_have |= {"host": times(1e-5)} | more
    theirs = {names.TORCH_CLASS: 12e-3, names.TORCH_EMA: 4e-3, names.FOREACH: 2e-3, names.COMPILED: 1.5e-3}
    theirs |= {names.MUL_ADD: 8e-3, names.LERP_FLOAT: 7e-3}
    for case in [
        each for part in ("small", "largest", "compiled", "formats") for each in gpu_cases(part, (), dry=False)
    ]:
        ours = 1e-3 * scale(case.workload.name, case.averages)
        found = {names.COPY: 0.97e-3, "swafast cuda": ours, "swafast triton": ours * 1.3}
        found |= {each.name: theirs[each.name] for each in case.providers}
        dtype = str(case.dtype).removeprefix("torch.")
        base = Row(case.workload.name, case.workload.title, dtype, "", numel, 10, 12 * numel, case.group, case.format)
        for name, seconds in found.items():
            more_of: dict[str, Any] = ours_have if "swafast" in name else {}
            both: dict[str, Any] = {"wall": times(seconds), "device": times(seconds), "averages": case.averages}
            rows.append(replace(base, provider=name, **both, **more_of))
    about = {"gpu": "an invented GPU", "driver": "0", "versions": {"torch": "0", "triton": "0"}, "date": "2026-01-02"}
    exposed, step = times(0.002 * scale("1e9", 1)), times(1.0)
    steps = [StepRow("GPT-2 medium", NONE, 10**9, step)]
    for way in (ATTACHED, OVERLAP):
        steps += [StepRow("GPT-2 medium", way, 10**9, step, of, exposed, exposed, 0) for of in ("cuda", "triton")]
    bits = {"float32, float32": {"cpu": "a", "cuda": "a", "triton": "a"}}
    return Report(about, merged(rows), steps=steps, bits=bits, parts=[Part("build", "ok", "for sm_90")])


def as_dry(report: Report) -> Report:
    """Return a report as if it came from a dry run."""
    on_cpu = {"swafast cuda": "swafast cpu", "swafast triton": "swafast reference"}
    rows = [replace(row, provider=on_cpu.get(row.provider, row.provider)) for row in report.rows]
    return replace(report, dry=True, rows=rows)


def verdicts(report: Report) -> dict[str, Bar]:
    return {bar.work: bar for bar in bars.gpu_bars(report)}


def test_bars_of_a_gpu_are_computed_from_the_medians() -> None:
    found = verdicts(gpu_report())
    assert len(found) == 24
    assert {bar.met("cuda") for bar in found.values()} == {True}
    for work, backend, expected in (
        ("Llama-3-8B, bf16 exact: of the device copy", "triton", 97 / 1.3),
        ("ResNet-50, fp32: torch's class, wall time", "cuda", 12),
        ("compiled foreach, wall time, least", "cuda", 1.5),
        ("host time, of 20 us + 0.5 us a tensor, most", "cuda", 40),
        ("GPT-2 medium, bf16 exact: 3 averages, time/bytes", "cuda", 1),
    ):
        assert found[work].measured[backend] == pytest.approx(expected), work


@pytest.mark.parametrize(("factor", "is_met"), [(1.0, True), (0.9, False)])
def test_bars_of_checks_are_computed_from_the_medians(factor: float, is_met: bool) -> None:
    """Of host times, of whole updates and of a step: each bar is met exactly, or missed by a tenth."""
    rows = [
        row(name, "float32", names.OURS, limit * 1e-6 / factor, group=names.HOST)
        for name, limit in bars.HOST_BARS.items()
    ]
    for group in (names.CHECKED, names.CHECKED_ALONE):
        for name, others in bars.CHECKED_BARS.items():
            rows += [row(name, "float32", other, limit * factor, group=group) for other, limit in others.items()]
            rows.append(row(name, "float32", names.OURS, 1.0, group=group))
    added = Times.of([bars.DEMO_BAR_MS / 1e3 / factor])
    steps = [StepRow("demo", way, 1, times(2.0), None, added, added) for way in (NONE, ATTACHED, OVERLAP)]
    steps.append(StepRow("another", ATTACHED, 1, times(2.0), None, times(9.0), times(9.0)))
    found = Report({}, rows, steps)
    host, checked, loop = bars.host_bars(found), bars.checked_bars(found), bars.loop_bars(found)
    assert [len(each) for each in (host, checked, loop)] == [6, 10, 1]
    assert {bar.met(names.OURS) for bar in (*host, *checked, *loop)} == {is_met}
    assert [*bars.host_bars(Report()), *bars.checked_bars(Report()), *bars.loop_bars(Report())] == []
    assert ("SHORT" in bars.bars_table(found, host)) != is_met


def test_each_bar_of_a_gpu_can_be_missed() -> None:
    more: dict[str, Any] = {"launches": 2, "waits": True, "allocated_bytes": 512, "host": times(1e-3)}
    slow = gpu_report(lambda workload, averages: 20.0 * averages, **more)
    slow.bits = {"a": {"cpu": "x", "cuda": "y", "triton": "x"}}
    slow.steps = [replace(step, differing=3) for step in slow.steps]
    assert {bar.met("cuda") for bar in verdicts(slow).values()} == {False}
    assert verdicts(slow)["cases of 1 whose bits are not the CPU's"].met("triton")
    assert failures(slow)[0] == "bits differ in 1 case, first in a"
    nothing = Report({}, [])
    assert {bar.met("cuda") for bar in verdicts(nothing).values()} == {None}
    assert gpu.problems_of(nothing) == ["no update of swafast was timed"]


def test_failures_name_parts_and_rows_of_ours() -> None:
    found = gpu_report()
    ours, theirs = (next(r for r in found.rows if r.provider == name) for name in ("swafast cuda", names.FOREACH))
    found.rows += [replace(ours, status="wrong", reason="off"), replace(theirs, status="failed", reason="theirs")]
    found.parts += [Part("tests", "failed", "1 failed"), Part("memcheck", "not run", "refused")]
    wrong = f"swafast cuda on {ours.title}, float32 float32: wrong: off"
    assert gpu.problems_of(found) == ["tests: 1 failed", wrong]
    cut = replace(theirs, title="Llama-3-8B, 20 of 32 layers, no embeddings", status="skipped", reason="no room")
    found.rows = [cut]
    assert list(left_out(found)) == [
        "memcheck: refused",
        f"{cut.title}: shortened to the memory that was free",
        f"{cut.title}, float32 float32: {names.FOREACH}: no room",
    ]


def test_copies_are_joined_and_launches_put_beside_the_times() -> None:
    copy = Row("1e9", "1e9", "float32", names.COPY, 1, 1, 1, device=Times.of([1.0, 2.0]))
    (joined,) = merged([copy, replace(copy, device=Times.of([6.0]))])
    assert joined.device == Times.of([1.0, 2.0, 6.0])
    own = replace(copy, provider="swafast cuda", wall=times(1.0))
    seen = replace(own, wall=None, device=None, launches=1)
    (found,) = merged([own, seen])
    assert (found.launches, found.wall) == (1, own.wall)
    (found,) = merged([own, replace(seen, launches=None, status="failed", reason="no CUPTI")])
    assert (found.status, found.wall, found.remarks) == ("ok", own.wall, ["failed: no CUPTI"])


def test_tables_fit_a_log_and_a_dry_run_has_no_verdicts(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_report(lambda workload, averages: 1.2 if workload == "1e9" else 1.0)
    texts = [tables.gpu_table(found), bars.bars_table(found, bars.gpu_bars(found))]
    for text in (*texts, tables.providers_table(report.rows[:4])):
        Console(width=gpu.WIDTH).print(Markdown(text))
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= gpu.WIDTH
        assert "…" not in printed
    assert "SHORT" in texts[1]
    found = as_dry(found)
    text = bars.bars_table(found, bars.gpu_bars(found))
    values = [line.rsplit(" | ", 2)[1:] for line in text.splitlines()[2:-2]]
    assert {value.strip(" |") for line in values for value in line} == {"", "dry"}
    assert "judges no bar" in text


def test_counts_of_one_are_singular() -> None:
    assert [count_text(count, "case") for count in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]


@pytest.mark.parametrize("dry", [False, True])
def test_the_picture_of_a_gpu_has_a_whole_legend_and_a_mark_for_each_other_way(dry: bool) -> None:
    """Swept grids are left out: a picture has no marks for so many, and one workload would stand there twice."""
    found = gpu_report()
    first, swept = found.rows[0], f"swafast cuda, {SWEPT[0][0]}"
    found.rows += [
        replace(first, provider=name, group=f"float32{names.SWEPT}") for name in (names.COPY, "swafast cuda", swept)
    ]
    figure = plot.speed_figure(as_dry(found) if dry else found)
    assert figure is not None
    figure.draw_without_rendering()
    (legend,), (axes,), page = figure.legends, figure.axes, figure.bbox
    below = [text.get_window_extent() for text in figure.texts if text.get_text() != plot.DRY]
    box, around = legend.get_window_extent(), [axes.get_tightbbox(), *below]
    for other in around:
        assert other is not None
        assert not box.overlaps(other)
    for each in (box, *around):
        assert each is not None
        assert page.x0 <= each.x0 < each.x1 <= page.x1
    marks = {str(line.get_marker()) for line in axes.get_lines()}
    drawn = [text.get_text() for text in legend.get_texts()]
    assert len(drawn) == len(set(drawn)) == 3 + len(marks)  # two bars, the copy, and the others
    assert not any("swafast" in name and "," in name for name in drawn)
    rows_drawn = [text.get_text() for text in axes.get_yticklabels()]
    assert len(rows_drawn) == len(set(rows_drawn))


def test_every_provider_has_a_mark_of_its_own() -> None:
    assert len({each.name for each in UPDATE_PROVIDERS}) <= len(set(plot.MARKERS)) == len(plot.MARKERS)


def test_pictures_are_drawn(report: Report, tmp_path: Path) -> None:
    for name, drawn in (("cpu", report), ("gpu", gpu_report())):
        assert plot.plot_speed(drawn, tmp_path / f"{name}.png")
    plot_accuracy.plot_accuracy(Report.read(RESULTS / "accuracy.json"), tmp_path / "accuracy.png")
    for picture in ("cpu", "gpu", "accuracy"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{picture}.png").stat().st_size < 900_000
    assert not plot.plot_speed(Report({}, []), tmp_path / "none.png")
