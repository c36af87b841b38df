"""`shodh merge prefix`: finding the alpha of a file's first frames, merging there, and refusing invalid input."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from shodh_moe.ccm.curve import by_group
from shodh_moe.ccm.expert import Expert, compose, load_expert
from shodh_moe.ccm.prefix import TRAJECTORIES, read_input
from shodh_moe.cli import main
from tests.ccm.synthetic import (
    CHANNELS,
    SCALE,
    expert_config,
    initial,
    make_ends,
    make_expert,
    save_ends,
    save_expert,
    truth,
)
from tests.merging.models import bits, config
from tests.tiny import refused, tree

MODELS = ["low/checkpoints/1", "high/checkpoints/1"]


@pytest.fixture
def here(ends: tuple[Expert, Expert], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_ends(tmp_path, ends)
    config(Path(), "ccm", MODELS, parameters={"alpha": -1.4}, output="merged")
    return tmp_path


def write(fields: Tensor, path: str = "mine.hdf5", **attributes: Any) -> None:
    """Write a user's file in the layout of a family, whose regime is unknown."""
    with h5py.File(path, "w") as file:
        file["tensor"] = fields.numpy()
        given = {"dt": 0.25, "channels": list(CHANNELS), "coordinate": np.nan, "value": np.nan, "complete": True}
        file.attrs.update({**given, **attributes})


def write_pdebench(fields: Tensor, path: str = "pdebench.h5", interval: float = 0.25) -> None:
    """Write a file like PDEBench's 2D_diff-react files."""
    with h5py.File(path, "w") as file:
        for index, trajectory in enumerate(fields.numpy()):
            group = file.create_group(f"{index:04d}")
            group["data"] = trajectory.transpose(0, 2, 3, 1)
            group["grid/t"] = np.arange(len(trajectory), dtype="f") * np.float32(interval)


def prefix(*more: str, input: str = "mine.hdf5", path: str = "merge.yaml") -> int:
    return main(["merge", "prefix", path, "--input", input, *more])


def says_no(
    capfd: pytest.CaptureFixture[str],
    *messages: str,
    more: tuple[str, ...] = (),
    input: str = "mine.hdf5",
    path: str = "merge.yaml",
) -> None:
    """Check that the command is refused in one line and changes nothing."""
    before = tree(Path())
    refused(capfd, "merge", "prefix", path, "--input", input, *more, says=messages)
    assert tree(Path()) == before


def alpha_of(output: str = "merged") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(output, "merge.json").read_text())["alpha"]
    return found


