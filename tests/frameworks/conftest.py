"""Files whose tests all have the marker `frameworks` are imported only if these are asked for. Then none is skipped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.frameworks.shims import shim_torchvision, stay_offline
from tests.ranks import starter


def _are_wanted(config: pytest.Config) -> bool:
    return "frameworks" in config.option.markexpr.replace("not frameworks", "")


def pytest_configure(config: pytest.Config) -> None:
    if _are_wanted(config):
        stay_offline()
        shim_torchvision()
        starter.set_forkserver_preload(["tests.ranks_preload", "tests.frameworks.ranks_preload"])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if _are_wanted(config) or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    return True if re.search(r"^pytestmark = \[?pytest\.mark\.frameworks\b", text, re.MULTILINE) else None
