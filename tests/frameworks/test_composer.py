"""Composer: the kit, and what is Composer's own."""

from __future__ import annotations

import pytest

from tests.frameworks.composer_kit import Composer, Ddp
from tests.frameworks.kit import Kit, Resumes

pytestmark = pytest.mark.frameworks


class TestComposer(Kit):
    framework = Composer()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)
