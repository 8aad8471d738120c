"""Composer: the kit, and what is Composer's own."""

from __future__ import annotations

import pytest

from tests.frameworks.composer_kit import Composer, Ddp, Fsdp2, Sharded
from tests.frameworks.kit import Kit, Resumes

pytestmark = pytest.mark.frameworks


class TestComposer(Kit):
    framework = Composer()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()
    kinds = ("float32",)


class TestSharded(Resumes):
    framework = Sharded()
    kinds = ("float32",)
