"""The floors: imports only go down, importing is light, and the C interface knows neither torch nor Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from tests import structure

ROOT = Path(__file__).parents[1]
FOLDERS = ("swafast", "bench", "tests", "examples")


def sources_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.py"))}


SOURCES = sources_of(ROOT / "swafast")

# A small package that keeps every rule, with imports of every form.
CLEAN = {
    "__init__.py": (
        'from typing import TYPE_CHECKING\n_LAZY = {"Model": "average.model"}\n'
        "if TYPE_CHECKING:\n    from .average.model import Model\n"
    ),
    "__main__.py": "from .cli import app\napp()\n",
    "cli.py": "from . import __version__, doctor\nfrom .demo import settings\ndef main(): ...\n",
    "doctor.py": "import swafast\nfrom swafast.backends import library\ndef describe(): ...\ndef main(): ...\n",
    "demo/__init__.py": "from swafast import Model\n",
    "demo/settings.py": "from .. import Model\nfrom .pictures import curve\n",
    "demo/pictures/curve.py": "from ... import sharded\ndef describe(): ...\n",
    "sharded/__init__.py": "from .states import ShardedStates\n",
    "sharded/states.py": "from .parts.spread import Spread\nimport torch.distributed as dist\ndist.get_rank()\n",
    "sharded/parts/__init__.py": "",
    "sharded/parts/spread.py": "import importlib\nimportlib.import_module('...average.model', package=__package__)\n",
    "average/__init__.py": "",
    "average/model.py": (
        "from torch import nn\nfrom ..op import plan\nfrom ..op.plan import Plan as P\n"
        "class Model(nn.Module):\n    def _apply(self, fn):\n        return super()._apply(fn)\n"
    ),
    "op/__init__.py": "from . import checks\n",
    "op/plan.py": "def plan():\n    from ..backends import choose\n    from ..torch_private.hooks import *\n",
    "op/checks.py": "import torch\nfrom . import plan\ntorch._foreach_lerp_\ntorch.__version__\n",
    "backends/__init__.py": "def describe(): ...\ndef prepare(): ...\n",
    "backends/library.py": "from ..terms.weight import Weight\n",
    "backends/triton/__init__.py": "from .. import library\ndef prepare(): ...\n",
    "loop/__init__.py": "",
    "loop/attach.py": "import torch.nn.parallel\n",
    "terms/__init__.py": "",
    "terms/weight.py": "class Weight: ...\n",
    "terms/rule.py": "from .weight import Weight\nWeight.__dict__['power']\n",
    "torch_private/__init__.py": "",
    "torch_private/hooks.py": "import torch._dynamo\ndef modules(module):\n    return module._modules\n",
}
LATE = "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
PLANTED = {
    "up to a class of a module": ("op/plan.py", "from ..sharded.states import S", " -> sharded/states.py: up"),
    "up inside a function": ("backends/library.py", "def f():\n    from ..op import plan", " -> op/plan.py: up"),
    "up inside try": ("op/plan.py", "try: import swafast.average.model\nexcept E: ...", " -> average/model.py: up"),
    "up under TYPE_CHECKING": ("op/plan.py", f"{LATE}from ..average.model import M", " -> average/model.py: up"),
    "up by a whole name": ("terms/rule.py", "import swafast.op.checks as c", " -> op/checks.py: up"),
    "up by an attribute": (
        "op/checks.py",
        "import swafast.terms.rule\nswafast.average.model.f()",
        " -> average/model.py: up",
    ),
    "up by importlib": ("loop/attach.py", "importlib.import_module('swafast.op')", " -> op/__init__.py: up"),
    "up by importlib, from a package": (
        "loop/attach.py",
        "import_module('.plan', package='swafast.op')",
        " -> op/plan.py: up",
    ),
    "up by __import__": ("terms/rule.py", "__import__('swafast.loop.attach')", " -> loop/attach.py: up"),
    "up by a star": ("op/plan.py", "from ..sharded.states import *", " -> sharded/states.py: up"),
    "up to a folder": ("average/model.py", "from .. import sharded", " -> sharded/__init__.py: up"),
    "up from a nested folder": ("sharded/parts/spread.py", "from .. import f", " -> sharded/__init__.py: up"),
    "up to the root package": ("terms/rule.py", "import swafast", " -> __init__.py: up"),
    "up to a name of the root package": ("op/plan.py", "from .. import Model", " -> __init__.py: up"),
    "up from the demo to a face": ("demo/pictures/curve.py", "from ...doctor import f", " -> doctor.py: up"),
    "up to Triton": ("backends/library.py", "from .triton import f", " -> backends/triton/__init__.py: up"),
    "sideways to the backends": ("loop/attach.py", "from ..backends import f", " -> backends/__init__.py: sideways"),
    "sideways to the loop": ("backends/library.py", "from ..loop import attach", " -> loop/attach.py: sideways"),
    "an unknown folder": ("utilities/text.py", "from ..terms.rule import f", " -> terms/rule.py: unknown folder"),
    "torch's private module": ("op/plan.py", "from torch._C import x", ": torch._C"),
    "torch's private class": ("op/plan.py", "from torch import nn\nnn.modules._Norm", ": torch.nn.modules._Norm"),
    "torch's private name, imported": ("op/plan.py", "from torch.x import _y", ": torch.x._y"),
    "torch's private module, by getattr": ("op/plan.py", "import torch as t\ngetattr(t, '_C')", ": torch._C"),
    "torch's private module, by its key": ("op/plan.py", "sys.modules['torch._dynamo']", ": torch._dynamo"),
    "a private attribute": ("average/model.py", "def f(m):\n    del m.child._modules['x']", ": ._modules"),
    "a private attribute, by getattr": ("loop/attach.py", "getattr(module, '_buffers')", ": ._buffers"),
    "a private attribute, by setattr": ("cli.py", "object.__setattr__(module, '_base', 1)", ": ._base"),
    "a private attribute, by its key": ("op/plan.py", "m.__dict__['_spec']", ": ._spec"),
    "a private attribute, by a look-up": ("op/plan.py", "m.__dict__.get('_modules')", ": ._modules"),
    "a private attribute, by membership": ("op/plan.py", "'_handle' in vars(m)", ": ._handle"),
    "ranks by an attribute": ("op/plan.py", "import torch as t\nt.distributed.barrier()", ": torch.distributed"),
    "ranks inside a function": ("op/plan.py", "def f():\n    from torch import distributed", ": torch.distributed"),
    "ranks from a module below": ("average/model.py", "from torch.distributed.fsdp import x", ": torch.distributed"),
}
PLANTED_CIRCLES = {
    "two modules of one folder": (
        {"terms/weight.py": "def f():\n    from . import rule"},
        "terms/rule.py -> terms/weight.py -> terms/rule.py",
    ),
    "a folder and its module": (
        {"op/plan.py": "from . import f"},
        "op/__init__.py -> op/checks.py -> op/plan.py -> op/__init__.py",
    ),
    "three modules, over TYPE_CHECKING": (
        {"terms/weight.py": f"{LATE}from .draws import Draw", "terms/draws.py": "import swafast.terms.rule"},
        "terms/draws.py -> terms/rule.py -> terms/weight.py -> terms/draws.py",
    ),
}


def planted(additions: dict[str, str]) -> list[str]:
    return structure.report({**CLEAN, **{path: CLEAN.get(path, "") + text for path, text in additions.items()}})


def test_the_package_keeps_the_rules() -> None:
    assert structure.report(SOURCES) == []


def test_every_folder_is_a_floor() -> None:
    assert {structure.folder_of(path) for path in SOURCES} <= structure.DEPTHS.keys()
    faces = {path for path in SOURCES if "/" not in path} - {"__init__.py", "__main__.py"}
    assert len(faces) <= 6, faces


def test_a_tree_that_keeps_the_rules_is_not_reported() -> None:
    assert structure.report(CLEAN) == []
    assert structure.imported_modules("sharded/parts/spread.py", CLEAN) == {"average/model.py"}
    assert structure.imported_modules("op/plan.py", CLEAN) == {"backends/__init__.py", "torch_private/hooks.py"}


@pytest.mark.parametrize(("path", "text", "wrong"), PLANTED.values(), ids=PLANTED)
def test_planted_imports_are_seen(path: str, text: str, wrong: str) -> None:
    reported = [line for line in planted({path: text}) if not line.startswith("circle")]
    assert reported == [f"{path}{wrong}"]


@pytest.mark.parametrize(("additions", "circle"), PLANTED_CIRCLES.values(), ids=PLANTED_CIRCLES)
def test_planted_circles_are_seen(additions: dict[str, str], circle: str) -> None:
    assert planted(additions) == [f"circle: {circle}"]


def test_planted_names_that_two_share_are_seen() -> None:
    assert planted({"loop/rule.py": ""}) == ["module rule: loop/rule.py, terms/rule.py"]
    assert planted({"op/plan.py": "class Weight: ..."}) == ["Weight: op/plan.py, terms/weight.py"]
    assert planted({"op/plan.py": "def describe(): ..."}) == ["describe: doctor.py, op/plan.py"]


def test_every_class_has_its_word_in_the_glossary() -> None:
    assert structure.wrong_words(SOURCES) == []


def test_planted_words_are_seen() -> None:
    def wrong(path: str, old: str, new: str) -> list[str]:
        assert old in SOURCES[path]
        return structure.wrong_words({**SOURCES, path: SOURCES[path].replace(old, new, 1)})

    glossary = "terms/__init__.py"
    slot = "    slot              where"
    assert wrong("op/plan.py", "class Plan(", "class Scheme:\n    pass\n\n\nclass Plan(") == ["op/plan.py: Scheme"]
    assert wrong(glossary, slot, f"    mirage            where\n{slot}") == ["mirage: not in the code"]
    assert wrong(glossary, slot, "    mirage            where") == ["terms/layout.py: Slot", "mirage: not in the code"]
    assert wrong(glossary, slot, f"    slots             many\n{slot}") == ["slot: twice"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_what_a_thing_does(folder: str) -> None:
    assert structure.wrong_docstrings(sources_of(ROOT / folder)) == []


def test_no_two_tests_repeat_a_block() -> None:
    assert structure.shared_blocks(sources_of(ROOT / "tests")) == []


def test_planted_docstrings_and_blocks_are_seen() -> None:
    planted_docstring = {
        "a.py": 'class A:\n    def b(self):\n        """Give the\n        sum."""\n',
        "b.py": '"""Givens."""',
    }
    assert structure.wrong_docstrings(planted_docstring) == ["a.py: Give the"]
    block = "".join(f"a_name_of_some_length_{n} = {n}\n" for n in range(6))
    assert structure.shared_blocks({"a.py": f"import re\n\n{block}", "b.py": f"def f():\n{indent(block, '    ')}"}) == [
        "a.py:3, b.py:2"
    ]
    assert structure.shared_blocks({"a.py": block, "b.py": block.replace("5", "6")}) == []


def test_contributing_lists_every_module_and_no_other() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    listed = structure.listed_modules(page)
    assert sorted({*listed}) == sorted(SOURCES)
    assert len(listed) == len({*listed})
    depths = [structure.DEPTHS[path.partition("/")[0] if "/" in path else ""] for path in listed]
    assert depths == sorted(depths), "the listing goes from the top floor down"
    without = page.replace("  plan.py ", "  plans.py ")
    assert set(SOURCES) ^ {*structure.listed_modules(without)} == {"op/plan.py", "op/plans.py"}


KERNELS = sorted(path for path in (ROOT / "csrc").rglob("*.[ch]*") if path.parent.name != "python")


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_the_kernels_know_neither_torch_nor_python(path: Path) -> None:
    included = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
    assert not [name for name in included if re.search(r"torch|ATen|c10|Python\.h|pybind", name)]


def test_modules_stay_small_enough_to_read() -> None:
    lengths = {path: len(source.splitlines()) for path, source in SOURCES.items()}
    assert {path: length for path, length in lengths.items() if length > 350} == {}


def run_python(check: str) -> None:
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(
    "module", ["swafast", "swafast.terms", "swafast.terms.weight", "swafast.backends", "swafast.backends.library"]
)
def test_loader_and_weights_import_no_torch(module: str) -> None:
    run_python(
        f"import sys; sys.modules['torch'] = None; import {module}\n"
        "loaded = [name for name, module in sys.modules.items() if name.startswith('torch') and module]\n"
        "assert not loaded, loaded\n"
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    run_python(
        "import sys; before = set(sys.modules); import swafast\n"
        "heavy = {'torch', 'typer', 'rich', 'triton', 'numpy'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
        "import swafast.cli; heavy = {'torch', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_importing_loads_no_kernel_and_no_compiler() -> None:
    run_python(
        "import sys, torch; before = set(sys.modules); from swafast import FusedAveragedModel\n"
        "from swafast.backends import library\n"
        "heavy = {'triton', 'torch._dynamo', 'torch._inductor', 'sklearn', 'matplotlib', 'typer', 'rich'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)\n"
        "assert library.load.cache_info().currsize == 0\n"
    )
