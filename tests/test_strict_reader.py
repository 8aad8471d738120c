"""Folders of distributed checkpoints, read as torch reads them, of which nothing runs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan
from torch.futures import Future

from swafast import EqualAverage, FusedAveragedModel, Snapshots
from swafast.integrations.saved_states import load_shards
from swafast.posthoc.folder import snapshot_paths
from swafast.sharded.strict_reader import StrictReader, read_metadata
from tests.checkpoint_io import Exploit, require_unharmed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning", "ignore:TypedStorage:UserWarning")

KEY = "average/weight"


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    """A folder of one snapshot. The working directory is another one, where a harm would show."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 2)
    averaged = FusedAveragedModel(model)
    averaged.update_parameters(model)
    made = Snapshots(tmp_path / "snapshots")
    made.save(averaged)
    return made


def saved_in(snapshots: Snapshots) -> Path:
    return snapshot_paths(snapshots.folder)[0]


def rewrite(path: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


def with_object(path: Path, name: str = KEY) -> None:
    """Have an object that runs a command in the place of a tensor."""
    torch.save(Exploit(), buffer := io.BytesIO())
    data = next(path.glob("*.distcp"))
    start = data.stat().st_size
    data.write_bytes(data.read_bytes() + buffer.getvalue())

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        (index,) = (each for each in metadata.storage_data if each.fqn == name)
        info = metadata.storage_data.pop(index)
        info.offset, info.length = start, len(buffer.getvalue())
        metadata.storage_data[MetadataIndex(name)] = info

    rewrite(path, change)


def above(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a command": (lambda path: (path / ".metadata").write_bytes(pickle.dumps(Exploit())), r"global 'posix\.system'"),
    "a command within": (
        lambda path: rewrite(path, lambda m: setattr(m, "planner_data", Exploit())),
        r"global 'posix\.system'",
    ),
    "an object": (with_object, f"must have a tensor as '{KEY}', got an object, which is not unpickled"),
    "a file above": (lambda path: rewrite(path, above), "must name files in its own folder"),
    "nothing": (lambda path: (path / ".metadata").unlink(), "is missing: the folder is no checkpoint"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_snapshots_and_states_run_nothing(snapshots: Snapshots, tmp_path: Path, harm: str) -> None:
    path = saved_in(snapshots)
    put, words = HARMS[harm]
    put(path)
    with pytest.raises(ValueError, match=words):
        snapshots.synthesize(EqualAverage())
    with pytest.raises(RuntimeError, match=words):
        load_shards({KEY: torch.zeros(2, 3)}, path)
    require_unharmed(tmp_path)


@pytest.mark.parametrize("gate", ["read_metadata", "read_data"])
def test_without_the_reader_the_harm_would_be_done(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch, gate: str
) -> None:
    """What torch's own reader does with these folders: a gate that is left out is seen."""
    monkeypatch.setattr(StrictReader, gate, getattr(dcp.FileSystemReader, gate))
    put, _ = HARMS["a command" if gate == "read_metadata" else "an object"]
    put(saved_in(snapshots))
    with suppress(RuntimeError):
        load_shards({KEY: torch.zeros(2, 3)}, saved_in(snapshots))
    assert Path("harmed").exists()


def test_the_list_is_what_torch_reads(tmp_path: Path) -> None:
    state = {
        "model": {"a": torch.randn(3, 4, dtype=torch.bfloat16), "b": torch.tensor(5), "empty": torch.zeros(0, 2)},
        "epoch": 3,
        "list": [torch.ones(2), "text"],
    }
    dcp.save(state, checkpoint_id=tmp_path)
    theirs, ours = dcp.FileSystemReader(tmp_path).read_metadata(), read_metadata(tmp_path)
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for key, entry in theirs.state_dict_metadata.items():
        found: Any = ours.state_dict_metadata[key]
        assert type(found) is type(entry)
        if not isinstance(entry, BytesStorageMetadata):
            assert (found.size, found.chunks) == (entry.size, entry.chunks)
            assert found.properties.dtype == entry.properties.dtype
    places = [{index: (each.relative_path, each.offset, each.length) for index, each in it.storage_data.items()}
              for it in (ours, theirs)]  # fmt: skip
    assert places[0] == places[1]


def test_the_list_of_a_snapshot_is_read_once(snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reads it, which takes long: a sum has many windows."""
    from swafast.posthoc import folder, sums

    monkeypatch.setattr(sums, "_WINDOW_NUMEL", 1)
    reads: list[object] = []
    monkeypatch.setattr(folder, "read_metadata", lambda path: reads.append(path) or read_metadata(path))
    loads: list[object] = []
    read_data = StrictReader.read_data

    def counted(self: StrictReader, plan: LoadPlan, planner: Any) -> Future[None]:
        loads.append(plan)
        return read_data(self, plan, planner)

    monkeypatch.setattr(StrictReader, "read_data", counted)
    snapshots.synthesize(EqualAverage())
    assert (len(reads), len(loads)) == (1, 2)
