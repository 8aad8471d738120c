"""What the native pass does not take: the checks in Python, the same results, a line in the doctor. And lifetimes."""

from __future__ import annotations

import gc
import logging
import os
import re
import resource
import sys
import sysconfig
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swafast import FusedAveragedModel, doctor
from swafast.backends import Unavailable
from swafast.op import tree_check
from swafast.op.tree_check import TreeCheck
from tests.support import is_interrupted
from tests.test_tree_check import Training, run, same
from tests.tree_changes import Net, Special, stands

if isinstance(tree_check.load(), Unavailable):
    pytest.skip("needs the native library of the checks", allow_module_level=True)


class Slots(nn.Linear):
    __slots__ = ("note",)


class GetAttribute(nn.Linear):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


class GetAttr(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class OwnProperty(nn.Linear):
    @property
    def _parameters(self) -> Any:  # type: ignore[override]
        return self.__dict__.get("_parameters", {})

    @_parameters.setter
    def _parameters(self, value: Any) -> None:
        self.__dict__["_parameters"] = value


def _with_special() -> nn.Module:
    model = nn.Linear(3, 3)
    model.weight = Special(model.weight.detach().clone())
    return model


LEFT_OUT = {
    "__getattribute__": (lambda: GetAttribute(3, 3), "GetAttribute has a __getattribute__ of its own"),
    "a property": (lambda: OwnProperty(3, 3), "OwnProperty has _parameters of its own"),
    "a subclass of Parameter": (_with_special, "a pass reads plain tensors only, got a Special"),
    "a scripted module": (lambda: torch.jit.script(nn.Linear(3, 3)), "of its own|elsewhere|without a dict"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_it_does_not_take_is_checked_in_python(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = LEFT_OUT[kind]
    caplog.set_level(logging.DEBUG, "swafast")
    logs = []
    for native in (True, False):
        torch.manual_seed(4)
        training = Training(make())
        assert training.check is None
        replaced = next(training.model.parameters())
        replaced.data = replaced.data.clone() + 1
        logs.append(run(training, [training.step] * 3, native))
    assert all(map(same, *logs))
    said = [record.message for record in caplog.records if "in Python" in record.message]
    assert said
    assert re.search(reason, said[0]), said[0]


@pytest.mark.parametrize("kind", [GetAttr, Slots])
def test_a_class_whose_dicts_are_its_own_is_taken(kind: type[nn.Linear]) -> None:
    assert Training(kind(3, 3)).check is not None


REASONS = {
    "asked for": "SWAFAST_CHECKS=python",
    "no global lock": "this Python has no global lock",
    "no library": "absent.so is not there: install Python's headers, then swafast again",
    "a broken library": "broken.so did not load",
    "another interface": "has interface 3, this swafast needs 999: install it again",
    "no cell": "does not show where its own object is",
    "a torch without a function": "this torch does not export aoti_torch_get_data_ptr",
    "a torch that is not loaded": "libabsent.so is not loaded",
    "reads another": "what a pass reads of a tensor is not what torch says",
}


@pytest.mark.parametrize("why", REASONS)
def test_the_doctor_says_in_a_line_why_it_is_left_out(
    why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    patch = monkeypatch.setattr
    check = TreeCheck([model := Net()], [list(model.parameters())])
    (tmp_path / "broken.so").write_text("no library")
    if why == "asked for":
        monkeypatch.setenv("SWAFAST_CHECKS", "python")
    elif why == "no global lock":
        of = sysconfig.get_config_var
        patch(sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else of(name))
    elif why in ("no library", "a broken library"):
        path = tmp_path / ("absent.so" if why == "no library" else "broken.so")
        patch(tree_check, "library_path", lambda: path)
    elif why == "another interface":
        patch(tree_check, "_ABI", 999)
    elif why == "no cell":
        patch(tree_check, "cell_offset", lambda: None)
    elif why == "a torch without a function":
        patch(tree_check, "torch_library", lambda: Path(torch.__file__).parent / "lib" / "libc10.so")
    elif why == "a torch that is not loaded":
        patch(tree_check, "torch_library", lambda: Path("libabsent.so"))
    else:
        patch(tree_check, "impl_address", lambda tensor: int(tensor._cdata) + 8)
    patch(tree_check, "load", tree_check.load.__wrapped__)
    said = dict(doctor.report())["checks of tensors"]
    assert said.startswith("Python: ")
    assert REASONS[why] in said
    assert "\n" not in said
    training = Training()
    assert training.check is None
    assert training.average.n_averaged == 2
    assert stands(check)  # a library that is refused leaves what one loaded before uses


def test_an_unknown_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_check, "load", tree_check.load.__wrapped__)
    monkeypatch.setenv("SWAFAST_CHECKS", "off")
    average = FusedAveragedModel(model := Net())
    with pytest.raises(ValueError, match=r"SWAFAST_CHECKS must be 'python' or not be set, got 'off'"):
        average.update_parameters(model)
    assert average.n_averaged == 0
    assert dict(doctor.report())["checks of tensors"].startswith("none: SWAFAST_CHECKS must be")
    assert doctor.main() == 1


def test_it_keeps_no_model_alive_and_no_memory() -> None:
    model = Net()
    average = FusedAveragedModel(model)
    for _ in range(3):
        average.update_parameters(model)
    check = average._bindings.latest._checks._check  # type: ignore[attr-defined]
    modules = [weakref.ref(module) for module in model.modules()]
    tensors = [weakref.ref(param) for param in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() for reference in (*modules, *tensors))
    assert check.find(1) is None

    net = Net()
    used = list(net.parameters())
    TreeCheck([net], [used])
    counts = [sys.getrefcount(each) for each in (net.__dict__, net.first, net.first.weight, type(net), "weight")]
    for i in range(3000):
        if i == 1000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        TreeCheck([net], [used]).find(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2000  # KiB: a leak of each is 10 MB
    now = [sys.getrefcount(each) for each in (net.__dict__, net.first, net.first.weight, type(net), "weight")]
    assert max(abs(one - two) for one, two in zip(counts, now, strict=True)) < 50


def test_threads_that_replace_tensors_and_collect_garbage_do_it_no_harm() -> None:
    net, stop, errors = Net(), threading.Event(), []
    check = TreeCheck([net], [list(net.parameters())])
    kept = net.first

    def replace() -> None:
        while not stop.is_set():
            net.first = nn.Linear(4, 4)
            net.a = nn.Parameter(net.a.data)
            net.first = kept
            gc.collect(0)

    def ask() -> None:
        try:
            for _ in range(300):
                (found,) = check.find(1) or ((),)
                assert tree_check.tell(found)
                for tensor in found:
                    tensor.numel()
        except BaseException as error:
            errors.append(error)

    changing, asking = threading.Thread(target=replace), [threading.Thread(target=ask) for _ in range(2)]
    for thread in (changing, *asking):
        thread.start()
    for thread in asking:
        thread.join(60)
    stop.set()
    changing.join(60)
    assert errors == []
    assert stands(check)


@pytest.mark.parametrize("line", [0, 3, 10, 30, 100, 300])
def test_an_interrupt_in_its_python_side_leaves_the_average_usable(line: int) -> None:
    training = Training()
    training.model.a.data = training.model.a.data.clone()
    came = is_interrupted(lambda: training.average.update_parameters(training.model), line, "op/tree_check.py")
    assert came or line > 100
    training.average.update_parameters(training.model)
    assert training.average.n_averaged in (3, 4)
    training.average.update_parameters(training.model)
    assert training.check is not None
    assert stands(training.check)


def test_a_forked_child_goes_on_with_it() -> None:
    training = Training()
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if training.check is not None and stands(training.check) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert training.check is not None
    assert stands(training.check)
