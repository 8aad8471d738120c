"""Lightning: the kit, and what is Lightning's own."""

from __future__ import annotations

import pytest

from tests.frameworks.kit import Kit
from tests.frameworks.lightning_kit import Lightning

pytestmark = pytest.mark.frameworks


class TestLightning(Kit):
    framework = Lightning()
