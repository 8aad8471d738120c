"""The pictures of the documents are drawn, from what is counted and planned."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from bench import front, pictures, plot, plot_files, stacked
from bench.report import Report
from bench.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"


def test_an_update_of_ours_is_one_launch_without_a_wait() -> None:
    updates = pictures.counted_updates()
    assert updates.pop("swafast") == [pictures.OURS]
    params = 2 * pictures.NUM_LAYERS
    default, loop = (
        updates["torch's class as it comes, on a CPU"],
        updates["a loop that keeps a float32 average of bf16"],
    )
    assert loop == [pictures.OP] * 2 * params
    assert default.count(pictures.OP) > params
    assert all(noted.count(pictures.WAIT) > 0 for name, noted in updates.items() if name.startswith("torch's class"))


@pytest.mark.distributed
def test_memory_is_that_of_the_plans() -> None:
    gigabytes = pictures.planned_gb(WORKLOADS["vit_l_16"], pictures.RANKS)
    whole, ddp, fsdp, hsdp, shared = gigabytes.values()
    assert ddp == pytest.approx(whole / pictures.RANKS, rel=0.01)
    assert fsdp == pytest.approx(whole / pictures.RANKS, rel=0.05)
    assert hsdp == pytest.approx(2 * fsdp, rel=0.05)
    assert shared < 1.1 * hsdp / 2


def all_figures(*, is_narrow: bool) -> dict[str, Figure]:
    """Return every picture of this package, of the committed reports and of made-up counts."""
    accuracy = Report.read(RESULTS / "accuracy.json")
    memory = {pictures.WHOLE: 8.0, "DDP": 1.0}
    speed, errors = front.speedups(Report.read(RESULTS / "cpu.json")), front.errors_of_bf16(accuracy)
    gains = speed, errors, accuracy.updates, {"whole": 32.1, "sharded": 4.0}
    return {
        "front": front.front_figure(*gains, is_narrow=is_narrow),
        "formats": pictures.formats_figure(accuracy, is_narrow=is_narrow),
        "memory": pictures.memory_figure(memory, is_narrow=is_narrow),
        "one_update": pictures.update_figure(UPDATES, is_narrow=is_narrow),
    }


UPDATES = {"theirs": [pictures.OP] * 100 + [pictures.WAIT] * 2, "ours": [pictures.OURS]}


def test_pictures_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    for name, figure in all_figures(is_narrow=False).items():
        first = pictures.save_svg(figure, tmp_path / f"{name}.svg").read_bytes()
        assert first.startswith(b"<?xml")
        assert len(first) < 200_000
        assert (pictures.FOLDER / f"{name}.svg").exists()
    again = pictures.update_figure(UPDATES)
    first = (tmp_path / "one_update.svg").read_bytes()
    assert pictures.save_svg(again, tmp_path / "one_update.svg").read_bytes() == first


def fits(figure: Figure) -> bool:
    """Return whether all that a picture shows lies between its left and its right edge."""
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    return 0 <= box.x0 < box.x1 <= figure.get_figwidth()


def test_no_edge_cuts_a_text_of_a_picture() -> None:
    speed, files = (Report.read(RESULTS / f"{name}.json") for name in ("cpu", "files"))
    for is_narrow in (False, True):
        layout = plot.NARROW if is_narrow else plot.WIDE
        reports = {
            "cpu": plot.speed_figure(speed, layout),
            "files": plot_files.files_figure(files, is_narrow=is_narrow),
        }
        for name, figure in (all_figures(is_narrow=is_narrow) | reports).items():
            assert figure is not None
            assert figure.get_figwidth() <= (plot.NARROW_IN if is_narrow else plot.WIDTH_IN)
            assert fits(figure), (name, is_narrow)
    cut = pictures.memory_figure({"DDP": 1.0})
    cut.text(0.9, 0.5, "a long text that is cut")
    assert not fits(cut)


def test_marks_of_a_row_do_not_overlap() -> None:
    places = {"a": 0.5, "b": 0.505, "c": 0.52, "d": 0.7, "e": 0.53}
    lines = plot.lines_of_marks(places)
    assert lines == {"a": 0, "b": 1, "c": 2, "e": 0, "d": 0}


def test_panels_are_stacked_under_the_title() -> None:
    wide = Image.new("RGB", (400, 100), "white")
    for left, color in ((0, "red"), (100, "blue")):
        wide.paste(color, (left, 40, left + 100 + left * 2, 100))
    tall = stacked.stack(wide, stacked.Cut(0.1, 0.4, (0.25,)))
    title, red, blue = 16, 180, 128  # 10 rows of 400 columns, 60 of 100 at thrice their size, 60 of 300
    assert tall.size == (stacked.WIDTH, title + red + blue)
    middle = stacked.WIDTH // 2
    assert [tall.getpixel((middle, y)) for y in (8, 100, 260)] == [(255, 255, 255), (255, 0, 0), (0, 0, 255)]


def test_every_picture_of_the_pages_has_a_form_for_phones() -> None:
    pages = [page.read_text() for page in Path("docs").rglob("*.md")]
    shown = {Path(uri).stem for page in pages for uri in re.findall(r"^!\[[^]]*\]\(([^)]*)\)$", page, re.M)}
    assert len(shown) > 10
    assert shown == {path.stem for path in (pictures.FOLDER / "narrow").iterdir()}