def test_the_merge_is_at_the_alpha_of_the_file(
    ends: tuple[Expert, Expert], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(truth(*ends, 0.6, frames=6))
    assert prefix() == 0
    output = capsys.readouterr()
    found = alpha_of()
    assert found["value"] == pytest.approx(0.6, abs=0.02)
    assert f"alpha {found['value']:+.3f}: error" in output.out
    assert "at 0.25 away from it" in output.out
    assert output.out.count("\n+") + output.out.count("\n-") == len(found["bank"]) == 13
    assert output.err == ""
    assert {key: found[key] for key in ("found", "file", "frames", "trajectories", "every", "flat")} == {
        "found": "prefix",
        "file": "mine.hdf5",
        "frames": 4,
        "trajectories": 2,
        "every": 1,
        "flat": False,
    }
    assert found["sha256"] == hashlib.sha256(Path("mine.hdf5").read_bytes()).hexdigest()
    assert found["sharpness"] > 0.05
    assert found["error"] < min(found["bank"].values())
    merged, composed = load_expert(Path("merged")), compose(*ends, found["value"])
    for name, values in composed.weights().items():
        assert bits(merged.weights()[name].detach()) == bits(values.detach())
    # The same command again finds its output.
    before = tree(Path())
    assert prefix() == 0
    assert "exists already" in capsys.readouterr().out
    assert tree(Path()) == before


def test_only_the_first_frames_count(ends: tuple[Expert, Expert], here: Path) -> None:
    fields = truth(*ends, 0.6, frames=7)
    write(fields)
    fields[:, 4:] = 7.0
    write(fields, "other.hdf5", coordinate=-1.5, value=1e-3)
    assert prefix("--output", "a") == prefix("--output", "b", input="other.hdf5") == 0
    assert alpha_of("a")["bank"] == alpha_of("b")["bank"]
    assert prefix("--output", "c", "--frames", "6", input="other.hdf5") == 0
    assert alpha_of("c")["bank"] != alpha_of("a")["bank"]
    assert alpha_of("c")["frames"] == 6


def test_pdebench_files_with_closer_frames(ends: tuple[Expert, Expert], here: Path) -> None:
    fields = truth(*ends, -0.7, frames=4)
    write_pdebench(fields)
    assert prefix(input="pdebench.h5") == 0
    assert alpha_of()["value"] == pytest.approx(-0.7, abs=0.02)
    between = torch.full((2, 16, *fields.shape[2:]), 9.0)
    between[:, ::5] = fields
    write_pdebench(between, interval=0.05)
    assert prefix("--output", "fine", input="pdebench.h5") == 0
    assert alpha_of("fine")["every"] == 5
    assert alpha_of("fine")["bank"] == alpha_of()["bank"]


def test_a_file_on_another_grid_is_accepted(ends: tuple[Expert, Expert], here: Path) -> None:
    write(truth(*ends, 0.6, frames=4, grid=32))
    assert prefix() == 0
    assert alpha_of()["value"] == pytest.approx(0.6, abs=0.02)


def test_only_a_few_trajectories_are_read(here: Path) -> None:
    write(torch.zeros(TRAJECTORIES + 3, 4, 2, 20, 20))
    assert read_input(Path("mine.hdf5")).fields.shape == (TRAJECTORIES, 4, 2, 20, 20)


def test_a_flat_optimum_and_one_at_the_end_of_the_range_warn(
    ends: tuple[Expert, Expert], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = truth(*ends, 0.0, frames=4)
    fields[:, 1:] += 300 * torch.randn(fields[:, 1:].shape, generator=torch.Generator().manual_seed(0))
    write(fields)
    assert prefix() == 0
    assert "warning: the optimum is flat" in capsys.readouterr().err
    assert alpha_of()["flat"] is True
    write(truth(*ends, 1.9, frames=4), "far.hdf5")
    assert prefix("--output", "far", input="far.hdf5") == 0
    error = capsys.readouterr().err
    assert "warning: alpha +1.5 is at the end of the bank" in error
    assert "flat" not in error
    assert alpha_of("far")["value"] == 1.5


def test_an_alpha_beyond_the_straight_range_warns(
    ends: tuple[Expert, Expert], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(Path(), "ccm", MODELS, parameters={"straight": 1.0}, output="merged")
    write(truth(*ends, 1.3, frames=4))
    assert prefix() == 0
    assert "beyond +-1, the range in which the path was measured to be straight" in capsys.readouterr().err


def test_limits_and_shards_work_as_for_merge(
    ends: tuple[Expert, Expert], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(truth(*ends, 0.6, frames=4))
    says_no(capfd, "much", more=("--memory-limit", "much"))
    says_no(capfd, "MiB too small", more=("--memory-limit", "100MiB"))
    assert prefix("--out-shard-size", "2MB") == 0
    assert len(list(Path("merged").glob("*.safetensors"))) > 1


def test_invalid_files_are_refused(ends: tuple[Expert, Expert], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fields = truth(*ends, 0.6, frames=4)
    says_no(capfd, "mine.hdf5 does not exist")
    says_no(capfd, "low cannot be read", input="low")
    Path("mine.hdf5").write_bytes(b"no HDF5")
    says_no(capfd, "mine.hdf5 cannot be read as HDF5")
    write(fields)
    Path("mine.hdf5").write_bytes(Path("mine.hdf5").read_bytes()[:-1000])
    says_no(capfd, "mine.hdf5", "truncated")
    with h5py.File("mine.hdf5", "w") as file:
        file["else"] = np.zeros(3)
    says_no(capfd, "mine.hdf5 contains else")
    write(fields, complete=False)
    says_no(capfd, "mine.hdf5 is not a complete file")
    write(fields[:, :3])
    says_no(capfd, "mine.hdf5 has 3 frames, but 4 are needed")
    write(fields[:, :1])
    says_no(capfd, "mine.hdf5 has 1 frame")
    write(fields[:0])
    says_no(capfd, "mine.hdf5", "[0, 4, 2, 20, 20]")
    write(fields[:, :, 0], channels=["activator"])
    says_no(capfd, "mine.hdf5", "shape")
    write(fields[:, :, :1], channels=["activator"])
    says_no(capfd, "mine.hdf5 has the channels activator, but the experts", "activator, inhibitor")
    write(fields, channels=["inhibitor", "activator"])
    says_no(capfd, "has the channels inhibitor, activator")
    for wrong in (float("nan"), float("inf")):
        spoilt = fields.clone()
        spoilt[1, 2, 0, 3, 3] = wrong
        write(spoilt)
        says_no(capfd, "mine.hdf5", "not finite")
        write_pdebench(spoilt)
        says_no(capfd, "pdebench.h5", "trajectory 1", "not finite", input="pdebench.h5")
    write(fields[..., :10])
    says_no(capfd, "20 x 10", "too coarse")
    write(0 * fields)
    says_no(capfd, "mine.hdf5", "not finite at any alpha")
    for interval in (0.1, 0.5, 0.0, float("nan")):
        write(fields, dt=interval)
        says_no(capfd, f"a frame every {interval:g}", "0.25 ahead")
    write_pdebench(fields, interval=0.125)
    says_no(capfd, "pdebench.h5 has 2 frames 0.25 apart, but 4 are needed", input="pdebench.h5")


def test_too_few_frames_for_the_network_are_refused(
    ends: tuple[Expert, Expert], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(truth(*ends, 0.6, frames=4))
    for frames in ("1", "0", "-3"):
        says_no(capfd, f"--frames {frames}", "give at least 2", more=("--frames", frames))
    two = make_ends(network={"history": 2})
    save_ends(here, two)
    says_no(capfd, "the network sees 2; give at least 3", more=("--frames", "2"))


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ({"network": {"size": "small"}, "family": {"grid": 24}}, ("have different networks",)),
        ({"family": {"name": "shallow_water"}}, ("shallow_water", "one family")),
    ],
)
def test_experts_that_do_not_match_are_refused(
    words: dict[str, Any],
    messages: tuple[str, ...],
    ends: tuple[Expert, Expert],
    here: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write(truth(*ends, 0.6, frames=4))
    other = make_expert(expert_config(**words), 5)
    save_expert(Path("high/checkpoints/1"), other.config, other.network, SCALE, CHANNELS)
    says_no(capfd, *messages)


def test_unsuitable_configs_are_refused(
    ends: tuple[Expert, Expert], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(truth(*ends, 0.6, frames=4))
    config(Path(), "linear", MODELS, parameters={"weight": 1}, output="merged")
    says_no(capfd, "for ccm, not for linear")
    config(Path(), "ccm", MODELS, sweep={"alpha": [0, 1]}, output="merged")
    says_no(capfd, "leave out sweep")
    config(Path(), "ccm", MODELS)
    says_no(capfd, "no output folder")
    config(Path(), "ccm", ["low", "high"], output="merged")
    says_no(capfd, "low is a run: name one of its checkpoints")
    config(Path(), "ccm", [MODELS[0], "absent"], output="merged")
    says_no(capfd, "absent does not exist")
    config(Path(), "ccm", MODELS, output=MODELS[1])
    says_no(capfd, "contain each other")
    says_no(capfd, "absent.yaml", path="absent.yaml")


def test_nan_in_the_weights_is_refused(
    ends: tuple[Expert, Expert], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(truth(*ends, 0.6, frames=4))
    broken = make_expert(expert_config(splits=["endpoint_high"]), 2)
    broken.weights()["lift.bias"].data[1] = float("nan")
    shutil.rmtree("high")
    save_expert(Path(MODELS[1]), broken.config, broken.network, SCALE, CHANNELS)
    says_no(capfd, "tensor lift.bias", "NaN", MODELS[1])


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("merge calibrate", "merge calibrate merge.yaml --output calibration.json"),
        ("merge prefix", "merge prefix merge.yaml --input mine.hdf5 --frames 4 --output merged"),
        ("merge", "merge configs/merge/example.yaml"),
    ],
)
def test_help(command: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    assert f"example: shodh {example}" in shown
    assert shown[0].startswith(f"usage: shodh {command} [-h]")


def test_invalid_arguments_give_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["prefix", "merge.yaml"], ["prefix", "a", "--input", "b", "--frames", "few"], ["calibrate"], []):
        with pytest.raises(SystemExit) as end:
            main(["merge", *arguments])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_an_alpha_for_each_group_of_layers(ends: tuple[Expert, Expert], here: Path, capsys: Any) -> None:
    wanted = {"input": 0.2, "blocks": 0.8, "output": 0.2}
    first = initial(0)
    write(torch.cat([first, by_group(*ends, wanted).predict(first, 3, 0.0)], dim=1))
    assert prefix("--output", "one") == prefix("--output", "each", "--by-group") == 0
    one, each = (json.loads(Path(name, "merge.json").read_text())["alpha"] for name in ("one", "each"))
    assert "by group: input " in capsys.readouterr().out
    assert each["error"] < one["error"]
    assert each["groups"].keys() == wanted.keys()
    expected, found = by_group(*ends, each["groups"]).weights(), load_expert(Path("each")).weights()
    assert all(torch.equal(values, expected[name]) for name, values in found.items())
