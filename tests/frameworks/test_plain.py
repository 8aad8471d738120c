"""The acceptance kit with a loop in plain torch: the contract itself, without a framework."""

from __future__ import annotations

from tests.frameworks.kit import Kit
from tests.frameworks.plain import Plain


class TestPlain(Kit):
    framework = Plain()
