"""NetCDF's packed, missing and invalid values are read as the netCDF4 library reads them, value by value."""

from __future__ import annotations

import base64
import itertools
import struct
import warnings
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.formats import open_file

NUMBERS = [0, 1, 2, 3, 100, -1, -2, -100, -128, 127]
WIDE = [*NUMBERS, -32767, 32767, 9.969209968386869e36, -9999, 1e20, np.nan, -999.9]


def write(path: Path, variables: dict[str, tuple[str, dict[str, Any]]], file_format: str, fill: bool = True) -> None:
    """Write variables of a type with attributes; each holds every number that its type can, and one unwritten place."""
    with netCDF4.Dataset(path, "w", format=file_format) as file:
        file.createDimension("x", 30)
        for name, (dtype, attributes) in variables.items():
            fill_value = attributes.get("_FillValue", None if fill else False)
            variable = file.createVariable(name, dtype, ("x",), fill_value=fill_value)
            variable.set_auto_maskandscale(False)
            with np.errstate(all="ignore"):
                numbers = np.array(WIDE).astype(dtype) if dtype[0] == "f" else np.array(WIDE[:12]).astype("i8")
            if dtype[0] != "f":
                limits = np.iinfo(dtype)
                numbers = numbers[(numbers >= limits.min) & (numbers <= limits.max)].astype(dtype)
            if np.dtype(dtype).itemsize == 1:
                numbers = np.resize(numbers, 30)  # unwritten bytes are valid here, and missing in the library
            variable[: len(numbers)] = numbers
            for key, value in attributes.items():
                if key != "_FillValue":
                    variable.setncattr(key, value)


def theirs(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Values of the netCDF4 library, NaN where masked, and its warnings."""
    with warnings.catch_warnings(record=True) as caught, netCDF4.Dataset(path) as file:
        warnings.simplefilter("always")
        values = {name: variable[...] for name, variable in file.variables.items()}
    found = {name: np.ma.filled(one.astype(np.float64), np.nan) for name, one in values.items()}
    return found, [str(one.message) for one in caught]


def ours(path: Path) -> dict[str, np.ndarray]:
    with open_file(path) as file:
        return {name: file.array(name).read((slice(None),)) for name in file.names}


def combinations() -> dict[str, tuple[str, dict[str, Any]]]:
    """Variables of two types with every pair of these attributes, and of other types with each of them."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for dtype in ("i1", "i2", "i4", "f4", "f8"):
        kind = np.dtype(dtype).type
        single: list[dict[str, Any]] = [
            {},
            {"scale_factor": 0.1},
            {"scale_factor": 0.5, "add_offset": -3.0},
            {"add_offset": np.float32(2)},
            {"_FillValue": kind(-1)},
            {"missing_value": kind(-2)},
            {"missing_value": np.array([3, 100], dtype)},
            {"missing_value": 2.0},
            {"valid_min": kind(-2)},
            {"valid_max": kind(100)},
            {"valid_range": np.array([-100, 3], dtype)},
            # The library fails for unsigned bytes without a fill value.
            {"_Unsigned": "true", **({"_FillValue": kind(-1)} if dtype == "i1" else {})},
            {"_Unsigned": "false"},
        ]
        if dtype[0] == "f":
            single += [{"missing_value": kind(np.nan)}, {"_FillValue": kind(1e20)}]
        pairs = [{**one, **other} for one, other in itertools.combinations(single, 2)]
        pairs = pairs if dtype in ("i2", "f4") else single
        found |= {f"{dtype}_{number}": (dtype, attributes) for number, attributes in enumerate(pairs)}
    return found


@pytest.mark.parametrize(
    ("file_format", "fill"),
    [
        *(("NETCDF4", True), ("NETCDF4", False), ("NETCDF4_CLASSIC", True)),
        *(("NETCDF3_CLASSIC", True), ("NETCDF3_64BIT_OFFSET", False)),
    ],
)
def test_values_equal_those_of_the_netcdf4_library(tmp_path: Path, file_format: str, fill: bool) -> None:
    variables = combinations()
    write(tmp_path / "a.nc", variables, file_format, fill)
    (wanted, warned), found = theirs(tmp_path / "a.nc"), ours(tmp_path / "a.nc")
    assert not warned
    assert found.keys() == wanted.keys() == variables.keys()
    for name, (dtype, attributes) in variables.items():
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6, atol=0, err_msg=f"{dtype} {attributes}")
    assert sum(np.isnan(one).sum() for one in wanted.values()) > len(variables)


