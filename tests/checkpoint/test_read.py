"""Reading checkpoints at another partition, and refusing damaged or unrelated ones by name."""

from __future__ import annotations

import json
import math
import pickle
import re
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    Fragment,
    damage,
    damages,
    find_checkpoint,
    list_checkpoints,
    load_weights,
    mismatch,
    model_fragments,
)
from shodh_moe.checkpoint.state import seal
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from tests.checkpoint.ranks import TENSORS, Ranks, shapes_of
from tests.tiny import config

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


@st.composite
def partitions(draw: st.DrawFn, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Draw a partition of every tensor into runs (name, start, end), in any order."""
    runs = []
    for name, size in sizes.items():
        cuts = sorted(draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=5)) if size > 1 else [])
        bounds = [0, *cuts, size]
        runs += [(name, a, b) for a, b in pairwise(bounds)]
    return draw(st.permutations(runs))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_partition_can_read_what_any_other_wrote(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4), label="shapes")
    tensors: dict[str, Tensor] = {}
    for number, shape in enumerate(shapes):
        values = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(number)) * 100
        tensors[f"model/{number}"] = values.to(data.draw(st.sampled_from(TYPES))).view(shape)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    world = data.draw(st.integers(1, 4), label="ranks")
    runs = data.draw(partitions(sizes), label="saved")
    owners = [data.draw(st.integers(0, world - 1)) for _ in runs]
    with tempfile.TemporaryDirectory() as folder:
        writers = [CheckpointWriter(Path(folder), rank, world, 1, 0, "a") for rank in range(world)]
        for rank, writer in enumerate(writers):
            own_runs = [run for run, owner in zip(runs, owners, strict=True) if owner == rank]
            pieces = [Fragment(name, a, tensors[name].view(-1)[a:b]) for name, a, b in own_runs]
            writer.save(1, pieces, shapes_of(tensors), {}, {})
        for writer in writers:
            writer.finish()
        found = find_checkpoint(Path(folder), shapes_of(tensors))
        assert found is not None
        reader = CheckpointReader(found[0])
        assert set(reader.names()) == set(tensors)
        for name, tensor in tensors.items():
            stored = reader.tensor(name)
            assert reader.shape(name) == list(stored.shape) == list(tensor.shape)
            assert torch.equal(stored, tensor.to(stored.dtype))
            assert stored.dtype == tensor.dtype or not tensor.numel()
        live = {name: torch.full((size,), 7.0, dtype=torch.float64) for name, size in sizes.items()}
        again = data.draw(partitions(sizes), label="read")
        reader.fill([Fragment(name, a, live[name][a:b]) for name, a, b in again])
        for name, tensor in tensors.items():
            assert torch.equal(live[name], tensor.double().view(-1))


def test_only_the_requested_range_is_read(tmp_path: Path) -> None:
    Ranks(tmp_path, world_size=3).saved(1)
    reader = CheckpointReader(tmp_path / "1")
    assert reader.read("model/a.weight", 3, 6).tolist() == [3, 4, 5, 6, 7, 8]
    assert reader.read("model/a.weight", 11, 1).tolist() == [11]
    assert reader.read("model/a.weight", 5, 0).tolist() == []
    for start, count in ((11, 2), (-1, 2)):
        with pytest.raises(UserError, match=r"model/a.weight has shape \[3, 4\] and no element"):
            reader.read("model/a.weight", start, count)
    with pytest.raises(UserError, match="no tensor model/b"):
        reader.tensor("model/b")


def test_each_rank_reads_its_own_random_state(tmp_path: Path) -> None:
    Ranks(tmp_path, world_size=3).saved(1)
    reader = CheckpointReader(tmp_path / "1")
    for rank in range(3):
        assert {key: value.tolist() for key, value in reader.rank_state(rank).items()} == {"rng/cpu": [rank] * 5}
    assert reader.rank_state(3) == {}


def test_the_newest_intact_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") is None
    ranks = Ranks(tmp_path / "c")
    for step in (9, 10):
        ranks.saved(step)
    for name in ("x", "011x", "\N{ARABIC-INDIC DIGIT ONE}"):
        (tmp_path / "c" / name).mkdir()
    assert list_checkpoints(tmp_path / "c") == [9, 10]
    path, state = find_checkpoint(tmp_path / "c", shapes_of(TENSORS))
    assert (path.name, state["step"]) == ("10", 10)


def flip(path: Path, at: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model/a.weight": [1.0]}))


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of state.json and store the matching hash, as a forger would."""
    state = json.loads(path.read_text())
    del state["sha256"]
    path.write_text(seal({**state, **changes}))


def forge(path: Path) -> None:
    """Replace a rank's file by a pickle with matching hashes."""
    file = path.parent / "rank_00001.safetensors"
    pickled(file)
    files = json.loads(path.read_text())["files"]
    rewrite(path, files={**files, file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}})


