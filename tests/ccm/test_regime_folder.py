"""A folder of a user's own regimes as a family: files in two formats, the parameter in them or in a table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.ccm import data, pdebench, well
from shodh_moe.ccm.family_config import FamilyConfig
from shodh_moe.ccm.stages import make_data
from shodh_moe.cli import main as shodh
from tests.ccm.regime_files import X, Y, smooth, write_pdebench, write_well
from tests.ccm.tiny import config, tree

VALUES = (0.5, 1.0, 1.2, 1.5, 2.0, 2.5)


def section(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "root": str(folder / "data"),
        "source": str(folder / "files"),
        "parameter": "viscosity",
        "low": 1.0,
        "high": 2.0,
        "values": {"validation": [1.2], "ood_low": [0.5], "ood_high": [2.5]},
        "snapshots": 6,
        **changes,
    }


def write_files(folder: Path) -> dict[float, np.ndarray]:
    """Write a file of The Well for every value, one of them with several; return the fields by value."""
    fields = {value: smooth(3, 3, value) for value in VALUES}
    for value in VALUES[2:]:
        write_well(folder / "files" / "deep" / f"nu_{value}.hdf5", value, fields[value])
    both = np.concatenate([fields[0.5][:2], fields[1.0][:1], fields[0.5][2:], fields[1.0][1:]])
    write_well(folder / "files" / "both.hdf5", [0.5, 0.5, 1.0, 0.5, 1.0, 1.0], both)
    return fields


def test_the_well_is_read_with_its_components_and_constants(tmp_path: Path) -> None:
    fields = smooth(2, 3, 1.0)
    write_well(tmp_path / "a.hdf5", 0.25, fields)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:  # a field that does not vary with time or by trajectory
        item = file["t0_fields"].create_dataset("density", data=np.arange(X, dtype="f"))
        item.attrs.update(sample_varying=False, time_varying=False, dim_varying=[True, False])
        file["t0_fields"].attrs["field_names"] = ["pressure", "density"]
        item = file["t2_fields"].create_dataset("stress", data=np.arange(4, dtype="f").reshape(2, 2))
        item.attrs.update(sample_varying=False, time_varying=False, dim_varying=[False, False])
        file["t2_fields"].attrs["field_names"] = ["stress"]
    found = well.read(tmp_path / "a.hdf5", 1)
    names = (
        "pressure",
        "density",
        "velocity_x",
        "velocity_y",
        *(f"stress_{pair}" for pair in ("xx", "xy", "yx", "yy")),
    )
    assert found.channels == names
    assert found.fields.shape == (1, 7, 8, Y, X)
    torch.testing.assert_close(found.fields[:, :, [0, 2, 3]], torch.from_numpy(fields[1:]), rtol=0, atol=0)
    assert bool((found.fields[0, 3, 1] == torch.arange(X)).all())
    assert found.fields[0, 2, 4:, 5, 5].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert (found.interval, found.total, float(found.scalars["viscosity"])) == (0.5, 2, 0.25)


def test_every_split_holds_the_trajectories_of_its_values(tmp_path: Path) -> None:
    fields = write_files(tmp_path)
    one = FamilyConfig.model_validate(section(tmp_path))
    family, folder = one.family(), one.folder()
    data.generate(family, folder, lambda items, *_: iter(items))
    expected = {"support": (1.0, 1.5, 2.0), "endpoint_low": (1.0,), "endpoint_high": (2.0,)}
    expected |= {"validation": (1.2,), "ood_low": (0.5,), "ood_high": (2.5,)}
    assert set(family.coordinates) == set(expected)
    for split, values in expected.items():
        found = data.read_split(family, folder, split)
        assert [regime.value for regime in found] == list(values)
        assert [regime.coordinate for regime in found] == pytest.approx([2 * value - 3 for value in values])
        for regime in found:
            wanted = torch.from_numpy(fields[regime.value][:, :6])
            torch.testing.assert_close(regime.fields, wanted, rtol=0, atol=0)
            assert (regime.interval, regime.channels) == (0.5, ("pressure", "velocity_x", "velocity_y"))


def test_channels_snapshots_and_counts_can_be_chosen(tmp_path: Path) -> None:
    fields = write_files(tmp_path)
    changes = {"channels": ["velocity_y", "pressure"], "interval": 1.0, "snapshots": 3, "trajectories": {"support": 2}}
    one = FamilyConfig.model_validate(section(tmp_path, **changes))
    data.generate(one.family(), one.folder(), lambda items, *_: iter(items))
    support = data.read_split(one.family(), one.folder(), "support")
    wanted = torch.from_numpy(fields[1.0][:2, 0:6:2][:, :, [2, 0]])
    torch.testing.assert_close(support[0].fields, wanted, rtol=0, atol=0)
    assert support[0].interval == 1.0
    assert len(data.read_split(one.family(), one.folder(), "validation")[0].fields) == 3


@pytest.mark.parametrize("named", ["Du", "sim.Du"])
def test_pdebench_files_hold_the_parameter_of_their_generator(named: str, tmp_path: Path) -> None:
    for value in (1e-3, 2e-3, 3e-3):
        write_pdebench(tmp_path / "files" / f"{value}.h5", {"Du": value, "Dv": 5e-3}, smooth(2, 2, value))
    changes = {"parameter": named, "low": 1e-3, "high": 3e-3, "values": {"validation": [2e-3]}, "scale": "log"}
    family = FamilyConfig.model_validate(section(tmp_path, **changes)).family()
    assert family.channels == ("activator", "inhibitor")
    assert family.coordinates["support"] == (-1.0, 1.0)
    assert family.coordinates["validation"] == pytest.approx([0.2618595])


def test_a_table_gives_the_parameter(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 2.0, 1.5)):
        write_well(tmp_path / "files" / f"{number}.hdf5", 7.0, smooth(1, 3, value))
    table = tmp_path / "regimes.csv"
    table.write_text("file, slope\n0.hdf5, 1\n1.hdf5, 2\n2.hdf5, 1.5\n")
    changes = {"parameter": "slope", "table": str(table), "values": {"validation": [1.5]}}
    one = FamilyConfig.model_validate(section(tmp_path, **changes))
    assert one.family().coordinates["validation"] == (0.0,)
    before = one.folder()
    table.write_text("file, slope\n0.hdf5, 2\n1.hdf5, 1\n2.hdf5, 1.5\n")
    assert one.folder() != before


def test_the_content_of_the_files_counts_and_not_their_place(tmp_path: Path) -> None:
    write_files(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = (FamilyConfig.model_validate(section(tmp_path / name)) for name in "ab")
    assert a.folder().name == b.folder().name
    make_data(config(tmp_path, family=section(tmp_path / "a"), rollout=[1]))
    assert list((tmp_path / "a" / "data" / ".data").glob("*.json"))  # hashes for later commands
    with h5py.File(tmp_path / "b" / "files" / "both.hdf5", "r+") as file:
        file["t0_fields/pressure"][0, 0, 0, 0] += 1
    assert a.folder().name != b.folder().name


def _add(folder: Path, name: str, **words: Any) -> None:
    fields = words.pop("fields", smooth(1, 3, 9.0))
    write_well(folder / "files" / name, words.pop("value", 9.0), fields, **words)


@pytest.mark.parametrize(
    ("spoil", "changes", "words"),
    [
        (lambda f: None, {"parameter": "gravity"}, "both.hdf5 has no parameter 'gravity' (its parameters: viscosity)"),
        (lambda f: None, {"channels": ["vorticity"]}, "has no channel 'vorticity': choose from pressure, velocity_x,"),
        (
            lambda f: None,
            {"values": {"validation": [1.3]}},
            "no trajectories with viscosity 1.3 (validation): it has 0.5",
        ),
        (lambda f: None, {"low": 0.9}, "no trajectories with viscosity 0.9 (endpoint_low)"),
        (lambda f: None, {"interval": 0.7}, "interval is 0.7, but the files have a snapshot every 0.5"),
        (lambda f: None, {"snapshots": 8}, "the files have 7 snapshots 0.5 apart, but family.snapshots is 8"),
        (lambda f: _add(f, "z.hdf5", step=0.25), {}, "z.hdf5 has the interval 0.25, but"),
        (lambda f: _add(f, "z.hdf5", fields=smooth(1, 3, 9.0, (20, 20))), {}, "has the shape 20 x 20, but"),
        (lambda f: _add(f, "z.hdf5", value=float("nan")), {}, "viscosity of trajectory 0 is nan"),
        (lambda f: (f / "files" / "z.h5").write_text("text"), {}, "z.h5 cannot be read"),
        (lambda f: shutil.rmtree(f / "files" / "deep"), {}, "no trajectories with viscosity 2 (endpoint_high)"),
        (lambda f: (f / "t.csv").write_text("name,viscosity\n"), {"table": "t.csv"}, "the columns file and viscosity"),
        (lambda f: (f / "t.csv").write_text("file,viscosity\nboth.hdf5,1\n"), {"table": "t.csv"}, "no line for deep/"),
        (lambda f: (f / "t.csv").write_text("file,viscosity\nx.h5,1\n"), {"table": "t.csv"}, "line 2: "),
        (lambda f: (f / "t.csv").write_text("file,viscosity\nboth.hdf5,a\n"), {"table": "t.csv"}, "viscosity is 'a'"),
        (lambda f: None, {"table": "none.csv"}, "family.table: cannot read"),
    ],
)
def test_folders_that_are_no_family_are_refused(
    spoil: Any, changes: dict[str, Any], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    spoil(tmp_path)
    if "table" in changes:
        changes = {**changes, "table": str(tmp_path / changes["table"])}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, family=section(tmp_path, **changes))))
    assert shodh(["expert", "data", "--config", str(path)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f["dimensions"].attrs.__setitem__("spatial_dims", ["x", "y", "z"]), "has 3 axes of space"),
        (lambda f: f.__delitem__("dimensions/time"), "is not complete"),
        (lambda f: f["dimensions/time"].__setitem__(3, 9.0), "not evenly spaced"),
        (lambda f: f["t0_fields/pressure"].__setitem__((0, 1, 2, 3), np.inf), "trajectory 0 has values that are not"),
        (
            lambda f: f["t0_fields/pressure"].attrs.__setitem__("time_varying", False),
            "has shape (2, 7, 24, 20), expected",
        ),
        (lambda f: [f.__delitem__(f"t{order}_fields") for order in range(3)], "has no fields"),
    ],
)
def test_files_outside_the_schema_are_refused(spoil: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    write_well(path, 1.0, smooth(2, 3, 1.0))
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(UserError) as raised:
        well.read(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_values_in_other_files_are_refused(tmp_path: Path) -> None:
    write_well(tmp_path / "secret.hdf5", 1.0, smooth(2, 3, 1.0))
    write_pdebench(tmp_path / "b.h5", {"Du": 1.0}, smooth(2, 2, 1.0))
    for name in ("link.hdf5", "odd.hdf5"):
        write_well(tmp_path / name, 1.0, smooth(2, 3, 1.0))
    with h5py.File(tmp_path / "link.hdf5", "r+") as file:
        del file["t0_fields/pressure"]
        file["t0_fields/pressure"] = h5py.ExternalLink("secret.hdf5", "t0_fields/pressure")
    with pytest.raises(UserError, match=r"link\.hdf5: t0_fields/pressure keeps its values in other files"):
        well.read(tmp_path / "link.hdf5")
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        del file["0001/data"]
        layout = h5py.VirtualLayout((7, 20, 24, 2), "f4")
        layout[...] = h5py.VirtualSource(tmp_path / "other.h5", "0001/data", (7, 20, 24, 2))
        file.create_virtual_dataset("0001/data", layout)
    with pytest.raises(UserError, match=r"b\.h5: 0001/data keeps its values in other files"):
        pdebench.read(tmp_path / "b.h5")
    with h5py.File(tmp_path / "odd.hdf5", "r+") as file:
        file["t0_fields"].move("pressure", "\x1b[31m")
        file["t0_fields"].attrs["field_names"] = ["\x1b[31m"]
    with pytest.raises(UserError, match=r"has a field '\\x1b\[31m'"):
        well.read(tmp_path / "odd.hdf5")


def test_trajectories_that_a_file_does_not_have_are_refused(tmp_path: Path) -> None:
    write_well(tmp_path / "a.hdf5", 1.0, smooth(2, 3, 1.0))
    with pytest.raises(UserError, match="no trajectories 5 to 9"):
        well.read(tmp_path / "a.hdf5", 5, 9)


@pytest.mark.distributed
def test_a_folder_becomes_experts_and_a_merge_at_what_a_new_file_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the user's files to training, calibration, readout and a merged expert, by the commands."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    training = {"steps": 2, "batch_size": 3, "warmup_steps": 1}
    common = {"family": section(tmp_path), "rollout": [1], "parallel": {"processes": 1}}
    for name, splits in (("anchor", "support"), ("low", "endpoint_low"), ("high", "endpoint_high")):
        start = {} if name == "anchor" else {"start": "runs/anchor"}
        content = tree(tmp_path, name=name, splits=[splits], training=training, **common, **start)
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
        assert shodh(["expert", "train", "--config", f"{name}.yaml"]) == 0
    ends = [
        {"model": f"runs/{name}/checkpoints/2", "parameters": {"coordinate": value}}
        for name, value in (("low", 1.0), ("high", 2.0))
    ]
    merge = {"merge_method": "ccm", "models": ends, "parameters": {"coordinate": 1.7}, "output": "merged"}
    Path("merge.yaml").write_text(yaml.safe_dump(merge))
    assert shodh(["merge", "calibrate", "merge.yaml", "--output", "c.json"]) == 0
    found = json.loads(Path("c.json").read_text())
    assert [(one["value"], one["trajectories"]) for one in found["regimes"]] == [(1.2, 3)]
    write_well(Path("new.hdf5"), 99.0, smooth(2, 3, 1.8))
    assert shodh(["merge", "prefix", "merge.yaml", "--input", "new.hdf5"]) == 0
    record = json.loads(Path("merged/merge.json").read_text())["alpha"]
    assert (record["found"], record["trajectories"]) == ("prefix", 2)
    capfd.readouterr()
    # The user's files change: the run is not resumed on other data.
    write_well(Path("files/deep/nu_1.5.hdf5"), 1.5, smooth(3, 3, 7.0))
    assert shodh(["expert", "train", "--config", "anchor.yaml"]) == 2
    assert "was trained on ccm-" in capfd.readouterr().err
