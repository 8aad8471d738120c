"""The site: every public name has its place in the reference, and messages in the troubleshooting are real ones."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import swafast
import swafast.terms
from docs.sources import frameworks, marks, search
from examples import record
from swafast import ExponentialAverage, FusedAveragedModel

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
REFERENCE = "\n".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
INDEX = (DOCS / "README.md").read_text()
GALLERY = (DOCS / "examples.md").read_text()
TROUBLES = (DOCS / "troubleshooting.md").read_text()
PACKAGES = (swafast, swafast.convert, swafast.files, swafast.optim, swafast.posthoc, swafast.sharded)


# The reference


def documented(text: str) -> list[str]:
    """Return the names in the marks of pages."""
    found = re.findall(r"<!-- reference: ([^>]*) -->", text)
    return [name for mark in found for name in mark.split()]


def undocumented(text: str) -> list[str]:
    """Return the public names that no page of the reference documents. A package may have names of another one."""
    names = {name.rpartition(".")[2] for name in documented(text)} | {"__version__"}
    wanted = [(package, name) for package in PACKAGES for name in package.__all__]
    return [f"{package.__name__}.{name}" for package, name in wanted if name not in names]


def test_every_public_name_is_in_the_reference() -> None:
    assert undocumented(REFERENCE) == []
    names = documented(REFERENCE)
    assert len(names) == len(set(names)) > 40


def test_a_name_that_the_reference_lacks_is_seen() -> None:
    assert undocumented(REFERENCE.replace("swafast.optim.requantize", "")) == ["swafast.optim.requantize"]


def test_what_the_reference_names_is_there() -> None:
    for name in documented(REFERENCE):
        package, _, attribute = name.rpartition(".")
        assert getattr(__import__(package, fromlist=[attribute]), attribute).__doc__, name


def test_classes_of_frameworks_are_found_without_the_frameworks() -> None:
    found = frameworks.public_classes()
    for module in ("accelerate", "lightning", "transformers"):
        assert (f"swafast.integrations.{module}", "WeightAverage") in found
    assert ("swafast.integrations.timm", "ModelEma") in found


# The sidebar, and marks


def in_sidebar(text: str) -> list[str]:
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", marks.contents(text), re.M | re.S)
    return [f"{line}.md" for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]


def test_every_page_is_in_the_sidebar_once() -> None:
    assert sorted([*in_sidebar(INDEX), "README.md"]) == sorted(PAGES)


def test_a_page_that_the_sidebar_lacks_is_seen() -> None:
    lost = INDEX.replace("| [Formats](formats.md)", "| Formats")
    assert PAGES - {*in_sidebar(lost)} == {"README.md", "formats.md"}


def test_the_page_of_all_frameworks_has_the_order_of_the_sidebar() -> None:
    section = INDEX.partition("## Frameworks\n")[2].partition("\n## ")[0]
    there = re.findall(r"\]\(frameworks/(\w+\.md)\)", section)
    here = re.findall(r"^\| \[[^]]*\]\((\w+\.md)\)", (DOCS / "frameworks" / "README.md").read_text(), re.M)
    assert there == ["README.md", *(page for page in here if page != "migration.md")]
    assert len(here) > 10


def test_the_glossary_has_every_word() -> None:
    page = marks.glossary(swafast.terms.__doc__ or "")
    words = re.findall(r"^    (\S.*?)  +\S", swafast.terms.__doc__ or "", re.M)
    assert len(words) > 100
    assert [word for word in words if f"\n| {word} | " not in page] == []
    assert "## `csrc/`: kernels" in page


def test_marks_are_hidden_on_github_and_filled_on_the_site() -> None:
    for path in DOCS.rglob("*.md"):
        for comment in re.findall(r"<!-- (?!\w+:(?:begin|end)|table|end of)[^>]*-->", path.read_text()):
            assert marks.MARK.fullmatch(comment), (path.name, comment)


def test_links_out_of_the_folder_lead_to_pages_of_the_site() -> None:
    text = "[a](../README.md) [b](../../examples/swag.py) [c](../CHANGELOG.md#added) [d](../bench/results/cpu.json)"
    assert marks.with_site_links(text.replace("../../", "../"), "start.md") == (
        "[a](start.md) [b](examples.md#how-sure-a-model-is-swag) [c](changelog.md#added) [d](../bench/results/cpu.json)"
    )
    linked = marks.with_site_links("[b](../../examples/swag.py)", "recipes/swag.md")
    assert linked == "[b](../examples.md#how-sure-a-model-is-swag)"


# The search


def unfound(words: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the search words of pages whose page does not have them, as the search wants."""
    lost = []
    for page, wanted in words.items():
        path = DOCS / f"{page}.md"
        text = path.read_text() if path.exists() else ""
        text += "".join((ROOT / mark[2]).read_text() for mark in marks.MARK.finditer(text) if mark[1] == "page")
        lost += [word for word in wanted if not all(part in text.lower() for part in word.lower().split())]
    return lost