def test_unsigned_types_and_large_integers(tmp_path: Path) -> None:
    variables: dict[str, tuple[str, dict[str, Any]]] = {
        f"{dtype}_{number}": (dtype, attributes)
        for dtype in ("u1", "u2", "u4", "i8", "u8")
        for number, attributes in enumerate(({}, {"missing_value": np.dtype(dtype).type(3)}, {"_Unsigned": "false"}))
    }
    write(tmp_path / "a.nc", variables, "NETCDF4")
    (wanted, _), found = theirs(tmp_path / "a.nc"), ours(tmp_path / "a.nc")
    for name, (dtype, attributes) in variables.items():
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"{dtype} {attributes}")


@pytest.mark.parametrize("file_format", ["NETCDF4", "NETCDF3_CLASSIC"])
@pytest.mark.parametrize(
    ("dtype", "attributes", "missing"),
    [
        # The library ignores these with a warning, and returns the numbers as values.
        ("f4", {"missing_value": "-9999"}, -9999),
        ("f4", {"missing_value": "-9999, 1e20"}, 1e20),
        ("f4", {"missing_value": -999.9}, -999.9),
        ("f4", {"valid_min": "-100"}, -9999),
    ],
)
def test_missing_values_that_the_library_does_not_use(
    tmp_path: Path, file_format: str, dtype: str, attributes: dict[str, Any], missing: float
) -> None:
    write(tmp_path / "a.nc", {"u": (dtype, attributes)}, file_format)
    wanted, warned = theirs(tmp_path / "a.nc")
    assert "not used" in warned[0]
    found = ours(tmp_path / "a.nc")["u"]
    ignored = np.isclose(wanted["u"], missing)
    assert ignored.sum() == 1
    assert np.isnan(found[ignored]).all()


@pytest.mark.parametrize(
    ("dtype", "attributes", "message"),
    [
        ("f4", {"missing_value": "n/a"}, r"a.nc: u: missing_value is 'n/a', expected a number"),
        ("i2", {"missing_value": 1e20}, r"a.nc: u: missing_value is 1e\+20, which the stored type int16 cannot hold"),
        ("i2", {"valid_min": 0.5}, r"a.nc: u: valid_min is 0.5, which the stored type int16 cannot hold"),
        ("i2", {"scale_factor": np.array([0.1, 0.2])}, r"a.nc: u: scale_factor holds 2 numbers, expected 1"),
        ("i2", {"valid_range": np.array([1, 2, 3], "i2")}, r"a.nc: u: valid_range holds 3 numbers, expected 2"),
    ],
)
def test_attributes_that_mean_nothing_are_refused(
    tmp_path: Path, dtype: str, attributes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "a.nc", {"u": (dtype, attributes)}, "NETCDF4")
    with pytest.raises(UserError, match=message):
        ours(tmp_path / "a.nc")
    assert theirs(tmp_path / "a.nc")[1] or "valid_range" in attributes  # the library ignores them, with a warning


@pytest.mark.parametrize("file_format", ["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET"])
@pytest.mark.parametrize("unlimited", [True, False])
def test_a_truncated_file_is_refused(tmp_path: Path, file_format: str, unlimited: bool) -> None:
    """The netCDF4 library returns zeros for what is lost."""
    path = tmp_path / "a.nc"
    with netCDF4.Dataset(path, "w", format=file_format) as file:
        file.createDimension("t", None if unlimited else 4)
        file.createDimension("x", 4000)
        file.createVariable("u", "f4", ("t", "x"))[:] = np.ones((4, 4000))
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"a\.nc"), open_file(path) as file:
        file.array("u").read((3, slice(None)))


@pytest.mark.parametrize("version", [2, 3])
def test_missing_values_where_xarray_keeps_them_in_zarr(tmp_path: Path, version: int) -> None:
    """In format 2 it is the array's fill value, in format 3 the bytes of a float64, in base64."""
    zarr = pytest.importorskip("zarr", minversion="3")
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=version)
    for name, dtype, missing in (("u", "f4", 1e20), ("v", "i2", -999)):
        fill = {"fill_value": missing} if version == 2 else {}
        array = root.create_array(name, shape=(3,), chunks=(3,), dtype=dtype, **fill)
        array[:] = [1, missing, 3]
        if version == 2:
            array.attrs.update(_ARRAY_DIMENSIONS=["x"], scale_factor=0.5, units="cm/s")
        else:
            text = base64.b64encode(struct.pack("<d", missing)).decode()
            array.attrs.update(_FillValue=text if dtype == "f4" else missing, scale_factor=0.5, units="cm/s")
    with open_file(tmp_path / "a.zarr") as file:
        for name in "uv":
            array = file.array(name)
            np.testing.assert_array_equal(array.read((slice(None),)), [0.5, np.nan, 1.5])
            assert array.attributes == {"units": "cm/s"}
            assert array.dimensions == (("x",) if version == 2 else ())
