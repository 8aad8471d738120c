"""Inputs of `average` that fit together by their names and shapes, and would give a wrong average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swafast import FusedAveragedModel
from swafast.files import average


def test_one_of_several_shards_without_an_index_is_no_model(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m{number}").mkdir()
        save_file({"a": torch.ones(2)}, tmp_path / f"m{number}" / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"m1 must hold all files of a checkpoint and its index, got model-00001-of-0"):
        average([tmp_path / "m1", tmp_path / "m2"], tmp_path / "out.safetensors")
    for number in (1, 2):
        folder = tmp_path / f"m{number}"
        (folder / "model-00001-of-00002.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    average([tmp_path / "m1", tmp_path / "m2"], tmp_path / "out.safetensors")


@pytest.mark.parametrize("prefix", ["", "ema.", "module.ema."])
@pytest.mark.parametrize("form", [".pt", ".safetensors"])
@pytest.mark.parametrize(("fmt", "plane"), [("exact", "remainder"), ("compensated", "compensation")])
def test_the_first_plane_of_an_average_is_never_averaged_alone(
    tmp_path: Path, fmt: str, plane: str, form: str, prefix: str
) -> None:
    dtype = torch.bfloat16 if fmt == "exact" else torch.float32
    averaged = FusedAveragedModel(nn.Linear(2, 2).to(dtype), format=fmt)
    state = {prefix + name: value.clone() for name, value in averaged.state_dict().items()}
    paths = [tmp_path / f"m{number}{form}" for number in (1, 2)]
    for path in paths:
        torch.save(state, path) if form == ".pt" else save_file(state, path)
    with pytest.raises(ValueError, match=rf"must hold whole averages, got .* with further bits in '.*{plane}"):
        average(paths, tmp_path / "out.safetensors", integers="last", strip="module." if "." in prefix[:-1] else None)


def test_an_average_and_a_model_are_not_averaged(tmp_path: Path) -> None:
    paths = [tmp_path / "m1.pt", tmp_path / "m2.pt"]
    torch.save({"state_dict": {"a": torch.ones(1)}, "state_dict_ema": {"a": torch.zeros(1)}}, paths[0])
    torch.save({"state_dict": {"a": torch.full((1,), 3.0)}}, paths[1])
    with pytest.raises(ValueError, match=r"got 'state_dict_ema' in .*m1.pt and 'state_dict' in .*--key state_dict\)"):
        average(paths, tmp_path / "out.safetensors")
    average(paths, tmp_path / "out.safetensors", key="state_dict")
    assert load_file(tmp_path / "out.safetensors")["a"] == 2


def test_a_key_that_no_input_can_have_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"key \(--key\) is for files of torch.save and folders of DCP, got 'model'"):
        average([tmp_path / "m.safetensors"] * 2, tmp_path / "out.safetensors", key="model")


@pytest.mark.parametrize(("integers", "length"), [("equal", 16), ("last", 16), ("first", 0)])
def test_what_is_copied_may_have_another_shape(tmp_path: Path, integers: str, length: int) -> None:
    paths = [tmp_path / "m1.safetensors", tmp_path / "m2.safetensors"]
    for path, size, weight in zip(paths, (0, 16), (1.0, 3.0), strict=True):
        state: dict[str, Tensor] = {"l.weight": torch.full((1,), weight), "l._extra_state": torch.zeros(size).byte()}
        save_file(state, path)
    average(paths, tmp_path / "out.safetensors", integers=integers)
    out = load_file(tmp_path / "out.safetensors")
    assert out["l._extra_state"].shape == (length,)
    assert out["l.weight"] == 2


def test_a_model_under_the_names_of_an_average_is_not_replaced(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    options: dict[str, Any] = {"force": True}
    average([tmp_path / "m.safetensors"], tmp_path / "out", **options)
    average([tmp_path / "m.safetensors"], tmp_path / "out", **options)
    save_file({"a": torch.full((1,), 7.0)}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"hold only what an average has written, .*with 'model.safetensors'"):
        average([tmp_path / "m.safetensors"], tmp_path / "out", **options)
    assert load_file(tmp_path / "out" / "model.safetensors")["a"] == 7
