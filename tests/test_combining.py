"""`swafast combine`: averages in files merged by their counts, windows between two, and what is refused."""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner, Result

from swafast import EqualAverage, FusedAveragedModel, FusedAverages, cli, load, save
from swafast.average.planes import fit_planes
from swafast.files import combining, placing
from swafast.files.averaged_file import read_state
from swafast.files.combining import combine_files
from swafast.terms.converting import full_precision
from tests.support import same_bits

FORMATS = ("float32", "exact", "compact", "compensated", "half", "mirrored")
DTYPES = {"float32": torch.float32, "compensated": torch.float32, "mirrored": torch.float16}
#: Of one rounding to the format, relative to the largest param.
ROUNDING = {"float32": 6e-8, "exact": 6e-8, "compact": 1.6e-5, "compensated": 4e-15, "half": 4e-3, "mirrored": 6e-8}


class Net(nn.Module):
    """Params of two names that are tied, BatchNorm, an integer buffer and a floating one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
        self.tied = nn.Linear(5, 4, bias=False)
        self.tied.weight = self.body[0].weight
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("scale", torch.tensor([0.1, -float("inf")]))

    @torch.no_grad()
    def drift(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        for param in self.parameters():
            param.copy_(1 + 0.1 * torch.randn(param.shape, generator=generator))
        self.steps.fill_(count)
        self.body[1].running_mean.fill_(float(count))


def averages(counts: list[int], start: int = 0, **options: Any) -> tuple[list[FusedAveragedModel], list[list[Tensor]]]:
    """Return averages of these numbers of models, the first of which are the same, and the params of each model."""
    dtype = DTYPES.get(options.get("format", "float32"), torch.bfloat16)
    model, found, params = Net().to(dtype), [], []
    averaged = FusedAveragedModel(model, **options)
    for count in range(1, max(counts) + 1):
        model.drift(start + count)
        averaged.update_parameters(model)
        params.append([param.detach().double().clone() for param in model.parameters()])
        if count in counts:
            found.append(copy.deepcopy(averaged))
    return found, params


def params_of(path: Path, like: FusedAveragedModel) -> list[Tensor]:
    """Load a file and return the params at full precision."""
    fresh = copy.deepcopy(like)
    if path.suffix == ".safetensors":
        load(fresh, path)
    else:
        fresh.load_state_dict(torch.load(path, weights_only=True))
    return [
        full_precision(fit_planes(fresh, name, first, fmt), fmt).double()
        for name, first, fmt in fresh._each_average()
        if fmt is not None
    ]


def store(averaged: FusedAveragedModel, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save(averaged, path)
    else:
        torch.save(averaged.state_dict(), path)
    return path


def error_of(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


def means(params: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(list(each)).mean(0) for each in zip(*params, strict=True)]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_merge_is_the_mean_of_all_models(tmp_path: Path, fmt: str, suffix: str) -> None:
    options = {"format": fmt, "seed": 1}
    runs = [averages([count], 100 * count, **options) for count in (2, 3, 7)]
    paths = [store(run[0][0], tmp_path / f"{index}{suffix}") for index, run in enumerate(runs)]
    out = tmp_path / f"out{suffix}"
    done = combine_files(paths, out)
    last = runs[-1][0][0]
    inputs = [params_of(path, last) for path in paths]
    weighted = [sum(n * each for n, each in zip((2, 3, 7), of, strict=True)) / 12 for of in zip(*inputs, strict=True)]
    assert error_of(params_of(out, last), weighted) <= ROUNDING[fmt]
    if fmt != "half":
        everything = [params for _, of_run in runs for params in of_run]
        assert error_of(params_of(out, last), means(everything)) <= max(2e-7, 4 * ROUNDING[fmt])
    assert done.counts == {"": 12}
    fresh = copy.deepcopy(runs[0][0][0])
    state = torch.load(out) if suffix == ".pt" else read_state(str(out))[1]
    fresh.load_state_dict(state)
    assert int(fresh.n_averaged) == 12
    assert int(fresh.module.steps) == int(last.module.steps) == 707
    assert same_bits(fresh.module.body[1].running_mean, last.module.body[1].running_mean)
    assert same_bits(fresh.module.scale, last.module.scale)  # with an infinity, equal in all


@pytest.mark.parametrize("fmt", ["float32", "exact", "compensated"])
def test_a_window_is_the_mean_of_its_models(tmp_path: Path, fmt: str) -> None:
    (earlier, later), params = averages([6, 9], format=fmt)
    paths = [store(earlier, tmp_path / "6.safetensors"), store(later, tmp_path / "9.pt")]
    paths[1] = store(later, tmp_path / "9.safetensors")
    done = combine_files(paths, tmp_path / "out.safetensors", window=True)
    error = error_of(params_of(tmp_path / "out.safetensors", later), means(params[6:]))
    assert error <= 5 * (1e-7 if fmt != "compensated" else 1e-13) * (6 + 9) / (9 - 6)
    assert done.counts == {"": 3}
    back = combine_files([paths[0], tmp_path / "out.safetensors"], tmp_path / "back.pt")  # and undone by a merge
    assert back.counts == {"": 9}
    assert error_of(params_of(tmp_path / "back.pt", later), means(params)) <= 3e-7


def test_a_short_window_is_warned_of_unless_it_is_compensated(tmp_path: Path) -> None:
    for fmt, warned in (("float32", 1), ("compensated", 0)):
        (earlier, later), params = averages([40, 42], format=fmt)
        paths = [store(each, tmp_path / f"{fmt}{index}.safetensors") for index, each in enumerate((earlier, later))]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            combine_files(paths, tmp_path / f"{fmt}.safetensors", window=True)
        assert [str(each.message)[:40] for each in caught] == ["the window is short: the rounding errors"] * warned
        error = error_of(params_of(tmp_path / f"{fmt}.safetensors", later), means(params[40:]))
        assert error <= (1e-5 if warned else 1e-11)


def test_several_averages_and_torch_own_states_are_combined(tmp_path: Path) -> None:
    model = Net()
    several = FusedAverages(model, rules={"a": EqualAverage(), "b": EqualAverage()}, format={"b": "compensated"})
    torchs = AveragedModel(model)
    for name in ("1", "2"):
        for count in range(3):
            model.drift(count + 10 * int(name))
            several.update_parameters(model)
            torchs.update_parameters(model)
        save(several, tmp_path / f"{name}.safetensors")
        torch.save({"epoch": 1, "swa": torchs.state_dict()}, tmp_path / f"{name}.pt")
    out = tmp_path / "out.safetensors"
    assert combine_files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], out).counts == {"a.": 9, "b.": 9}
    load(several, out)
    assert [int(each.n_averaged) for each in several.values()] == [9, 9]
    done = combine_files([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt", key="swa", window=True)
    assert done.counts == {"": 3}
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    torchs.load_state_dict(state)
    assert state["module.tied.weight"].data_ptr() == state["module.body.0.weight"].data_ptr()
    with pytest.raises(ValueError, match="pass --key swa"):
        combine_files([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "more.pt")


class Pair(nn.Module):
    """Two params of one shape, tied or not, a floating buffer that changes, and float8."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.one = nn.Linear(2, 3)
        self.two = nn.Linear(2, 3)
        if tied:
            self.two.weight = self.one.weight
        self.register_buffer("scale", torch.zeros(2))
        self.register_buffer("eighth", torch.zeros(4).to(torch.float8_e4m3fn))


