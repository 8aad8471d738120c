"""Files with the marker `frameworks` are imported only if these tests are asked for, and then nothing is skipped."""

from __future__ import annotations

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
    is_marked = collection_path.suffix == ".py" and "pytest.mark.frameworks" in collection_path.read_text()
    return True if is_marked and collection_path.stem.startswith("test_") and not _are_wanted(config) else None
