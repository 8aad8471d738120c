"""The floors: imports only go down, importing is light, and the C interface knows neither torch nor Python."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "swafast"

FLOORS = {
    "_torch": 0,
    "_torch_distributed": 0,
    "locks": 0,
    "elementary": 1,
    "rules": 1,
    "profiles": 1,
    "boxes": 1,
    "draws": 1,
    "formats": 1,
    "names": 1,
    "bucket": 2,
    "backends": 2,
    "checks": 3,
    "checksum": 3,
    "choice": 3,
    "ops": 3,
    "plan": 3,
    "planes": 4,
    "matching": 4,
    "states": 4,
    "snapshots": 4,
    "functions": 4,
    "exchange": 4,
    "averaged_model": 4,
    "averages": 4,
    "batchnorm": 4,
    "schedule": 1,
    "shadow": 4,
    "optim": 5,
    "runners": 4,
    "attachment": 4,
    "attach": 4,
    "sharded": 4,
    "__init__": 5,
    "__main__": 5,
    "doctor": 5,
    "cli": 5,
    "demo": 5,
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path, source: str) -> set[str]:
    """Give the rooms of the package that a file imports, wherever in the file it does."""
    package = ("swafast", *path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "swafast" and len(parts) > 1:
                rooms.add(parts[1] if parts[1] in FLOORS else "__init__")
    return rooms


def upward_imports(path: Path, source: str) -> set[str]:
    own = FLOORS[room_of(path)]
    return {room for room in imported_rooms(path, source) if FLOORS[room] > own}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    assert upward_imports(path, path.read_text()) == set()


def test_an_import_that_goes_up_would_be_seen() -> None:
    planted = "def f():\n    from ..averaged_model import FusedAveragedModel\n"
    assert upward_imports(PACKAGE / "backends" / "native.py", planted) == {"averaged_model"}
    assert upward_imports(PACKAGE / "rules.py", "from . import ops") == {"ops"}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.[ch]*")), ids=lambda path: path.name)
def test_the_kernels_know_neither_torch_nor_python(path: Path) -> None:
    included = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
    assert not [name for name in included if re.search(r"torch|ATen|c10|Python\.h|pybind", name)]


def test_only_one_module_names_what_is_private_in_torch() -> None:
    private = re.compile(r"torch\._[a-z]\w*|torch\._C")
    allowed = {"torch._foreach_lerp_", "torch._foreach_copy_"}  # documented names of torch's multi-tensor functions
    for path in PACKAGE.rglob("*.py"):
        if not path.name.startswith("_torch"):
            assert set(private.findall(path.read_text())) <= allowed, path


def test_only_one_package_knows_of_ranks() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) not in ("sharded", "_torch_distributed", "_torch"):  # the last asks whether there are any
            assert "torch.distributed" not in path.read_text(), path


def test_only_one_module_names_what_is_private_in_dtensor_and_fsdp() -> None:
    private = re.compile(
        r"\._(local_tensor|local_shard|spec|handle|fqns|shard_param_infos|get_backend|inter_node_pg)\b"
    )
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_torch_distributed.py":
            assert private.findall(path.read_text()) == [], path


def test_modules_stay_small_enough_to_read() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_importing_loads_no_kernel_and_no_compiler() -> None:
    check = (
        "import sys, torch; before = set(sys.modules); import swafast\n"
        "from swafast.backends import library\n"
        "heavy = {'triton', 'torch._dynamo', 'torch._inductor', 'sklearn', 'matplotlib', 'typer', 'rich'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)\n"
        "assert library.load.cache_info().currsize == 0\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT, timeout=120)