def pair(path: Path, values: list[float], *, tied: bool = False, of: type = AveragedModel) -> Path:
    """Store an average of models whose param ``two`` is 10 times ``one``, unless they are tied."""
    model = Pair(tied)
    averaged = of(model)
    for value in values:
        with torch.no_grad():
            model.two.weight.fill_(10 * value)
            model.one.weight.fill_(value)
            model.scale.fill_(1 / value)
        averaged.update_parameters(model)
    if path.suffix == ".safetensors":
        save(averaged, path)
    else:
        torch.save(averaged.state_dict(), path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("is_first_tied", [True, False])
def test_params_that_are_tied_in_one_input_alone_keep_both_values(
    tmp_path: Path, is_first_tied: bool, suffix: str
) -> None:
    of = AveragedModel if suffix == ".pt" else FusedAveragedModel
    tied = pair(tmp_path / f"tied{suffix}", [2.0], tied=True, of=of)
    untied = pair(tmp_path / f"untied{suffix}", [1.0, 3.0, 5.0], of=of)
    for inputs in ([tied, untied] if is_first_tied else [untied, tied], [tied, untied, tied]):
        combine_files(inputs, tmp_path / "out.pt", force=True)
        state = torch.load(tmp_path / "out.pt", weights_only=True)
        count = 2 + len(inputs)
        weight = (3 * 3.0 + (len(inputs) - 1) * 2.0) / count
        other = (3 * 30.0 + (len(inputs) - 1) * 2.0) / count
        assert int(state["n_averaged"]) == count
        assert torch.allclose(state["module.one.weight"], torch.tensor(weight))
        assert torch.allclose(state["module.two.weight"], torch.tensor(other))


def test_named_tensors_are_copied_from_the_last_input(tmp_path: Path) -> None:
    earlier, later = (pair(tmp_path / f"{n}.pt", [float(i) for i in range(1, n + 1)]) for n in (9, 10))
    out = tmp_path / "out.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        combine_files([earlier, later], out, window=True, copied=["scale"])
    state = torch.load(out, weights_only=True)
    assert torch.allclose(state["module.one.weight"], torch.tensor(10.0))
    assert torch.equal(state["module.scale"], torch.full((2,), 0.1))
    with pytest.raises(ValueError, match=r"copied must have names of the model in .*10.pt, got .*scales"):
        combine_files([earlier, later], out, window=True, copied=["scale", "scales"], force=True)
    result = run("--merge", earlier, later, "-o", out, "--force", "--copied", "scale")
    assert result.exit_code == 0, result.output
    assert torch.equal(torch.load(out, weights_only=True)["module.scale"], torch.full((2,), 0.1))


def test_float8_that_differs_and_sums_that_overflow_are_refused(tmp_path: Path) -> None:
    paths = [pair(tmp_path / f"{n}.pt", [1.0] * n) for n in (3, 4)]
    state = torch.load(paths[0], weights_only=True)
    state["module.eighth"] = torch.ones(4).to(torch.float8_e4m3fn)
    torch.save(state, paths[0])
    with pytest.raises(ValueError, match=r"3.pt must have the values of .*4.pt for 'module.eighth', since .*--copied"):
        combine_files(paths, tmp_path / "out.pt")
    combine_files(paths, tmp_path / "out.pt", copied=["eighth"])
    assert torch.load(tmp_path / "out.pt", weights_only=True)["module.eighth"].float().sum() == 0
    for path, value in zip(paths, (3e38, -3e38), strict=True):
        state = torch.load(path, weights_only=True)
        state["module.one.weight"].fill_(value)
        torch.save(state, path)
    with pytest.raises(ValueError, match=r"that torch.float32 holds, got an infinity for 'module.one.weight'"):
        combine_files(paths, tmp_path / "over.pt", window=True, copied=["eighth"])
    assert not (tmp_path / "over.pt").exists()


def changed(averaged: FusedAveragedModel, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    state = averaged.state_dict()
    change(state)
    torch.save(state, path)
    return path


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another name": (
        lambda s: s.update({"module.more": s.pop("module.scale")}),
        "must have the names of .*, but it lacks 'module.scale' and has 'module.more' besides",
    ),
    "a sparse tensor": (
        lambda s: s.update({"module.scale": torch.eye(2).to_sparse()}),
        "dense tensors .* 'module.scale'",
    ),
    "another shape": (lambda s: s.update({"module.body.0.bias": torch.ones(5)}), r"\(4,\).* for 'module.body.0.bias'"),
    "another dtype": (lambda s: s.update({"module.steps": torch.tensor(1.0)}), "torch.int64 .* for 'module.steps'"),
    "another format": (lambda s: s.update({"compensation.body.0.bias": torch.ones(4)}), "must have the formats of"),
    "no model": (lambda s: s.update({"n_averaged": torch.tensor(0)}), "at least one model, got 'n_averaged'"),
    "no count": (lambda s: s.pop("n_averaged"), "the state of an average, with 'n_averaged', got none"),
    "a NaN": (lambda s: s["module.body.0.bias"].fill_(float("nan")), "a NaN or an infinity in 'module.body.0.bias'"),
    "an object": (
        lambda s: s.update({"module.hook": Path("x")}),
        "dense tensors and plain values alone, got for 'module.hook' a pathlib",
    ),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_inputs_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    (averaged, later), _ = averages([2, 3])
    good, out = store(averaged, tmp_path / "good.pt"), tmp_path / "out.pt"
    bad = changed(copy.deepcopy(later), tmp_path / "bad.pt", change)
    out.write_bytes(b"before")
    with pytest.raises(ValueError, match=words) as raised:
        combine_files([good, bad], out, force=True)
    assert "bad.pt" in str(raised.value)
    assert out.read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "good.pt", "out.pt"]


