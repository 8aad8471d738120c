"""Clear errors for imports that fail: of modules that moved before the first release, which pickles of whole objects
may still name, and of names that other packages have.
"""

from __future__ import annotations

import sys

from .terms import hints

#: The packages from which users import names.
_PACKAGES = ("swafast", "swafast.integrations", "swafast.optim", "swafast.posthoc", "swafast.sharded")
_MOVED = ("averaged_model", "averages", "elementary", "formats", "planes", "profiles", "rules", "schedule", "snapshots")


class MovedFinder:
    """The last finder of ``sys.meta_path``: it raises an error that says what to do.

    ``from swafast import EMA`` asks it for a module ``swafast.EMA``, and would drop the message of an AttributeError.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.removeprefix("swafast.") in _MOVED and name.startswith("swafast."):
            raise ModuleNotFoundError(
                f"No module named {name!r}: it moved before swafast 0.1.0 was released. In code, import from swafast "
                "itself. If a pickle of a whole object names the module, load the object with the swafast that wrote "
                "it and save its state_dict(), which this version loads",
                name=name,
            )
        package, _, leaf = name.rpartition(".")
        if package in _PACKAGES and (hint := hints.of_name(leaf)):
            raise ImportError(f"cannot import name {leaf!r} from {package!r}{hint}", name=name)


sys.meta_path.append(MovedFinder())
