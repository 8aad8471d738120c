"""The end of an error where a model, or a state, has other names than an average: the call that takes it along."""

from __future__ import annotations

from collections.abc import Collection

#: The prefix that DDP adds to names in states, which a load takes off.
_OF_RANKS = ("module.",)


def of_model(averages: Collection[str], params: Collection[str]) -> str:
    """Return what to do if a model has other names than the average that it is given to.

    Args:
        averages, params: the names on both sides.
    """
    if prefix := _before(averages, params):
        inner = f"model.{prefix[:-1]}"
        return (
            f"its names begin with {prefix!r}, as in a wrapper of your own: write {inner} for model, or call "
            f"adapt_to(model, old_name={_without(prefix)}) once"
        )
    if prefix := _before(params, averages):
        return (
            f"the average's names begin with {prefix!r}, as in a wrapper of your own: pass the wrapper, or call "
            f"adapt_to(model, old_name={_with(prefix)}) once"
        )
    renamed = any(name not in params for name in averages) and any(name not in averages for name in params)
    return f"if the model is to have them from now on, call adapt_to(model{', old_name=...' * renamed}) once"


def of_saved(averages: Collection[str], saved: Collection[str], loader: str) -> str:
    """Return what to do if the names in a state differ from those of the averages; nothing: they do not.

    Args:
        averages, saved: the names on both sides, wrapped alike.
        loader: the class that shall load the state.
    """
    own, given = {*averages}, {*saved}
    if own == given:
        return ""
    if prefix := _before(own, given, _OF_RANKS):
        what, old_name = f"its names begin with {prefix!r}, as in a wrapper of your own", _with(prefix)
    elif prefix := _before(given, own, _OF_RANKS):
        what, old_name = f"its names lack {prefix!r}, as of a wrapper of your own", _without(prefix)
    else:
        what, old_name = "if the model has changed since", "..." if own - given and given - own else ""
    left_out = "; if it was saved with frozen=False, pass include= as then" if given < own and not prefix else ""
    return f"{what}: {after_loading(loader, old_name)}{left_out}"


def after_loading(loader: str, old_name: str = "") -> str:
    """Return how the average of a model as it was becomes one of the model as it is."""
    changed = f"model, old_name={old_name}" if old_name else "model"
    return f"load it into {loader} of the model as it was, and call adapt_to({changed})"


def _before(names: Collection[str], others: Collection[str], but: Collection[str] = ()) -> str:
    """Return the prefix under which ``others`` have all of ``names``; nothing: there is none but ``but``."""
    first, known = min(names, default=""), {*others}
    ends = sorted((name for name in known if name.endswith(f".{first}")), key=len) if first else []
    prefixes = (name.removesuffix(first) for name in ends)
    return next((each for each in prefixes if each not in but and all(each + name in known for name in names)), "")


def _without(prefix: str) -> str:
    return f"lambda name: name.removeprefix({prefix!r})"


def _with(prefix: str) -> str:
    return f"lambda name: {prefix!r} + name"
