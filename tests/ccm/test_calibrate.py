"""`shodh merge calibrate`: gamma and the straight range from validation files only, and refused input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

from shodh_moe.ccm.expert import Expert
from shodh_moe.ccm.readout import GAMMAS, fit_scale
from shodh_moe.ccm.windows import Scale
from shodh_moe.checkpoint.state import load_state
from shodh_moe.cli import main
from tests.ccm.synthetic import (
    CHANNELS,
    GRID,
    SCALE,
    expert_config,
    make_ends,
    make_expert,
    save_ends,
    save_expert,
    truth,
    write_split,
    write_validation,
)
from tests.merging.models import config, merged, network, save
from tests.tiny import refused, tree

MODELS = ["low/checkpoints/1", "high/checkpoints/1"]


@pytest.fixture(scope="module")
def saved(ends: tuple[Expert, Expert], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, and validation data at alpha = 1.2 s."""
    folder = tmp_path_factory.mktemp("saved")
    save_ends(folder, ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_validation(*ends, gamma=1.2)
    return folder


@pytest.fixture
def here(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with copies of `saved` and a config."""
    shutil.copytree(saved, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    config(Path(), "ccm", MODELS, parameters={"alpha": 0.5}, output="merged")
    return tmp_path / "here"


def says_no(
    capfd: pytest.CaptureFixture[str], *messages: str, path: str = "merge.yaml", output: str = "c.json"
) -> None:
    """Check that the command is refused in one line and changes nothing."""
    before = tree(Path())
    refused(capfd, "merge", "calibrate", path, "--output", output, says=messages)
    assert tree(Path()) == before


def test_it_finds_the_gamma_of_the_data_and_prints_the_config_lines(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "calibrate", "merge.yaml", "--output", "new/calibration.json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    found = json.loads(Path("new/calibration.json").read_text())
    assert found["gamma"] == 1.2
    assert shown[-2:] == ["gamma: 1.2", f"straight: {found['straight']:g}"]
    assert [line.split()[0] for line in shown if "smallest" in line] == ["1.2"]
    assert len(found["errors"]) == len(GAMMAS)
    assert found["errors"]["1.2"] < 1e-5 < 1e-3 < found["errors"]["1.0"]
    assert any(line.startswith(f"gamma = 1: error {found['errors']['1.0']:.4g},") for line in shown)
    assert found["bend"]["-2.00"] > found["bend"]["-1.25"] > 0
    assert [one["coordinate"] for one in found["regimes"]] == [-1.2, -0.6, 0.6, 1.2]
    assert {one["trajectories"] for one in found["regimes"]} == {2}
    assert found["experts"] == {
        end: {"path": path, "state_sha256": load_state(Path(path))["sha256"]}
        for end, path in zip(("low", "high"), MODELS, strict=True)
    }
    assert not Path("merged").exists()


def test_a_merge_can_use_the_printed_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = [(MODELS[0], {"coordinate": 2e-3}), (MODELS[1], {"coordinate": 6e-3})]
    place = {"coordinate": 5e-3, "power": 0}
    path = config(Path(), "ccm", ends, parameters=place, output="merged")
    assert main(["merge", "calibrate", str(path)]) == 0
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines()[-2:])
    merged(here, "ccm", ends, parameters={**place, **{key: float(value) for key, value in printed.items()}})
    alpha = json.loads((here / "out" / "merge.json").read_text())["alpha"]
    s = expert_config().family.family().coordinate(5e-3)
    assert alpha["value"] == pytest.approx(1.2 * s)


def test_experts_may_have_different_amounts_of_training_data(
    ends: tuple[Expert, Expert], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the training data differ; the validation data are the same."""
    more = expert_config(splits=["endpoint_high"], family={"trajectories": {"endpoint_high": 99}})
    assert more.family.folder() != ends[1].config.family.folder()
    save_expert(Path(MODELS[1]), more, ends[1].network, SCALE, CHANNELS)
    assert main(["merge", "calibrate", "merge.yaml"]) == 0
    assert "gamma: 1.2" in capsys.readouterr().out


def test_runs_can_be_given_instead_of_checkpoints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(Path(), "ccm", ["low", "high"], output="merged")
    assert main(["merge", "calibrate", str(path)]) == 0
    assert "gamma: 1.2" in capsys.readouterr().out


def test_only_the_validation_files_are_opened(
    ends: tuple[Expert, Expert], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No other split exists here; reading any other file would be detected too.
    validation = sorted(Path("data").rglob("*.hdf5"))
    assert {path.parent.name for path in validation} == {"validation"}
    for split in ("support", "ood_high", "interpolation"):
        places = {s: truth(*ends, -s) for s in (0.25, 0.5, 1.35)}
        for path in write_split(ends[0].config, split, places):
            path.write_bytes(b"damaged")
    opened = []
    original = h5py.File

    def watched(name: Any, *arguments: Any, **words: Any) -> h5py.File:
        opened.append(Path(name))
        return original(name, *arguments, **words)

    monkeypatch.setattr(h5py, "File", watched)
    assert main(["merge", "calibrate", "merge.yaml"]) == 0
    assert sorted(set(opened)) == validation


def test_the_first_frames_are_not_counted(ends: tuple[Expert, Expert], here: Path) -> None:
    family = ends[0].config.family.family()
    fields = {s: truth(*ends, 0.8 * s, seed=n) for n, s in enumerate(family.coordinates["validation"])}
    for one in fields.values():
        one[:, :3] = truth(*ends, -1.5, frames=3)  # other flows
    write_split(ends[0].config, "validation", fields)
    assert main(["merge", "calibrate", "merge.yaml", "--output", "c.json"]) == 0
    assert json.loads(Path("c.json").read_text())["gamma"] == 0.8


def test_a_gamma_at_the_end_of_the_range_warns(
    ends: tuple[Expert, Expert], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_validation(*ends, gamma=0.1)
    assert main(["merge", "calibrate", "merge.yaml"]) == 0
    assert "gamma 0.4 is at the end of the range" in capsys.readouterr().out


def test_missing_or_damaged_validation_data(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = sorted(Path("data").rglob("*.hdf5"))
    files[1].write_bytes(b"no HDF5")
    says_no(capfd, str(files[1]), "generate the data again")
    files[1].unlink()
    says_no(capfd, str(files[1]), "do not exist", "`shodh expert data --config CONFIG`", "low/checkpoints/1")


def test_validation_data_with_nan(ends: tuple[Expert, Expert], here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fields = truth(*ends, 0.6)
    fields[0, 2, 1, 3, 4] = float("nan")
    (path,) = write_split(ends[0].config, "validation", {0.6: fields})
    says_no(capfd, str(path), "not finite")


def test_too_few_snapshots(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    low, high = make_ends(family={"snapshots": 4})
    save_ends(here, (low, high))
    write_validation(low, high, 1.0)
    says_no(capfd, "have 4 snapshots, and the first 4 are given")


def test_diverging_rollouts_are_refused(
    ends: tuple[Expert, Expert], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = ends[0].config.family.family().coordinates["validation"]
    # A frame of zeros has no relative error.
    write_split(ends[0].config, "validation", {s: 0 * truth(*ends, s) for s in places})
    says_no(capfd, "not finite at any gamma")


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ({"network": {"size": "small"}, "family": {"grid": 24}}, ("have different networks",)),
        ({"network": {"history": 2}}, ("have different networks",)),
        ({"family": {"name": "navier_stokes"}}, ("family reaction_diffusion", "navier_stokes", "one family")),
        ({"family": {"seed": 5}}, ("different validation data",)),
        ({"family": {"high": 7e-3}}, ("whose high differs (None and 0.007)", "one family")),
        ({"splits": ["endpoint_low"]}, ("trained on endpoint_low", "swap the two models")),
    ],
)
def test_experts_that_do_not_match_are_refused(
    words: dict[str, Any], messages: tuple[str, ...], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_expert(expert_config(**words), 5)
    save_expert(Path("high/checkpoints/1"), other.config, other.network, SCALE, CHANNELS)
    says_no(capfd, *messages)


def test_experts_with_other_units_or_bad_coordinates_are_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    high = make_expert(expert_config(), 5, scale=Scale((0.0, 0.0), (1.0, 1.0)))
    save_expert(Path("high/checkpoints/1"), high.config, high.network, high.scale, CHANNELS)
    says_no(capfd, "have different units")
    conditioned = make_ends(network={"conditioned": True})
    save_ends(here, conditioned)
    says_no(capfd, "takes the coordinate as input")
    broken = make_expert(expert_config(), 5)
    broken.weights()["lift.bias"].data[1] = float("nan")
    save_ends(here, [make_expert(expert_config(), 5), broken])
    says_no(capfd, MODELS[1], "lift.bias", "NaN")
    save_ends(here, [make_expert(expert_config(), 5)] * 2)
    says_no(capfd, "the same weights")


def test_coordinates_that_do_not_match_gamma_are_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def ends(low: float, high: float, **parameters: Any) -> None:
        models = [(path, {"coordinate": place}) for path, place in zip(MODELS, (low, high), strict=True)]
        config(Path(), "ccm", models, parameters=parameters, output="merged")

    ends(2e-3, 6e-3)
    says_no(capfd, "0.002 and 0.006", "`power: 0`")
    ends(2e-3, 7e-3, power=0)
    says_no(capfd, "0.002 and 0.006", "`power: 0`")
    ends(6e-3, 2e-3, power=0)
    says_no(capfd, "belongs at the other end")
    ends(-1, 1, power=0)
    says_no(capfd, "0.002 and 0.006", "`power: 0`")
    ends(-1, 1)
    assert main(["merge", "calibrate", "merge.yaml"]) == 0


def test_unsuitable_configs_are_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config(Path(), "linear", MODELS, parameters={"weight": 1}, output="merged")
    says_no(capfd, "merge.yaml", "for ccm, not for linear")
    config(Path(), "ccm", MODELS, sweep={"alpha": [0, 1]}, output="merged")
    says_no(capfd, "merge.yaml", "leave out sweep")
    config(Path(), "ccm", [*MODELS, "third"], output="merged")
    says_no(capfd, "2 models", "models has 3")
    corners = [
        (path, {"coordinate": {"x": x, "y": y}})
        for path, (x, y) in zip("abcd", ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True)
    ]
    config(Path(), "ccm", corners, output="merged")
    says_no(capfd, "finds one alpha", "2 axes")
    says_no(capfd, "absent.yaml", path="absent.yaml")


def test_models_that_are_not_experts_are_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config(Path(), "ccm", [MODELS[0], "absent"], output="merged")
    says_no(capfd, "absent", "neither a run folder nor a checkpoint")
    save(network(), Path("model.safetensors"))
    config(Path(), "ccm", [MODELS[0], "model.safetensors"], output="merged")
    says_no(capfd, "model.safetensors", "neither a run folder nor a checkpoint")
    file = Path(MODELS[1]) / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    config(Path(), "ccm", MODELS, output="merged")
    says_no(capfd, MODELS[1], "refused", "truncated")


def test_an_existing_output_is_not_changed(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    says_no(capfd, "merge.yaml exists", output="merge.yaml")
    says_no(capfd, "low exists", output="low")
    says_no(capfd, "a file stands where a folder is needed", output="merge.yaml/c.json")


def test_gamma_equals_the_readouts(ends: tuple[Expert, Expert], here: Path) -> None:
    from shodh_moe.ccm.calibrate import calibrate
    from shodh_moe.ccm.data import read_split

    family = ends[0].config.family
    direct = fit_scale(*ends, read_split(family.family(), family.folder(), "validation"))
    found = calibrate(Path("merge.yaml"))
    assert found["errors"] == pytest.approx(direct["errors"], rel=1e-5)
    assert family.grid == GRID
