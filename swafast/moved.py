"""A clear error for modules that moved before the first release; pickles of whole objects may still name them."""

from __future__ import annotations

import sys

_MOVED = ("averaged_model", "averages", "elementary", "formats", "planes", "profiles", "rules", "schedule", "snapshots")


class MovedFinder:
    """The last finder of ``sys.meta_path``: it raises an error that says what to do about a moved module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.removeprefix("swafast.") in _MOVED and name.startswith("swafast."):
            raise ModuleNotFoundError(
                f"No module named {name!r}: it moved before swafast 0.1.0 was released. In code, import from swafast "
                "itself. If a pickle of a whole object names the module, load the object with the swafast that wrote "
                "it and save its state_dict(), which this version loads",
                name=name,
            )


sys.meta_path.append(MovedFinder())
