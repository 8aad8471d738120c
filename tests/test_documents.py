"""The documents: their code runs, their links and commands lead somewhere, and their lines are short."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import swafast
from swafast.terms.formats import EXACT
from tests.kernels import FORMATS
from tests.ranks import run_ranks
from tests.sharded_models import can_run
from tests.support import run_example
from tests.test_accuracy import frozen_and_moving

ROOT = Path(__file__).parents[1]
INDEX = "docs/README.md"
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *PAGES]
TEXTS = {page: (ROOT / page).read_text() for page in DOCUMENTS}

#: Pages whose blocks need a process group, and how many models their last average has: they run on two gloo ranks.
ON_RANKS = {
    "docs/sharded.md": 2,
    "docs/averages.md": 2,
    "docs/growing.md": 0,
    "docs/recipes/swap.md": 2,
    "docs/recipes/teachers.md": 3,
}
#: Those whose models under FSDP2 run forward.
WITH_FSDP2 = ("docs/recipes/teachers.md",)
#: The first line of a block that is a program of its own: tests/test_sharded_program.py runs it.
PROGRAM = "# train.py\n"
#: Pages whose blocks need a framework: its file in tests/frameworks runs them.
WITH_FRAMEWORKS = "docs/frameworks/"
#: Pages that average in the last quarter of a training, so it must have some epochs.
LATE = tuple(
    f"docs/recipes/{name}.md" for name in ("swag", "swag_diagonal", "multiswa", "multiswag", "subspace", "swalp")
)
#: Blocks that need a CUDA device. They run with torch's graphs replaced by ones that run their body at once.
WITH_GRAPHS = {("docs/gpu.md", 0)}

README_LINES = 130
COLUMNS = 120
CELL_WORDS = 12
TEST_FILES = sorted((ROOT / "tests").glob("test_*.py"))


def blocks_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def written_by_hand(text: str) -> str:
    """The text without the blocks that `python -m bench pages` fills; their lines keep their numbers."""
    return re.sub(
        r"<!-- (\w+):begin -->.*?<!-- \1:end -->", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL
    )


# Code


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.body(batch)


def reader(batches: int = 2) -> dict[str, Any]:
    """What a reader has beside a page: a model, its optimizer, a loader and the functions of a training loop."""
    torch.manual_seed(20)
    model = Net()
    sgd = torch.optim.SGD(model.parameters(), 0.01)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    def train_step(model: nn.Module, batch: torch.Tensor, optimizer: torch.optim.Optimizer = sgd) -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    loader = [torch.randn(3, 4) for _ in range(batches)]
    return {
        "torch": torch,
        "model": model,
        "plain_model": Net(),
        "optimizer": sgd,
        "loader": loader,
        "dataset": torch.randn(6, 4),
        "is_accurate": lambda model: True,
        "test_inputs": torch.randn(5, 4),
        "held_out_inputs": torch.randn(5, 4),
        "held_out_labels": torch.tensor([0, 1, 1, 0, 1]),
        "epochs_of": lambda loader: list(loader) * 12,
        "loss": loss,
        "train_step": train_step,
        "evaluate": lambda *given: given[-1].eval()(loader[0]),
        "total_steps": 100,
        "num_epochs": 2,
        "folder": Path("checkpoint"),
    }


def run_blocks(page: str, text: str, scope: dict[str, Any]) -> dict[str, Any]:
    """Run a page's blocks in order in one namespace, as a reader would."""
    for number, block in enumerate(blocks_of(text)):
        if block.startswith(PROGRAM):
            continue
        code = compile(block, f"{page}, block {number}", "exec")
        with graphs_on_the_cpu() if (page, number) in WITH_GRAPHS else contextlib.nullcontext():
            exec(code, scope)
    return scope


@contextlib.contextmanager
def graphs_on_the_cpu() -> Iterator[None]:
    """torch.cuda's graphs, replaced by ones that run their body at once; names of ours are the real ones."""

    class Graph:
        def replay(self) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
        yield


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in DOCUMENTS
        if blocks_of(TEXTS[page]) and page not in ON_RANKS and not page.startswith(WITH_FRAMEWORKS)
    ],
)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = reader(batches=1000 if page == "docs/posthoc.md" else 2)
    if page in LATE:
        epochs = 32 if page.endswith("subspace.md") else 12  # five directions need more models
        scope |= {"num_epochs": epochs, "total_steps": epochs * len(scope["loader"])}
    run_blocks(page, TEXTS[page], scope)


def _on_rank(texts: dict[str, str], folder: Path) -> list[int]:
    scopes = [run_blocks(page, text, reader() | {"folder": folder / Path(page).stem}) for page, text in texts.items()]
    return [int(scope["averaged"].n_averaged) for scope in scopes]


