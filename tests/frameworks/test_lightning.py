"""Lightning: the kit, and what is Lightning's own."""

from __future__ import annotations

import pytest

from tests.frameworks.kit import Kit, Resumes
from tests.frameworks.lightning_kit import Ddp, Fsdp2, Lightning, WholeFiles

pytestmark = pytest.mark.frameworks


class TestLightning(Kit):
    framework = Lightning()


class TestDdp(Resumes):
    framework = Ddp()
    kinds = ("float32",)


class TestFsdp2(Resumes):
    framework = Fsdp2()

    test_a_checkpoint_without_averages_begins_a_fresh_one = Kit.test_a_checkpoint_without_averages_begins_a_fresh_one


class TestWholeFiles(Resumes):
    framework = WholeFiles()
    kinds = ("float32", "compact")
