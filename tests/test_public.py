"""The public names: lazy, complete, typed for editors, the same in every pickle."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pickle
import pickletools
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import swafast
from swafast.optim import SWA, BlockRounding, LowPrecisionMean, cyclical_cosine_lr, cyclical_lr

ROOT = Path(__file__).parents[1]
#: Packages whose names a pickle may hold: they stay when modules move.
PACKAGES = ("swafast", "swafast.optim", "swafast.posthoc", "swafast.sharded")


def run(code: str) -> str:
    """Run code in a new interpreter, in the clone, and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dir_is_the_public_names() -> None:
    assert dir(swafast) == sorted([*swafast.__all__, "convert", "files", "optim", "posthoc", "sharded"])
    assert all(getattr(swafast, name) is not None for name in dir(swafast))
    with pytest.raises(AttributeError, match="module 'swafast' has no attribute 'FusedAverage'"):
        swafast.FusedAverage  # noqa: B018


def test_what_editors_see_is_what_is_there() -> None:
    tree = ast.parse((ROOT / "swafast" / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname or alias.name: node.module
        for node in ast.walk(typed)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {**swafast._PUBLIC, **dict.fromkeys(swafast._PACKAGES)}
    assert seen == lazy
    assert {*swafast._PUBLIC, "__version__"} == set(swafast.__all__)


def test_packages_resolve_after_an_import_of_the_root() -> None:
    code = "import swafast; print(swafast.optim.SWA.__name__, swafast.sharded.LostPeerError.__name__)"
    assert run(code).split() == ["SWA", "LostPeerError"]


def test_the_op_is_there_with_the_first_public_name() -> None:
    code = """
import os, sys, torch, swafast
import torch.distributed.checkpoint, torch.distributed.tensor  # once, and not in each of the children
assert not hasattr(torch.ops.swafast, "update_")
for name in [*{module: name for name, module in swafast._PUBLIC.items()}.values(), *swafast._PACKAGES]:
    if os.fork() == 0:  # each touches one name alone, one of each module
        getattr(swafast, name)
        os._exit(hasattr(torch.ops.swafast, "update_") == (name == "files"))  # which needs no torch
    assert os.wait()[1] == 0, name
print("seen")
"""
    assert run(code) == "seen\n"


def test_threads_may_import_at_once() -> None:
    code = """
import importlib, os, sys, threading, torch, swafast
sys.setswitchinterval(1e-5)
def touch(name, barrier):
    barrier.wait()
    try:
        importlib.import_module(name) if "." in name else getattr(swafast, name)
    except BaseException as error:
        print(name, repr(error))
        os._exit(1)
pairs = [("ShardedAverages", "Snapshots"), ("Snapshots", "sharded"), ("swafast.sharded", "Snapshots")]
for names in [*pairs, ("swafast.optim.torchcontrib", "update_bn")]:
    if os.fork() == 0:
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=touch, args=(name, barrier)) for name in names]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os._exit(0)
    assert os.wait()[1] == 0, names
print("seen")
"""
    assert run(code).endswith("seen\n")


@pytest.mark.parametrize("package", [swafast.optim, swafast.sharded], ids=lambda each: each.__name__)
def test_packages_have_what_they_name(package: Any) -> None:
    assert dir(package) == sorted(package.__all__)
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match=f"module {package.__name__!r} has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def test_help_answers_at_once_and_without_torch() -> None:
    code = "import sys; from swafast.cli import app\ntry: app(['--help'])\nfinally: print('torch' in sys.modules)"
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = run(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, not of the clock, which other processes move.
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "demo" in answer
        assert answer.endswith("False\n")
    assert min(took) < 0.5


def signature_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_show_every_argument() -> None:
    first = ["model", "device", "avg_fn", "multi_avg_fn", "use_buffers", "rule"]
    assert signature_of(swafast.FusedAveragedModel)[: len(first)] == first
    for one, several in (
        (swafast.FusedAveragedModel, swafast.FusedAverages),
        (swafast.ShardedAveragedModel, swafast.ShardedAverages),
    ):
        functions = {"avg_fn", "multi_avg_fn"}
        assert {*signature_of(one)} - functions - {"rule"} == {*signature_of(several)} - {"rules"}
        assert "__new__" not in one.__dict__


# Editors


#: Pages whose code an editor is asked about: together they use every public class.
PAGES = ("README.md", "docs/averages.md", "docs/posthoc.md", "docs/sharded.md")
#: What a reader has beside them.
SCOPE = """
from collections.abc import Callable
from pathlib import Path
import torch
model: torch.nn.Module
plain_model: torch.nn.Module
optimizer: torch.optim.Optimizer
total_steps: int
num_epochs: int
loader: list[torch.Tensor]
train_step: Callable[[torch.nn.Module, torch.Tensor], object]
evaluate: Callable[..., object]
folder: Path
"""


def blocks_of_pages() -> list[str]:
    texts = [(ROOT / page).read_text() for page in PAGES]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    # torch's own types leave open what new_group and async_save return.
    return [block for block in blocks if "async_save" not in block]


def reveal(blocks: Iterable[str]) -> str:
    """The blocks as one module that asks for the type of every name after it was assigned."""
    lines = ["import torch", "from scope import *"]
    for block in blocks:
        for node in ast.parse(block).body:
            lines += ast.unparse(node).splitlines()
            if isinstance(node, ast.Assign):
                lines += [f"reveal_type({ast.unparse(target)})" for target in node.targets]
    lines += ["reveal_type(averaged.update_parameters)", "reveal_type(averages['slow'])"]
    return "\n".join(lines)


def checked(source: str, folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Pyright's errors in a module, and (expression, type) for each type that it asks for."""
    (folder / "readme.py").write_text(source)
    (folder / "scope.pyi").write_text(SCOPE)
    command = [Path(sys.executable).parent / "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    config = {"extraPaths": [str(ROOT)], "include": ["readme.py"], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    told = json.loads(done.stdout)["generalDiagnostics"]
    types = [re.fullmatch(r'Type of "(.*)" is "(.*)"', each["message"], re.DOTALL) for each in told]
    return (
        # What torch does not export by itself is torch's.
        [
            each["message"]
            for each in told
            if each["severity"] == "error" and 'from module "torch.' not in each["message"]
        ],
        [(match[1], match[2]) for match in types if match is not None],
    )


def test_an_editor_finds_real_types_in_the_documents(tmp_path: Path) -> None:
    errors, types = checked(reveal(blocks_of_pages()), tmp_path)
    assert errors == []
    ours = {expression: set[str]() for expression, _ in types}
    for expression, kind in types:
        ours[expression].add(kind)
    assert ours["averaged"] == {"FusedAveragedModel", "ShardedAveragedModel"}
    assert ours["averages"] == {"FusedAverages", "ShardedAverages"}
    assert ours["averages['slow']"] == {"FusedAveragedModel"}
    assert ours["snapshots"] == {"Snapshots"}
    assert ours["averaged.update_parameters"] == {"(model: Module) -> None"}
    assert "dict[str, PowerAverage]" in ours["rules"]


def test_an_editor_sees_what_is_not_there(tmp_path: Path) -> None:
    errors, _ = checked("import swafast\nswafast.FusedAveragedModel(1, rule={})\nswafast.FusedAverage", tmp_path)
    assert len(errors) == 3


# Pickles


def made() -> dict[str, Any]:
    """One of each kind of object that a user may pickle whole."""
    model = torch.nn.Linear(2, 2).bfloat16()
    sgd = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), 0.1)
    averaged = swafast.FusedAveragedModel(model, rule=swafast.ExponentialAverage(0.9))
    averaged.update_parameters(model)
    averages = swafast.FusedAverages(model, rules={"fast": swafast.PowerAverage(), "slow": swafast.EqualAverage()})
    return {
        "averaged model": averaged,
        "compact": swafast.FusedAveragedModel(model, format="compact"),
        "several": averages,
        "kernel terms": swafast.PowerAverage().kernel_terms(),
        "schedule": averaged.attach(torch.optim.SGD(model.parameters(), 0.1)).schedule,
        "SWA": SWA(sgd, 1, 1),
        "cyclical": cyclical_lr(sgd, max_lr=0.1, min_lr=0.01, cycle=2),
        "cosine": cyclical_cosine_lr(sgd, max_lr=0.1, anneal=4, until=3, cycle=1),
        "rounding": BlockRounding(),
        "low precision mean": LowPrecisionMean(9),
        "error": importlib.import_module("swafast.sharded").LostPeerError("gone"),
    }


OF_THE_ROOT = ("averaged model", "compact", "several", "kernel terms", "schedule")
OF_PACKAGES = ("SWA", "cyclical", "cosine", "rounding", "low precision mean", "error")


def modules_in(pickled: bytes) -> set[str]:
    """The modules of ours that a pickle names."""
    words = [argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)]
    return {word.split(" ")[0] for word in words if word.split(" ")[0].split(".")[0] == "swafast"}


@pytest.mark.parametrize("what", [*OF_THE_ROOT, *OF_PACKAGES])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_name_packages_alone(what: str, protocol: int) -> None:
    pickled = pickle.dumps(made()[what], protocol)
    assert modules_in(pickled) <= {"swafast", *(PACKAGES if what in OF_PACKAGES else ())}
    assert type(pickle.loads(pickled)) is type(made()[what])


@pytest.mark.parametrize("name", [*swafast._PUBLIC, *swafast._PICKLED])
def test_annotations_resolve_although_classes_name_another_module(name: str) -> None:
    kind = getattr(swafast, name)
    assert kind.__module__ in ("swafast", "swafast.optim.batchnorm", "swafast.files.averaged_file")
    if not isinstance(kind, type):
        get_type_hints(kind)
    else:
        assert not [hint for hint in get_type_hints(kind).values() if isinstance(hint, str)]
        get_type_hints(kind.__init__)


def test_a_pickle_that_names_a_module_is_seen() -> None:
    class Moved:
        def __reduce__(self) -> Any:
            return importlib.import_module("swafast.op.buckets").lay_out, ([1], [None])

    assert modules_in(pickle.dumps(Moved())) == {"swafast.terms.layout"}


@pytest.mark.parametrize("module", ["averaged_model", "rules", "planes", "formats"])
def test_an_old_pickle_says_what_to_do(module: str) -> None:
    pickled = f"cswafast.{module}\nSomething\n.".encode()
    with pytest.raises(ModuleNotFoundError, match=rf"'swafast.{module}': it moved .* save its state_dict\(\)"):
        pickle.loads(pickled)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'swafast\.nonsense'"):
        pickle.loads(b"cswafast.nonsense\nSomething\n.")


def test_half_a_package_says_what_to_do(tmp_path: Path) -> None:
    package = tmp_path / "swafast"
    for path in (ROOT / "swafast").rglob("*.py"):
        copy = package / path.relative_to(ROOT / "swafast")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (package / "terms" / "formats.py").unlink()
    code = "import swafast\ntry: swafast.FusedAveragedModel\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "swafast.FusedAveragedModel needs the module swafast.terms.formats, which is not installed" in done.stdout
    assert "install swafast again" in done.stdout