def test_search_words_stand_on_their_pages() -> None:
    assert unfound(search.WORDS) == []
    assert unfound({"formats": ("half",), "security": ("pickle", "zebra"), "nowhere": ("x",)}) == ["zebra", "x"]


def test_each_search_word_leads_to_one_page() -> None:
    words = [word.lower() for each in search.WORDS.values() for word in each]
    assert len(words) == len(set(words))
    assert search.entries("security") == "```{index} ! pickle, ! vulnerability\n```\n\n"
    assert search.entries("formats") == ""


def test_pages_that_name_everything_come_last() -> None:
    script = (DOCS / "sources" / "scorer.js").read_text()
    (last,) = re.findall(r"last: new Set\(\[(.*?)\]\)", script)
    names = re.findall(r'"(.*?)"', last)
    assert {"changelog", "contributing"} <= set(names) <= {page.removesuffix(".md") for page in PAGES}
    assert "html_search_scorer" in (DOCS / "conf.py").read_text()


# The gallery

#: Files in `examples/` that are no examples.
PARTS = {"calibration", "digits", "record"}


def ungalleried(text: str) -> list[str]:
    """Return the examples that the gallery does not show with a command, what it prints, its picture and its code."""
    lost = []
    for name in sorted({path.stem for path in (ROOT / "examples").glob("*.py")} - PARTS):
        sections = [each for each in text.split("\n## ") if f"\n\n[{name}.py](../examples/{name}.py)" in each]
        section = sections[0] if len(sections) == 1 else ""
        printed = next((each[0] for each in record.RECORDED.finditer(section) if each["name"] == name), "")
        has_picture = f"(pictures/gallery/{name}.png)" in section or "picture: " not in printed
        is_complete = has_picture and "not recorded" not in printed and f"<!-- code: {name}.py -->" in section
        if not printed or not is_complete or f"| [{name}.py](#{marks.sections(text).get(f'{name}.py')}) |" not in text:
            lost.append(name)
    return lost


def test_the_gallery_has_every_example() -> None:
    assert ungalleried(GALLERY) == []


@pytest.mark.parametrize(
    "part",
    ["python examples/swalp.py\n```", "(pictures/gallery/swalp.png)", "<!-- code: swalp.py -->", "| [swalp.py]"],
)
def test_an_example_that_the_gallery_lacks_is_seen(part: str) -> None:
    assert ungalleried(GALLERY.replace(part, "")) == ["swalp"]


def test_what_an_example_prints_is_recorded_without_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "┃ method ┃ loss ┃ ms per update ┃\n│ 2 ours │  1.5 │         0.123 │\n"
    (tmp_path / "examples").mkdir()
    printed = "print('epochs', os.environ['EPOCHS'], '1.5 ms, 2% of a step')"
    script = f"import os, sys\nsys.stdout.buffer.write({table!r}.encode())\n{printed}\n"
    (tmp_path / "examples" / "one.py").write_text(script)
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```bash\nEPOCHS=4 python examples/one.py\n```\n\n```text\nold\n```\n\nThe end.\n")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "PAGE", page)
    record.main(["one"])
    kept = "┃ method ┃ loss ┃ ms per update ┃\n│ 2 ours │  1.5 │             … │\nepochs 4 … ms, …% of a step\n"
    assert page.read_text().partition("```text\n")[2] == f"{kept}```\n\nThe end.\n"
    with pytest.raises(SystemExit, match="NAME must be one of one, got two"):
        record.main(["two"])


# The troubleshooting


class Net(nn.Sequential):
    def __init__(self, classes: int = 2) -> None:
        super().__init__(OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, classes)))


