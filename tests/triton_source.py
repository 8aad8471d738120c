"""The source of the Triton kernels, imported anew: as it is, or with bugs in it. Imports neither torch nor Triton."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from tests.planting import read_sources

ROOT = Path(__file__).parents[1]
PARTS = ("arithmetic", "random", "memory", "paces", "chunks", "normal", "tiles", "spreads", "kernels")


def read_kernels() -> dict[str, str]:
    """Return the modules of the kernels, ``<part>.py`` -> source."""
    sources = read_sources(ROOT / "swafast" / "backends" / "triton", ".py")
    return {path: sources[path] for path in (f"{part}.py" for part in PARTS)}


def import_kernels(folder: Path, sources: Mapping[str, str]) -> dict[str, ModuleType]:
    """Import sources as modules of ``swafast.backends.triton``, by their parts. Triton reads the files again."""
    made, suffix = {}, folder.name.replace(" ", "_")
    folder.mkdir(exist_ok=True)
    for part in PARTS:
        source, name = sources[f"{part}.py"], f"{part}_{suffix}"
        for other in PARTS:
            source = source.replace(f"from .{other} import", f"from .{other}_{suffix} import")
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"swafast.backends.triton.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        made[part] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made[part])
    return made


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """Have the interpreter put its functions into the language at each launch, and not at each call within one.

    That took two thirds of the time of the kernels, and puts in what is there already.
    """
    interpreted_function = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    call = interpreted_function.__call__

    def call_ours(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.fn.__module__.startswith("swafast."):
            return self.rewrite()(*args, **kwargs)
        return call(self, *args, **kwargs)

    patch.setattr(interpreted_function, "__call__", call_ours)
