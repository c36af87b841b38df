"""The ParaView file: its structure, and the values that VTK's own reader reads."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh_moe.inference.paraview import new_vtkhdf, put

GRID, TIMES = (4, 3, 2), np.array([10.0, 12.5, 15.0], dtype=np.float32)
ORIGIN, SPACING = [0.25, 0.25, 0.25], [0.5, 0.5, 0.5]


def fields(step: int) -> np.ndarray:
    """Return velocity and pressure [4, X, Y, Z] whose values encode component, position and step."""
    component, x, y, z = np.indices((4, *GRID))
    return (1000.0 * step + 200 * component + 40 * x + 6 * y + z).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    solid = (np.indices(GRID)[0] == 3).astype(np.float32)
    with new_vtkhdf(tmp_path / "a.vtkhdf", TIMES, solid, ORIGIN, SPACING) as file:
        for step in range(len(TIMES)):
            put(file, step, fields(step))
    return tmp_path / "a.vtkhdf"


def test_the_file_has_the_required_structure(path: Path) -> None:
    with h5py.File(path) as file:
        root = file["VTKHDF"]
        assert root.attrs["Version"].tolist() == [2, 0]
        assert root.attrs["Type"] == b"ImageData"
        assert root.attrs.get_id("Type").dtype == np.dtype("S9")  # VTK reads only strings of fixed length
        assert root.attrs["WholeExtent"].tolist() == [0, 3, 0, 2, 0, 1]
        assert root.attrs["Origin"].tolist() == ORIGIN
        assert root.attrs["Spacing"].tolist() == SPACING
        assert root["Steps"].attrs["NSteps"] == 3
        assert root["Steps/Values"][:].tolist() == TIMES.tolist()
        for name, offsets in (("velocity", [0, 1, 2]), ("pressure", [0, 1, 2]), ("solid", [0, 0, 0])):
            assert root[f"Steps/PointDataOffsets/{name}"][:].tolist() == offsets
        x, y, z = 3, 1, 1
        assert root["PointData/velocity"].shape == (3, 2, 3, 4, 3)
        np.testing.assert_array_equal(root["PointData/velocity"][2, z, y, x], fields(2)[:3, x, y, z])
        assert root["PointData/pressure"][1, z, y, x] == fields(1)[3, x, y, z]
        np.testing.assert_array_equal(root["PointData/solid"][0, z, y], [0, 0, 0, 1])


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_vtkhdf(tmp_path / "b.vtkhdf", TIMES, np.zeros(GRID), ORIGIN, SPACING):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_vtk_reads_every_value_in_its_place(path: Path) -> None:
    io = pytest.importorskip("vtkmodules.vtkIOHDF", reason="NOT CHECKED with VTK's own reader: pip install vtk")
    from vtkmodules.vtkCommonExecutionModel import vtkStreamingDemandDrivenPipeline as Pipeline

    reader = io.vtkHDFReader()
    assert reader.CanReadFile(str(path))
    reader.SetFileName(str(path))
    reader.UpdateInformation()
    times = reader.GetOutputInformation(0).Get(Pipeline.TIME_STEPS())
    assert times == tuple(TIMES.tolist())
    for step in (2, 0, 1):
        reader.UpdateTimeStep(times[step])
        image = reader.GetOutput()
        assert image.GetClassName() == "vtkImageData"
        assert image.GetBounds() == (0.25, 1.75, 0.25, 1.25, 0.25, 0.75)
        data = image.GetPointData()
        for place in np.ndindex(*GRID):
            point = image.FindPoint([0.25 + 0.5 * index for index in place])
            assert data.GetArray("velocity").GetTuple(point) == tuple(fields(step)[(slice(3), *place)].tolist())
            assert data.GetArray("pressure").GetTuple1(point) == fields(step)[(3, *place)]
            assert data.GetArray("solid").GetTuple1(point) == (place[0] == 3)
