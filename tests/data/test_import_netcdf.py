"""What a NetCDF file states about its units, axes, coordinates and times is used, and a contradiction is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.data import list_trajectories, read_provenance, read_trajectory
from shodh_moe.data.importing import import_data, load_mapping
from shodh_moe.data.importing.units import conversion
from tests.tiny import quiet

GRID = (8, 8, 16)
FORMATS = ("NETCDF4", "NETCDF3_CLASSIC")
BASE: dict[str, Any] = {
    "name": "theirs",
    "domain": "box",
    "files": {"train": ["a.nc"]},
    "axes": ["t", "x", "y", "z"],
    "velocity": ["u", "v", "w"],
    "pressure": "p",
    "coordinates": {"x": "x", "y": "y", "z": "z"},
    "time": "time",
    "boundaries": {"x": "open", "y": "open", "z": "open"},
    "units": {"length": "m", "time": "s", "pressure": "Pa"},
}
UNITS = {"u": "cm/s", "v": "cm s-1", "w": "cm s**-1", "p": "hPa", "x": "km", "y": "km", "z": "km"}
HOURS = "hours since 2000-01-01"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fields() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((3, *GRID)) for name in "uvwp"}


def write(
    path: str = "a.nc",
    units: dict[str, str] = UNITS,
    time: str | None = HOURS,
    file_format: str = "NETCDF4",
    dimensions: tuple[str, ...] = ("time", "x", "y", "z"),
    first: float = 0,
) -> None:
    """Write three snapshots an hour apart; the points are 0.25 units apart."""
    with netCDF4.Dataset(path, "w", format=file_format) as file:
        for name, size in zip(dimensions, (None, *GRID), strict=True):
            file.createDimension(name, size)
        for name, values in fields().items():
            file.createVariable(name, "f8", dimensions)[:] = values
        for name, size in zip("xyz", GRID, strict=True):
            dimension = dimensions[1 + "xyz".index(name)]
            file.createVariable(name, "f8", (dimension,))[:] = 0.25 * np.arange(size)
        times = file.createVariable("time", "f8", (dimensions[0],))
        times[:] = first + np.arange(3.0)
        if time:
            times.units = time
        for name, unit in units.items():
            file[name].units = unit


def imported(**changes: Any) -> Path:
    tree = {**BASE, **changes}
    Path("mapping.yaml").write_text(yaml.safe_dump({key: one for key, one in tree.items() if one is not None}))
    return import_data(load_mapping("mapping.yaml"), Path("out"), progress=quiet)


@pytest.mark.parametrize("file_format", FORMATS)
def test_units_of_the_file_give_the_factors(file_format: str) -> None:
    write(file_format=file_format)
    (record,) = list_trajectories(imported(), "train")
    stored, given = read_trajectory(record), fields()
    np.testing.assert_allclose(
        stored.velocity_T3XYZ, 0.01 * np.stack([given[name] for name in "uvw"], 1), rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(stored.pressure_T1XYZ[:, 0], 100 * given["p"], rtol=1e-6, atol=1e-9)
    assert record.interval == 3600
    assert record.spacing == (250, 250, 250)
    scale = read_provenance(record.path)["scale"]
    assert scale == {"length": 1000, "time": 3600, "velocity": pytest.approx(0.01), "pressure": pytest.approx(100)}
    # The same factors in the mapping are no contradiction.
    imported(scale={"length": 1000.0, "time": 3600.0, "velocity": 0.01, "pressure": 100.0})


def test_the_scale_of_the_mapping_holds_where_units_are_unknown() -> None:
    scale = {"length": 3.0, "time": 5.0, "velocity": 7.0, "pressure": 11.0}
    stated = {"u": "code units", "v": "code units", "w": "code units", "p": "1"}
    for units, mine in ((stated, BASE["units"]), ({}, BASE["units"]), (UNITS, {"length": "L", "time": "T"})):
        write(units=units, time=None if units is not UNITS else HOURS)
        (record,) = list_trajectories(imported(units=mine, scale=scale), "train")
        np.testing.assert_allclose(read_trajectory(record).velocity_T3XYZ[:, 0], 7 * fields()["u"], rtol=1e-6)
        assert (record.interval, record.spacing) == (5, (0.75, 0.75, 0.75))


@pytest.mark.parametrize(
    ("units", "changes", "message"),
    [
        (UNITS, {"scale": {"velocity": 1.0}}, r"a.nc: u is in 'cm/s'.*'m/s' is 0.01, but scale.velocity is 1"),
        (UNITS, {"scale": {"length": 1.0}}, r"a.nc: x is in 'km'.*factor to 'm' is 1000, but scale.length is 1"),
        (UNITS, {"scale": {"time": 60.0}}, r"a.nc: time is in 'hours since.*is 3600, but scale.time is 60"),
        ({**UNITS, "w": "m/s"}, {}, r"u is in 'cm/s', but w of a.nc in 'm/s'"),
        ({**UNITS, "u": "K", "v": "K", "w": "K"}, {"velocity": ["p", "p", "p"]}, r"p is in 'hPa', which does not conv"),
        (
            UNITS,
            {"units": {"length": "m", "time": "s"}},
            r"p is in 'hPa'.*units.pressure, or set scale.pressure to one",
        ),
        (UNITS, {"spacing": 0.25, "coordinates": None}, r"x goes in steps of 250 m, but.* spacing along x is 0.25"),
        (UNITS, {"time_step": 1.0, "time": None}, r"time_step is 1, but the times in the files go in steps of 3600"),
    ],
)
def test_a_mapping_that_contradicts_the_units_is_refused(
    units: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    write(units=units)
    with pytest.raises(UserError, match=message):
        imported(**changes)
    assert not list(Path("out").rglob("*.hdf5"))


def test_contradictions_that_are_none() -> None:
    write()
    density = {"units": {"length": "m", "time": "s"}, "scale": {"pressure": 0.1}}
    (record,) = list_trajectories(imported(**density), "train")
    np.testing.assert_allclose(read_trajectory(record).pressure_T1XYZ[:, 0], 0.1 * fields()["p"], rtol=1e-6)
    imported(spacing=250.0, coordinates=None, time_step=3600.0, time=None)
    imported(spacing=0.25, coordinates=None, time_step=1.0, time=None, scale={"length": 1000.0, "time": 3600.0})


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("dimensions", "axes", "message"),
    [
        (("time", "x", "y", "z"), None, None),
        (("nt", "nx", "ny", "nz"), None, None),
        (("time", "lon", "lat", "level"), None, None),
        (("time", "z", "y", "x"), None, r"u has the dimensions \(time, z, y, x\).*correct axes to \[t, z, y, x\]"),
        (("time", "nz", "lat", "nx"), None, r"dimensions \(time, nz, lat, nx\).*correct axes to \[t, z, y, x\]"),
        (("x", "y", "z", "time"), None, r"correct axes"),
    ],
)
def test_names_of_dimensions_are_compared_with_the_axes(
    file_format: str, dimensions: tuple[str, ...], axes: list[str] | None, message: str | None
) -> None:
    write(dimensions=dimensions, file_format=file_format)
    changes = {"axes": axes or BASE["axes"], "coordinates": None, "spacing": 250.0}
    if message:
        with pytest.raises(UserError, match=message):
            imported(**changes)
    else:
        imported(**changes)


def test_dimensions_without_coordinates_are_no_datasets() -> None:
    """NetCDF 4 keeps them in datasets full of zeros."""
    with netCDF4.Dataset("a.nc", "w") as file:
        for name, size in zip(("time", "x", "y", "z"), (3, *GRID), strict=True):
            file.createDimension(name, size)
        for name, values in fields().items():
            file.createVariable(name, "f8", ("time", "x", "y", "z"))[:] = values
    with pytest.raises(UserError, match="no dataset 'x'; it has p, u, v, w"):
        imported(time=None, time_step=1.0)
    with pytest.raises(UserError, match="no dataset 'time'"):
        imported(coordinates=None, spacing=1.0)
    imported(time=None, time_step=1.0, coordinates=None, spacing=1.0)


def test_times_since_different_days_are_not_mixed() -> None:
    write("a.nc", time="hours since 2000-01-01")
    write("b.nc", time="hours since 2000-01-02", first=3)
    with pytest.raises(UserError, match=r"a.nc is in 'hours since 2000-01-01', but time of b.nc in 'hours since 2000-"):
        imported(files={"train": [["a.nc", "b.nc"]]})
    write("b.nc", time="hours since 2000-01-01", first=3)
    (record,) = list_trajectories(imported(files={"train": [["b.nc", "a.nc"]]}), "train")
    assert record.n_snapshots == 6


def test_files_in_different_units_are_not_mixed() -> None:
    write("a.nc")
    write("b.nc", first=3, units={**UNITS, "p": "Pa"})
    with pytest.raises(UserError, match=r"a.nc: p is in 'hPa', but p of b.nc in 'Pa'"):
        imported(files={"train": [["a.nc", "b.nc"]]})
    assert not list(Path("out").rglob("*.hdf5"))


@pytest.mark.parametrize(
    ("quantity", "unit", "wanted", "factor"),
    [
        ("velocity", "m.s-1", "m/s", 1),
        ("velocity", "km h-1", "m/s", 1 / 3.6),
        ("velocity", "meters/second", "cm/s", 100),
        ("length", "micrometer", "m", 1e-6),
        ("length", "\u00b5m", "m", 1e-6),
        ("time", "days since 1900-01-01 00:00:00", "s", 86400),
        ("pressure", "kg m-1 s-2", "Pa", 1),
        ("pressure", "m2 s-2", "(m/s)^2", 1),
        ("pressure", "dyn/cm^2", "Pa", 0.1),
        ("length", "km", "L", None),
        ("velocity", "L/T", "m/s", None),
        ("velocity", "9**9**9**9", "m/s", None),
        ("velocity", "m**4**4**4**4", "m/s", None),
        ("velocity", "1", "m/s", None),
        ("velocity", "__import__('os')", "m/s", None),
    ],
)
def test_conversion_of_units(quantity: str, unit: str, wanted: str, factor: float | None) -> None:
    found = conversion(quantity, unit, wanted, "a.nc: u")
    assert found is None if factor is None else found == pytest.approx(factor)