def provoke(folder: Path) -> dict[str, Callable[[], object]]:
    """Return for each message that one process can see, under its first words, what leads to it."""
    model = Net()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)

    def attached() -> None:
        new = FusedAveragedModel(model)
        with new.attach(sgd):
            sgd.step()
            new.update_parameters(model)

    def used_early() -> None:
        with FusedAveragedModel(model).swapped_into(model):
            pass

    def inside(call: Callable[[], object]) -> Callable[[], object]:
        def swapped() -> None:
            with averaged.swapped_into(model), torch.no_grad():
                call()

        return swapped

    def damaged() -> None:
        path = folder / "averaged.safetensors"
        swafast.save(averaged, path)
        path.write_bytes(path.read_bytes()[:-3] + b"???")
        swafast.load(averaged, path)

    def with_nan() -> None:
        ill = copy.deepcopy(model)
        nn.init.constant_(ill.body.weight, float("nan"))
        FusedAveragedModel(model, nonfinite="raise").update_parameters(ill)

    def with_lock() -> None:
        locked = Net()
        locked.lock = threading.Lock()  # type: ignore[assignment]
        FusedAveragedModel(locked)

    def in_the_middle() -> None:
        for param in model.parameters():
            sgd.state[param]["momentum_buffer"] = torch.zeros_like(param)
        FusedAveragedModel(model).attach(sgd)

    float8 = copy.deepcopy(model).to(torch.float8_e4m3fn)
    state = averaged.state_dict()
    return {
        "update_parameters was called": attached,
        "swapped_into uses": used_early,
        "the deviations of an average": lambda: FusedAveragedModel(model, deviations=2).attach(sgd, step=0),
        "decay=0.001": lambda: FusedAveragedModel(model, rule=ExponentialAverage(0.001)),
        "model must have the parameters": lambda: averaged.update_parameters(
            nn.Sequential(OrderedDict(body=model.body))
        ),
        "its names begin with 'inner.'": lambda: averaged.update_parameters(nn.Sequential(OrderedDict(inner=model))),
        "'head.weight' must have": lambda: averaged.update_parameters(Net(3)),
        "'body.weight' must be finite": with_nan,
        "'body.weight' must have a dtype": lambda: FusedAveragedModel(float8),
        "model and averages must not": inside(lambda: model.body.weight.add_(1)),
        "update_parameters must wait": inside(lambda: averaged.update_parameters(model)),
        "a step of the optimizer": inside(sgd.step),
        "this state has the model's": lambda: averaged.load_state_dict(model.state_dict()),
        "this state has no count": lambda: averaged.load_state_dict(
            {key: value for key, value in state.items() if key != "n_averaged"}
        ),
        "if the model has changed since": lambda: averaged.load_state_dict(FusedAveragedModel(Net(3)).state_dict()),
        "the state must have": lambda: FusedAveragedModel(model, deviations=20).load_state_dict(state),
        "averaged.safetensors": damaged,
        "attachment.step counts": in_the_middle,
        "steps_per_epoch": lambda: averaged.attach(sgd, every="1ep"),
        "model must be one that": with_lock,
        "backend='cuda'": lambda: FusedAveragedModel(model, backend="cuda"),
        "FusedAveragedModel.__init__()": lambda: FusedAveragedModel(model, decay=0.9),  # type: ignore[call-arg]
    }


#: Messages of ranks, frameworks and GPUs: their fixed words, and the file that has them.
ELSEWHERE = {
    "no update was made: ": "integrations/weight_average.py",
    " must not be captured in a CUDA graph: ": "terms/capturing.py",
    "the averages wait for an optimizer, that of ": "loop/attachment.py",
    " needs the same n_averaged on every rank, got ": "sharded/parts/ranks.py",
    " must be the same on all ranks that hold it alike": "sharded/construction.py",
    " must be the same on every rank, got for ": "sharded/parts/ranks.py",
}


def said_by(call: Callable[[], object]) -> str:
    """Return the error or the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return str(error)
    return "\n".join(str(each.message) for each in caught)


def quoted_messages(text: str) -> list[str]:
    return [" ".join(block.split()) for block in re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S)]


def test_quoted_messages_are_real(tmp_path: Path) -> None:
    left = quoted_messages(TROUBLES)
    for words, call in provoke(tmp_path).items():
        (message,) = (each for each in left if each.startswith(words))
        assert message in said_by(call)
        left.remove(message)
    for words, path in ELSEWHERE.items():
        (message,) = (each for each in left if words in each)
        assert words in (ROOT / "swafast" / path).read_text()
        left.remove(message)
    assert left == []


def test_a_message_that_has_changed_is_seen(tmp_path: Path) -> None:
    (message,) = (each for each in quoted_messages(TROUBLES) if each.startswith("'head.weight' must have"))
    assert message in said_by(provoke(tmp_path)["'head.weight' must have"])
    assert message.replace("shape", "size") not in said_by(provoke(tmp_path)["'head.weight' must have"])