@pytest.mark.distributed
def test_the_code_of_pages_on_ranks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pages = [page for page in ON_RANKS if page not in WITH_FSDP2 or can_run("fsdp2", forward=True)]
    counts = run_ranks(2, _on_rank, {page: TEXTS[page] for page in pages}, tmp_path)
    assert counts == [[ON_RANKS[page] for page in pages]] * 2
    # What the ranks have saved, in one process without a process group.
    assert not torch.distributed.is_initialized()
    (alone,) = (block for block in blocks_of(TEXTS["docs/sharded.md"]) if "(plain_model).state_dict()" in block)
    scope = reader() | {"folder": tmp_path / "sharded"}
    with pytest.warns(UserWarning, match="single process"):
        exec(alone, scope)
    assert int(scope["alone"].n_averaged) == 2


@pytest.mark.parametrize("wrong", ["model.no_such_name", "averaged.swapped_in(model)", "import swafast.nothing"])
def test_a_block_that_is_wrong_is_seen(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = TEXTS["README.md"].replace("        evaluate(model)\n", f"        {wrong}\n")
    assert text != TEXTS["README.md"]
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        run_blocks("README.md", text, reader())


def test_what_diffs_import_is_there() -> None:
    named = [
        names for text in TEXTS.values() for names in re.findall(r"^\+from swafast import (.*)$", text, re.MULTILINE)
    ]
    assert named
    for names in named:
        for name in names.split(","):
            assert hasattr(swafast, name.strip()), name


def test_the_loop_of_the_readme_saves_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run_blocks("README.md", TEXTS["README.md"], reader())
    saved = torch.load("checkpoint.pt")
    assert saved["averaged"]["n_averaged"] == 4
    swafast.load(scope["averaged"], "averaged.safetensors")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("forgotten", ["", 'done = saved["done"]', "part.load_state_dict(saved[name])"])
def test_the_readmes_loop_resumes_bit_for_bit(forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks_of(TEXTS["README.md"])[0]
    assert forgotten in block

    def evaluate(*given: Any) -> None:
        given[-1].eval()(torch.ones(3, 4))
        given[-1].train()

    def bits(code: str, folder: str, num_epochs: int) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        exec(code, scope := reader() | {"num_epochs": num_epochs, "evaluate": evaluate})
        return scope["averaged"].state_dict() | scope["model"].state_dict()

    straight = bits(block, "straight", 4)
    bits(block, "stopped", 2)
    resumed = bits(block.replace(forgotten, "pass") if forgotten else block, "stopped", 4)
    assert all(torch.equal(straight[key], resumed[key]) for key in straight) == (not forgotten)


# Figures


def test_the_readmes_three_numbers_are_those_of_the_test() -> None:
    right, ours, theirs = frozen_and_moving()
    words = " ".join(TEXTS["README.md"].split())
    assert f"The right result is {right:.4f}. swafast has {ours:.4f}." in words
    assert f"stays at {theirs:.4f}." in words


#: A row of docs/costs.md: a format, the bytes it keeps, and those moved of a model of float32, and of one of 16 bits.
BYTES_ROW = re.compile(r"^\| `(\w+)` \| [\w ]*\| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def test_the_bytes_of_each_format_are_those_of_its_planes() -> None:
    rows = {name: [int(figure) for figure in figures] for name, *figures in BYTES_ROW.findall(TEXTS["docs/costs.md"])}
    kept = {format.name: format.nbytes or 0 for format in FORMATS}
    assert rows == {name: [each, 4 + 2 * each, 2 + 2 * each] for name, each in kept.items()}


def test_the_example_of_costs_is_computed() -> None:
    kept, params, ranks = EXACT.nbytes or 0, 7, 8
    for name, whole in (("memory of the average", params * kept), ("moved by an update", params * (2 + 2 * kept))):
        assert f"| {name} | {whole} GB | {whole / ranks:g} GB |" in TEXTS["docs/costs.md"]


# Form


def too_long(page: str, text: str) -> list[str]:
    """Lines over 120 columns; of pages other than the README without the tables that a script writes."""
    lines = (text if page == "README.md" else written_by_hand(text)).splitlines()
    return [f"{page}:{number}" for number, line in enumerate(lines, 1) if len(line) > COLUMNS]


def wordy(page: str, text: str) -> list[str]:
    """Cells of tables with more words than a glance takes in."""
    rows = [line for line in written_by_hand(text).splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    return [f"{page}: {cell}" for cell in cells if len(re.sub(r"\]\([^)]*\)|`[^`]*`", "x", cell).split()) > CELL_WORDS]


def anchors_of(text: str) -> set[str]:
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: str, text: str) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
            dead.append(f"{page}: {link}")
    return dead


def missing_from_index(text: str) -> list[str]:
    linked = {os.path.normpath(Path(INDEX).parent / link) for link in re.findall(r"\]\(([^)#\s]+)", text)}
    return [page for page in PAGES if page != INDEX and page not in linked]


def lost_commands(page: str, text: str) -> list[str]:
    """Files that a command of a page names and the repository lacks, and tests that ``-k`` would not find."""
    lost = []
    for path in re.findall(r"\b((?:examples|bench|tests|docs)/[\w/.]+\.(?:py|sh|md|json|png))", text):
        if not any((folder / path).exists() for folder in (ROOT, (ROOT / page).parent)):
            lost.append(f"{page}: {path}")
    for path, quoted, word in re.findall(r"pytest (tests/\w+\.py) -k (?:\"([^\"]*)\"|(\w+))", text):
        for each in (quoted or word).split(" or "):
            if (ROOT / path).exists() and each not in (ROOT / path).read_text():
                lost.append(f"{page}: {path} -k {each}")
    for word in re.findall(r"pytest -m \w+ -k (\w+)", text):
        if not any(re.search(rf"^def test_\w*{word}", file.read_text(), re.MULTILINE) for file in TEST_FILES):
            lost.append(f"{page}: -k {word}")
    return lost


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= README_LINES


@pytest.mark.parametrize("check", [too_long, wordy, dead_links, lost_commands])
def test_documents_have_no_fault(check: Callable[[str, str], list[str]]) -> None:
    assert [fault for page in DOCUMENTS for fault in check(page, TEXTS[page])] == []


def test_every_page_is_in_the_index() -> None:
    assert missing_from_index(TEXTS[INDEX]) == []


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (too_long, "x" * 121),
        (wordy, "| a | a table with so many words in one cell that nobody reads it |"),
        (dead_links, "[page](nowhere.md)"),
        (dead_links, "[heading](README.md#nowhere)"),
        (lost_commands, "`python examples/nothing.py`"),
        (lost_commands, "`pytest tests/test_accuracy.py -k nothing_of_the_kind`"),
        (lost_commands, "`pytest -m kernels -k nothing_of_the_kind`"),
    ],
)
def test_planted_faults_are_seen(check: Any, wrong: str) -> None:
    assert len(check("README.md", f"{TEXTS['README.md']}\n{wrong}\n")) == 1


#: The methods that the posts of SWA's authors on pytorch.org name, of 2019-04-29 and of 2020-08-18, and where the index
#: leads for each; nowhere, if it is not here.
POSTS = {
    "torch's SWA": "recipes/swalr.md",
    "torchcontrib's SWA": "recipes/torchcontrib.md",
    "averaged SGD": "recipes/swalr.md",
    "EMA": "averaged_model.md",
    "Adam": "recipes/swalr.md",
    "cyclical": "recipes/fast_swa.md",
    "fast-SWA": "recipes/fast_swa.md",
    "semi-supervised": "recipes/fast_swa.md",
    "reinforcement learning": "recipes/swalr.md",
    "FGE": "recipes/fge.md",
    "SWAG": "recipes/swag.md",
    "deep ensemble": "recipes/multiswa.md",
    "MultiSWA": "recipes/multiswa.md",
    "MultiSWAG": "recipes/multiswag.md",
    "MC dropout": "",
    "KFAC Laplace": "",
    "temperature scaling": "",
    "Subspace inference": "recipes/subspace.md",
    "SWALP": "recipes/swalp.md",
    "SWAP": "recipes/swap.md",
    "SQWA": "recipes/sqwa.md",
}


def words_of(line: str) -> str:
    """A line in lower case, without the targets of its links."""
    return re.sub(r"\]\([^)]*\)", "]", line).lower()


def missing_methods(text: str) -> list[str]:
    """Methods of the posts that no line of the section on recipes names beside a link to their page."""
    lines = text.partition("## Recipes")[2].partition("## Examples")[0].splitlines()

    def is_named(method: str, page: str) -> bool:
        return any(re.search(rf"\b{method.lower()}", words_of(line)) and page in line for line in lines)

    # The pages of some methods are written elsewhere. Once they are here, the index must have them.
    return [method for method, page in POSTS.items() if (ROOT / "docs" / page).exists() and not is_named(method, page)]


def test_the_index_has_every_method_that_the_authors_of_swa_name() -> None:
    assert missing_methods(TEXTS[INDEX]) == []


@pytest.mark.parametrize("method", ["SWAP", "averaged SGD", "MC dropout"])
def test_a_method_that_the_index_lacks_is_seen(method: str) -> None:
    assert missing_methods(TEXTS[INDEX].replace(method, "x")) == [method]


def test_a_page_that_the_index_lacks_is_seen() -> None:
    assert missing_from_index(TEXTS[INDEX].replace("(gpu.md", "(speed.md")) == ["docs/gpu.md"]


@pytest.mark.parametrize("package", ["torchmetrics", "matplotlib", "sklearn"])
def test_the_example_of_swag_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "calibration", raising=False)
    for name in (package, *(each for each in sys.modules if each.startswith(f"{package}."))):
        monkeypatch.setitem(sys.modules, name, None)  # so an import of it fails
    with pytest.raises(SystemExit, match=rf"{package}.*: pip install '\.\[swag\]'"):
        run_example("swag", monkeypatch)


@pytest.mark.parametrize("name", ["attach", "digits", "merging", "recipes", "sqwa", "swalp"])
def test_an_example_that_is_too_short_ends_with_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, words in (("3", "epochs must be at least 4, got 3"), ("x", "invalid literal")):
        monkeypatch.setenv("EPOCHS", value)
        with pytest.raises(SystemExit, match=f"EPOCHS does not fit: {words}"):
            run_example(name, monkeypatch)