class Config:
    """Of a training script, in its checkpoints."""


def test_whole_checkpoints_are_read_as_average_reads_them(tmp_path: Path) -> None:
    """With options, an optimizer and nested dicts beside the state, and an object of a class that is not known."""
    (averaged, later), params = averages([2, 3])
    for name, each in (("a", averaged), ("b", later)):
        each.module.body[0].weight.data = each.module.body[0].weight.data.t().contiguous().t()
        saved = {"args": argparse.Namespace(lr=0.1), "train": {"swa.net": each.state_dict()}, "when": [datetime.now()]}
        torch.save(saved, tmp_path / f"{name}.pt")
        torch.save({**saved, "config": Config()}, tmp_path / f"{name}.pth")
    out = tmp_path / "out.pth.tar"
    combine_files([tmp_path / "a.pt", tmp_path / "b.pt"], out, key="train.swa.net", window=True)
    assert error_of(params_of(out, later), means(params[2:])) <= 1e-6
    with pytest.raises(ValueError, match=r"a.pt must hold .* got none: pass --key train.swa.net"):
        combine_files([tmp_path / "a.pt", tmp_path / "b.pt"], out, force=True)
    name = f"{Config.__module__}.Config"
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    with pytest.raises(ValueError, match=rf"a.pth must hold .*'{name}'.* \(--allow {name}\)"):
        combine_files(paths, out, key="train.swa.net", force=True)
    before = out.read_bytes()
    result = run("--merge", *paths, "--key", "train.swa.net", "-o", out, "--force")
    assert (result.exit_code, out.read_bytes()) == (2, before)
    assert f"--allow {name}" in result.output
    assert "\x1b" not in result.output
    result = run(
        *("--merge", *paths, "--key", "train.swa.net", "--allow", name),
        *("-o", out, "--force", "--quiet"),
    )
    assert (result.exit_code, result.output) == (0, "")
    assert out.read_bytes() != before