def other_tensors(path: Path) -> None:
    """Replace a rank's file by a valid safetensors file of other tensors, with matching hashes."""
    file = path.parent / "rank_00001.safetensors"
    save_file({"model/a.weight@6": torch.zeros(6)}, file)
    files = json.loads(path.read_text())["files"]
    rewrite(path, files={**files, file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}})


def replace_second_piece(path: Path, *pieces: list[int]) -> None:
    tensors = json.loads(path.read_text())["tensors"]
    tensors["model/a.weight"]["pieces"][1:] = pieces
    rewrite(path, tensors=tensors)


FILE, STATE = "rank_00001.safetensors", "state.json"
DAMAGES: dict[str, tuple[str, Any, str]] = {
    "file missing": (FILE, Path.unlink, f"{FILE} is missing"),
    "file truncated": (FILE, lambda p: p.write_bytes(p.read_bytes()[:-4]), f"{FILE} has .* it is truncated"),
    "file longer": (FILE, lambda p: p.write_bytes(p.read_bytes() + b"x"), f"{FILE} has .* not the file that was"),
    "byte flipped in the data": (FILE, flip, f"{FILE} does not match its hash"),
    "byte flipped in the header": (FILE, lambda p: flip(p, 12), f"{FILE} does not match its hash"),
    "pickle as file": (FILE, pickled, f"{FILE} has"),
    "pickle with a right hash": (STATE, forge, f"{FILE} is not a safetensors file"),
    "other tensors with a right hash": (STATE, other_tensors, f"{FILE} does not hold elements 6 to 11 of exp_avg/a"),
    "folder as file": (FILE, lambda p: (p.unlink(), p.mkdir()), FILE),
    "state missing": (STATE, Path.unlink, f"{STATE} is missing"),
    "state truncated": (STATE, lambda p: p.write_bytes(p.read_bytes()[:-9]), f"{STATE} is not JSON"),
    "state empty": (STATE, lambda p: p.write_bytes(b""), f"{STATE} is not JSON"),
    "pickle as state": (STATE, pickled, f"{STATE} is not JSON"),
    "nested state": (STATE, lambda p: p.write_text("[" * 100_000), f"{STATE} is not JSON"),
    "number changed in the state": (
        STATE,
        lambda p: p.write_text(p.read_text().replace("0.125", "0.126")),
        f"{STATE} does not match its hash",
    ),
    "entry missing": (STATE, lambda p: rewrite(p, tensors=[1]), f"{STATE} has no valid entry tensors"),
    "path out of the folder": (
        STATE,
        lambda p: rewrite(p, files={"../1/x.safetensors": {"bytes": 1, "sha256": ""}}),
        f"{STATE} does not list one file for each of 2 ranks",
    ),
    "elements missing": (STATE, replace_second_piece, "model/a.weight: elements 6 to 11 of 12 are missing"),
    "elements twice": (
        STATE,
        lambda p: replace_second_piece(p, [1, 5, 7]),
        "model/a.weight: elements 5 to 5 of 12 occur more than once",
    ),
    "elements outside": (
        STATE,
        lambda p: replace_second_piece(p, [1, 6, 7]),
        "model/a.weight has elements 6 to 12 of only 12",
    ),
    "unknown type": (
        STATE,
        lambda p: rewrite(p, tensors={"a": {"shape": [0], "dtype": "object", "pieces": []}}),
        "tensor a has type object",
    ),
    "older format": (STATE, lambda p: p.write_text('{"step": 1, "sha256": {}}'), "its format is an older or foreign"),
    "newer format": (STATE, lambda p: p.write_text('{"format": 3}'), "its format is 3, and this version reads"),
    "foreign": (STATE, lambda p: p.write_text("[]"), "its format is a foreign one"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_previous_checkpoint_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name, damage_file, message = DAMAGES[kind]
    ranks = Ranks(tmp_path)
    for step in (1, 2):
        ranks.saved(step, learning_rate=0.125)
    damage_file(tmp_path / "2" / name)
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "1"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoint {tmp_path / '2'} is refused: ")
    assert line.endswith("; trying the one before it")
    assert re.search(message, line), line


def test_every_damage_is_listed(tmp_path: Path) -> None:
    Ranks(tmp_path, world_size=3).saved(1)
    flip(tmp_path / "1" / "rank_00000.safetensors")
    (tmp_path / "1" / "rank_00002.safetensors").unlink()
    assert damages(tmp_path / "1") == [
        "rank_00000.safetensors does not match its hash",
        "rank_00002.safetensors is missing",
    ]
    assert str(damage(tmp_path / "1")).endswith("does not match its hash (and 1 more)")
    assert damage(tmp_path / "2") == "it does not exist"


def test_having_only_damaged_checkpoints_is_an_error_not_a_silent_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        Ranks(tmp_path, attempt=f"a{step}").saved(step)
        (tmp_path / str(step) / FILE).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used \(2: rank_00001.safetensors is missing\)"):
        find_checkpoint(tmp_path)
    assert [line.count("trying") for line in capsys.readouterr().out.splitlines()] == [1, 0]


def test_tensors_of_another_model_are_named_and_the_previous_checkpoint_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"model/a": [2, 3], "model/b": [4], "model/c": []}
    matching = {name: torch.ones(shape) for name, shape in shapes.items()}
    other = {"model/a": torch.ones(3, 2), "model/b": torch.ones(4), "model/d": torch.ones(1)}
    Ranks(tmp_path).saved(1, matching).saved(2, other)
    reason = mismatch(tmp_path / "2", shapes)
    assert reason is not None
    for message in (
        "model/a is [3, 2] as saved and [2, 3] in the model",
        "not saved: model/c",
        "unknown to the model: model/d",
    ):
        assert message in reason
    assert "model/b" not in reason
    assert mismatch(CheckpointReader(tmp_path / "1").state, shapes) is None
    found = find_checkpoint(tmp_path, shapes)
    assert found is not None
    assert found[0].name == "1"
    assert reason in capsys.readouterr().out
    many = {f"model/{number}": [1] for number in range(9)}
    assert "model/0, model/1, model/2 and 6 more" in str(mismatch(tmp_path / "1", many))


# Models.


def transformer(ep: ExpertParallel | None = None, dim: int = 24) -> LatentTransformer:
    model = config(model={"dim": dim, "depth": 2, "heads": 2, "moe": {"expert_hidden": 16}}).model
    return LatentTransformer(model, 4, 0, ep or ExpertParallel())


@pytest.mark.parametrize("saved_at", [1, 2])
@pytest.mark.parametrize("loaded_at", [1, 2])
def test_a_model_loads_at_any_expert_parallel_size(tmp_path: Path, saved_at: int, loaded_at: int) -> None:
    whole = transformer()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    fragments, shapes = model_fragments(whole, ExpertParallel())
    tensors = {name: values.view(shapes[name]) for name, _, values in fragments}
    Ranks(tmp_path, world_size=saved_at).saved(1, tensors)
    for rank in range(loaded_at):
        ep = ExpertParallel(loaded_at, rank)
        model = transformer(ep)
        load_weights(tmp_path / "1", model, ep)
        experts = 0
        for name, parameter in model.named_parameters():
            expected = whole.get_parameter(name)
            if ".experts." in name:
                experts += 1
                expected = expected[ep.local_experts(len(expected))]
            assert torch.equal(parameter, expected), name
        assert experts == 4


def test_a_model_of_another_architecture_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    fragments, shapes = model_fragments(transformer(), ExpertParallel())
    Ranks(tmp_path, world_size=1).saved(1, {name: values.view(shapes[name]) for name, _, values in fragments})
    with pytest.raises(
        UserError, match=r"refused: .*model/embed.weight is \[24, .*\] as saved and \[32, .*and \d+ more"
    ):
        load_weights(tmp_path / "1", transformer(dim=32), ExpertParallel())