def test_further_state_stays_in_a_file_of_torch(tmp_path: Path) -> None:
    (averaged, later), _ = averages([2, 3])
    extra = {"scales": [torch.ones(2), (1, None, 0.5)], "raw": b"\xff\0", 3: "three"}
    paths = [
        changed(each, tmp_path / f"{place}.pt", lambda state: state.update({"module.body._extra_state": extra}))
        for place, each in enumerate((averaged, later))
    ]
    combine_files(paths, tmp_path / "out.pt")
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    found = state["module.body._extra_state"]
    assert str(found) == str(extra)
    assert state._metadata == later.state_dict()._metadata


def test_a_pickle_that_nests_without_an_end_is_refused(tmp_path: Path) -> None:
    (averaged,), _ = averages([2])
    endless: dict[str, Any] = {}
    endless["more"] = endless
    wide: Any = 0
    for _ in range(60):
        wide = [wide, wide]
    path = changed(copy.deepcopy(averaged), tmp_path / "a.pt", lambda state: state.update({"module.more": endless}))
    with pytest.raises(ValueError, match=r"a.pt is damaged: its values are nested too deeply"):
        combine_files([path, path], tmp_path / "out.pt")
    torch.save(endless, path)
    with pytest.raises(ValueError, match=r"a.pt must hold the state of an average"):
        combine_files([path, path], tmp_path / "out.pt")
    path = changed(averaged, path, lambda state: state.update({"module.more": wide}))
    combine_files([path, path], tmp_path / "out.pt")


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    found, _ = averages([2, 3])
    return [str(store(each, tmp_path / f"{index}.safetensors")) for index, each in enumerate(found)]


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, ["combine", *map(str, arguments)])


def test_the_command_writes_and_says_what(tmp_path: Path, two: list[str]) -> None:
    out = tmp_path / "out.safetensors"
    result = run("--merge", *two, "-o", out)
    assert (result.exit_code, out.exists()) == (0, True), result.output
    assert "the mean of 5 models" in result.output
    assert "update_bn" in result.output
    before = out.read_bytes()
    again = run("--window", *two, "-o", out)
    assert (again.exit_code, out.read_bytes()) == (2, before)
    assert "--force" in again.output
    assert run("--window", *two, "-o", out, "--force").exit_code == 0
    assert out.read_bytes() != before


def test_the_command_refuses_with_the_right_code(
    tmp_path: Path, two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(two[0]).read_bytes()[:-8])
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pt")
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors")
    for arguments, words in (
        ((*two, "-o", out), "pass one of them"),
        (("--merge", two[0], "-o", out), "at least two"),
        (("--window", *two[::-1], "-o", out), "more models than"),
        (("--window", two[0], two[0], "-o", out), "more models than"),
        (("--merge", two[0], cut, "-o", out), "cut.safetensors"),
        (("--merge", two[0], tmp_path / "none.safetensors", "-o", out), "inputs must exist, got "),
        (("--merge", cut, tmp_path / "none.pt", "-o", out), "inputs must exist, got "),
        (("--merge", two[0], tmp_path, "-o", out), "inputs must be files, got the folder"),
        (("--merge", two[0], tmp_path / "plain.safetensors", "-o", out), "without counts by swafast average"),
        (("--merge", two[0], tmp_path / "plain.pt", "-o", out), "without counts by swafast average"),
        (("--merge", *two, "-o", tmp_path / "no" / "out.pt"), "out must be in a folder that exists"),
        (("--merge", *two, "-o", tmp_path / "out.npz"), "must end in"),
    ):
        result = run(*arguments)
        assert (result.exit_code, words in result.output, out.exists()) == (2, True, False), result.output
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result = run("--merge", *two, "-o", out)
    assert (result.exit_code, "No space left" in result.output, out.exists()) == (1, True, False), result.output
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    result = run("--merge", *two, "-o", out)
    assert (result.exit_code, "and 0 B are free" in result.output, out.exists()) == (1, True, False), result.output
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_what_appears_during_a_combination_is_kept(
    name: str, tmp_path: Path, two: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combining, "check_space", lambda out, nbytes: out.write_text("mine"))
    with pytest.raises(FileExistsError, match="somebody else has made meanwhile"):
        combine_files(two, tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"
    combine_files(two, tmp_path / name, force=True)
    assert (tmp_path / name).stat().st_size > 4


# Planted bugs, each with the test that must find it


def _kills(monkeypatch: pytest.MonkeyPatch, name: str, value: Any, test: Callable[[], None]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(combining, name, value)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test()


def test_planted_bugs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge() -> None:
        test_a_merge_is_the_mean_of_all_models(tmp_path, "exact", ".pt")
        (tmp_path / "out.pt").unlink()

    def plain() -> None:
        test_a_merge_is_the_mean_of_all_models(tmp_path, "float32", ".pt")

    def window() -> None:
        test_a_window_is_the_mean_of_its_models(tmp_path, "compensated")
        (tmp_path / "out.safetensors").unlink()
        (tmp_path / "back.pt").unlink()

    def reset() -> None:
        for path in tmp_path.iterdir():
            path.unlink()

    real = combining._sum
    plants: dict[str, tuple[str, Any, Callable[[], None]]] = {
        "counts ignored": ("_sum", lambda planes, fmt, factors: real(planes, fmt, [1] * len(factors)), merge),
        "order reversed": ("_sum", lambda planes, fmt, factors: real(planes, fmt, factors[::-1]), merge),
        "planes dropped": (
            "_sum",
            lambda planes, *rest: real([(p[0], 0 * p[1]) for p in planes], *rest),
            window,
        ),
        "statistics averaged": ("is_averaged", lambda name, value: value.is_floating_point(), plain),
        "integers averaged": ("is_averaged", lambda name, value: True, plain),
    }
    for attribute, value, test in plants.values():
        _kills(monkeypatch, attribute, value, test)
        reset()
    merge()
    reset()
    window()
