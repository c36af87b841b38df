"""Importing each file format that people have: the values come out as they went in, or the message says the way."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from scipy.io import savemat

from shodh_moe.data import list_trajectories, read_trajectory
from shodh_moe.data.importing.items import plan_items
from shodh_moe.formats import open_file
from shodh_moe.formats.known import CONVERT, FORMATS
from tests.data.test_import import GRID, cutouts, flow, imported, mapping_file  # noqa: F401  (a fixture)
from tests.tiny import refused

POINTS = [1 + 0.5 * np.arange(size) for size in GRID]
ONE_FILE: dict[str, Any] = {"axes": ["t", "x", "y", "z"], "velocity": ["u", "v", "w"], "pressure": "p"}
VTK_AXES: dict[str, Any] = {"axes": ["z", "y", "x", "c"], "velocity": "cell/U", "pressure": "cell/p"}
Flow = tuple[np.ndarray, np.ndarray]


def require_flow(out: Path, velocity: np.ndarray, pressure: np.ndarray) -> None:
    stored = read_trajectory(list_trajectories(out, "train")[0])
    np.testing.assert_array_equal(stored.velocity_T3XYZ, velocity)
    np.testing.assert_array_equal(stored.pressure_T1XYZ[:, 0], pressure)


def arrays(velocity: np.ndarray, pressure: np.ndarray) -> dict[str, np.ndarray]:
    return {**dict(zip("uvw", velocity.swapaxes(0, 1), strict=True)), "p": pressure}


def write_npy(folder: Path, velocity: np.ndarray, pressure: np.ndarray) -> dict[str, Any]:
    for name, values in arrays(velocity, pressure).items():
        np.save(folder / f"{name}.npy", np.asfortranarray(values) if name == "u" else values)
    return {**ONE_FILE, "files": {"train": [["[uvw].npy", "p.npy"]]}}


def write_numbered_npy(folder: Path, velocity: np.ndarray, pressure: np.ndarray) -> dict[str, Any]:
    for number, (velocity_3XYZ, pressure_XYZ) in enumerate(zip(velocity, pressure, strict=True), 9):
        np.save(folder / f"velocity_{number}.npy", np.moveaxis(velocity_3XYZ, 0, -1))
        np.save(folder / f"pressure_{number}.npy", pressure_XYZ)
    names = {"velocity": "velocity_*", "pressure": "pressure_*"}
    return {"axes": ["x", "y", "z", "c"], **names, "files": {"train": [["velocity_*.npy", "pressure_*.npy"]]}}


def write_matlab(folder: Path, velocity: np.ndarray, pressure: np.ndarray) -> dict[str, Any]:
    savemat(
        folder / "flow.mat",
        {**arrays(velocity, pressure), "t": 0.25 * np.arange(3), "about": {"a": 1.0}},
        do_compression=True,
    )
    return {**ONE_FILE, "files": {"train": ["flow.mat"]}, "time": "t", "time_step": None}


def write_zarr(folder: Path, velocity: np.ndarray, pressure: np.ndarray, version: int) -> dict[str, Any]:
    zarr = pytest.importorskip("zarr", minversion="3")  # Python 3.10 has an older one
    root = zarr.open_group(str(folder / "flow.zarr"), mode="w", zarr_format=version)
    for name, values in arrays(velocity, pressure).items():
        array = root.create_array(f"fields/{name}", shape=values.shape, chunks=(1, 8, 8, 8), dtype="f4")
        array[:] = values / 2 if name == "u" else values
        if name == "u":
            array.attrs["scale_factor"] = 2.0
    names = {"velocity": [f"fields/{name}" for name in "uvw"], "pressure": "fields/p"}
    return {**ONE_FILE, **names, "files": {"train": ["flow.zarr"]}}


def image(velocity_3XYZ: np.ndarray, pressure_XYZ: np.ndarray, kind: str, time: float) -> Any:
    """A VTK data set with the fields in cells whose centres are `POINTS`, or at points."""
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData

    made, cells = vtkImageData(), kind == "cell"
    made.SetDimensions(*[size + cells for size in GRID])
    made.SetOrigin(*[1 - 0.25 * cells] * 3)
    made.SetSpacing(0.5, 0.5, 0.5)
    place = made.GetCellData() if cells else made.GetPointData()
    for name, values in (("U", velocity_3XYZ.reshape(3, *GRID).T.reshape(-1, 3)), ("p", pressure_XYZ.T.reshape(-1))):
        array = numpy_to_vtk(np.ascontiguousarray(values), deep=True)
        array.SetName(name)
        place.AddArray(array)
    stamp = numpy_to_vtk(np.array([time]), deep=True)
    stamp.SetName("TimeValue")
    made.GetFieldData().AddArray(stamp)
    return made


def converted(data: Any, ending: str) -> Any:
    """The same data set as a rectilinear, structured or unstructured grid (whose cells are in another order)."""
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkRectilinearGrid
    from vtkmodules.vtkFiltersCore import vtkAppendFilter
    from vtkmodules.vtkFiltersGeneral import vtkImageDataToPointSet

    if ending == "vtr":
        made = vtkRectilinearGrid()
        made.SetDimensions(data.GetDimensions())
        for axis, name in enumerate("XYZ"):
            points = data.GetOrigin()[axis] + 0.5 * np.arange(data.GetDimensions()[axis])
            getattr(made, f"Set{name}Coordinates")(numpy_to_vtk(points, deep=True))
        for part in ("CellData", "PointData", "FieldData"):
            getattr(made, f"Get{part}")().ShallowCopy(getattr(data, f"Get{part}")())
        return made
    if ending in ("vts", "vtu"):
        change = vtkImageDataToPointSet()
        change.SetInputData(data)
        change.Update()
        made = change.GetOutput()
        if ending == "vtu":
            append = vtkAppendFilter()
            append.AddInputData(made)
            append.Update()
            made = append.GetOutput()
        made.GetFieldData().ShallowCopy(data.GetFieldData())
        return made
    return data


def write_vtk(folder: Path, velocity: np.ndarray, pressure: np.ndarray, ending: str, kind: str) -> dict[str, Any]:
    pytest.importorskip("vtk")
    from vtkmodules import vtkIOLegacy, vtkIOXML

    writers = {"vti": "ImageData", "vtr": "RectilinearGrid", "vts": "StructuredGrid", "vtu": "UnstructuredGrid"}
    for number, (velocity_3XYZ, pressure_XYZ) in enumerate(zip(velocity, pressure, strict=True)):
        writer = (
            vtkIOLegacy.vtkDataSetWriter() if ending == "vtk" else getattr(vtkIOXML, f"vtkXML{writers[ending]}Writer")()
        )
        writer.SetInputData(converted(image(velocity_3XYZ, pressure_XYZ, kind, 0.25 * (2 - number)), ending))
        if ending == "vtk":
            writer.SetFileTypeToBinary()
        writer.SetFileName(str(folder / f"flow_{number}.{ending}"))
        assert writer.Write() == 1
    names = {"velocity": f"{kind}/U", "pressure": f"{kind}/p", "spacing": None}
    points = {axis: f"{kind}/{axis}" for axis in "xyz"}
    return {**VTK_AXES, **names, "coordinates": points, "files": {"train": [[f"flow_*.{ending}"]]}}


WRITERS: dict[str, Callable[[Path, np.ndarray, np.ndarray], dict[str, Any]]] = {
    "npy": write_npy,
    "numbered npy": write_numbered_npy,
    "mat": write_matlab,
    "zarr 2": lambda *given: write_zarr(*given, version=2),
    "zarr 3": lambda *given: write_zarr(*given, version=3),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_keeps_the_values(cutouts: Path, name: str) -> None:  # noqa: F811
    velocity, pressure = flow(0)
    require_flow(imported(cutouts, **WRITERS[name](cutouts, velocity, pressure)), velocity, pressure)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("vti", "point"), ("vti", "cell"), ("vtr", "cell"), ("vts", "point"), ("vtu", "cell"), ("vtk", "cell")],
)
def test_vtk_keeps_the_values_and_its_times_give_the_order(cutouts: Path, ending: str, kind: str) -> None:  # noqa: F811
    velocity, pressure = flow(0)
    out = imported(cutouts, **write_vtk(cutouts, velocity, pressure, ending, kind))
    require_flow(out, velocity[::-1], pressure[::-1])  # the files are numbered backwards in time
    assert list_trajectories(out, "train")[0].spacing == pytest.approx((0.5, 0.5, 0.5))


def test_a_parallel_vtk_file_keeps_the_values(cutouts: Path) -> None:  # noqa: F811
    """Two pieces that meet in the middle of z, each in a file of its own."""
    pytest.importorskip("vtk")
    from vtkmodules.util.numpy_support import numpy_to_vtk
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkIOXML import vtkXMLImageDataWriter

    velocity, pressure = flow(0)
    half = GRID[2] // 2
    for number, (velocity_3XYZ, pressure_XYZ) in enumerate(zip(velocity, pressure, strict=True)):
        pieces = ""
        for piece, cut in enumerate((slice(0, half), slice(half, GRID[2]))):
            data, extent = vtkImageData(), (0, GRID[0], 0, GRID[1], cut.start, cut.stop)
            data.SetOrigin(0.75, 0.75, 0.75)
            data.SetSpacing(0.5, 0.5, 0.5)
            data.SetExtent(*extent)
            fields = velocity_3XYZ[..., cut].T.reshape(-1, 3), pressure_XYZ[..., cut].T.reshape(-1)
            for name, values in zip(("U", "p"), fields, strict=True):
                array = numpy_to_vtk(np.ascontiguousarray(values), deep=True)
                array.SetName(name)
                data.GetCellData().AddArray(array)
            writer = vtkXMLImageDataWriter()
            writer.SetInputData(data)
            writer.SetFileName(str(cutouts / f"flow_{number}_{piece}.vti"))
            assert writer.Write() == 1
            pieces += f'<Piece Extent="{" ".join(map(str, extent))}" Source="flow_{number}_{piece}.vti"/>'
        whole = f"0 {GRID[0]} 0 {GRID[1]} 0 {GRID[2]}"
        arrays = '<PDataArray type="Float32" Name="U" NumberOfComponents="3"/><PDataArray type="Float32" Name="p"/>'
        (cutouts / f"flow_{number}.pvti").write_text(
            f'<VTKFile type="PImageData" version="0.1" byte_order="LittleEndian" header_type="UInt32">'
            f'<PImageData WholeExtent="{whole}" GhostLevel="0" Origin="0.75 0.75 0.75" Spacing="0.5 0.5 0.5">'
            f"<PCellData>{arrays}</PCellData>{pieces}</PImageData></VTKFile>"
        )
    points = {axis: f"cell/{axis}" for axis in "xyz"}
    out = imported(cutouts, **VTK_AXES, spacing=None, coordinates=points, files={"train": [["flow_*.pvti"]]})
    require_flow(out, velocity, pressure)


def foam(kind: str, name: str, text: str) -> str:
    return f"FoamFile\n{{ version 2.0; format ascii; class {kind}; object {name}; }}\n{text}\n"


def foam_list(rows: np.ndarray) -> str:
    lines = [f"({' '.join(repr(float(one)) for one in row)})" if row.ndim else repr(float(row)) for row in rows]
    return f"{len(lines)}\n(\n" + "\n".join(lines) + "\n)"


def write_openfoam(case: Path, velocity: np.ndarray, pressure: np.ndarray, grid: tuple[int, ...] = GRID) -> None:
    """Write a case as `blockMesh` and a solver do in ascii: cells of size 0.5, times 0, 0.25, 0.5."""
    nx, ny, nz = grid
    point = np.arange((nx + 1) * (ny + 1) * (nz + 1)).reshape(nz + 1, ny + 1, nx + 1)
    z, y, x = np.meshgrid(*[0.5 * np.arange(n + 1) for n in (nz, ny, nx)], indexing="ij")
    cell = np.arange(nx * ny * nz).reshape(nz, ny, nx)
    faces = []  # (points, owner, neighbour or -1)
    for axis in range(3):  # z, y, x
        for k in range(cell.shape[axis] + 1):
            corners = point.take(k, axis)
            quads = np.stack([corners[:-1, :-1], corners[:-1, 1:], corners[1:, 1:], corners[1:, :-1]], -1)
            # Faces point from their owner to the neighbour, or out of the box.
            quads = quads if (axis == 1) != (k > 0) else quads[..., ::-1]
            below = cell.take(k - 1, axis).ravel() if k else None
            above = cell.take(k, axis).ravel() if k < cell.shape[axis] else None
            owner = below if below is not None else above
            other = above if below is not None and above is not None else np.full(owner.shape, -1)
            faces += zip(quads.reshape(-1, 4).tolist(), owner.tolist(), other.tolist(), strict=True)
    inner = sorted((face for face in faces if face[2] >= 0), key=lambda face: (face[1], face[2]))
    outer = [face for face in faces if face[2] < 0]
    mesh = case / "constant" / "polyMesh"
    mesh.mkdir(parents=True)
    (case / "system").mkdir()
    (case / "system" / "controlDict").write_text(foam("dictionary", "controlDict", "deltaT 0.25;\nwriteInterval 1;"))
    points = np.stack([x.ravel(), y.ravel(), z.ravel()], -1)
    (mesh / "points").write_text(foam("vectorField", "points", foam_list(points)))
    quads = "\n".join(f"4({' '.join(map(str, face[0]))})" for face in inner + outer)
    (mesh / "faces").write_text(foam("faceList", "faces", f"{len(faces)}\n(\n{quads}\n)"))
    for name, rows in (
        ("owner", [face[1] for face in inner + outer]),
        ("neighbour", [face[2] for face in inner]),
    ):
        text = "\n".join(map(str, rows))
        (mesh / name).write_text(foam("labelList", name, f"{len(rows)}\n(\n{text}\n)"))
    walls = f"1\n(\nwalls {{ type patch; nFaces {len(outer)}; startFace {len(inner)}; }}\n)"
    (mesh / "boundary").write_text(foam("polyBoundaryMesh", "boundary", walls))
    for time, velocity_3XYZ, pressure_XYZ in zip(("0", "0.25", "0.5"), velocity, pressure, strict=True):
        (case / time).mkdir()
        for name, kind, rows in (
            ("U", "vector", velocity_3XYZ.reshape(3, *grid).T.reshape(-1, 3)),
            ("p", "scalar", pressure_XYZ.T.reshape(-1)),
        ):
            head = f"dimensions [0 1 -1 0 0 0 0];\ninternalField nonuniform List<{kind}> "
            tail = ";\nboundaryField { walls { type zeroGradient; } }"
            (case / time / name).write_text(foam(f"vol{kind.capitalize()}Field", name, head + foam_list(rows) + tail))


FOAM: dict[str, Any] = {
    "axes": ["t", "z", "y", "x", "c"],
    "velocity": "cell/U",
    "pressure": "cell/p",
    "spacing": None,
    "coordinates": {axis: f"cell/{axis}" for axis in "xyz"},
}


def test_an_openfoam_case_keeps_the_values(cutouts: Path) -> None:  # noqa: F811
    pytest.importorskip("vtk")
    velocity, pressure = flow(0)
    write_openfoam(cutouts / "case", velocity, pressure)
    out = imported(cutouts, **FOAM, files={"train": ["case"]})
    require_flow(out, velocity, pressure)
    record = list_trajectories(out, "train")[0]
    assert (record.spacing, record.interval) == (pytest.approx((0.5, 0.5, 0.5)), pytest.approx(0.25))


@pytest.mark.parametrize("ending", ["tif", "mha", "mhd", "nrrd"])
def test_volumes_serve_as_masks(cutouts: Path, ending: str) -> None:  # noqa: F811
    velocity, pressure = flow(0)
    changes = write_npy(cutouts, velocity, pressure)
    solid = np.zeros(GRID, np.uint8)
    solid[2:4, 5, 6:9] = 255
    if ending == "tif":
        tifffile.imwrite(cutouts / "rock.tif", solid, photometric="minisblack")
    elif ending == "nrrd":
        head = "NRRD0004\ntype: unsigned char\ndimension: 3\nsizes: 24 16 8\nencoding: raw\n\n"
        (cutouts / "rock.nrrd").write_bytes(head.encode() + solid.tobytes())
    else:
        own = "LOCAL" if ending == "mha" else "rock.raw"
        head = f"NDims = 3\nDimSize = 24 16 8\nElementType = MET_UCHAR\nElementDataFile = {own}\n"
        (cutouts / f"rock.{ending}").write_bytes(head.encode() + (solid.tobytes() if ending == "mha" else b""))
        (cutouts / "rock.raw").write_bytes(solid.tobytes())
    if ending != "tif":
        pytest.importorskip("vtk")
    mask = {"file": f"rock.{ending}", "dataset": "image" if ending == "tif" else "values"}
    out = imported(cutouts, **changes, mask=mask)
    require_flow(out, np.where(solid, 0, velocity), np.where(solid, 0, pressure))


def test_a_changed_file_in_a_folder_is_noticed(cutouts: Path) -> None:  # noqa: F811
    from shodh_moe.data.importing import load_mapping

    (cutouts / "case" / "system").mkdir(parents=True)
    (cutouts / "case" / "system" / "controlDict").write_text("")
    (cutouts / "case" / "0.1").mkdir()
    (cutouts / "case" / "0.1" / "U").write_text("1")
    mapping = load_mapping(mapping_file(cutouts, **{**FOAM, "files": {"train": ["case"]}}))
    before = plan_items(mapping, cutouts / "out")[0].request
    assert plan_items(mapping, cutouts / "out")[0].request == before
    (cutouts / "case" / "0.1" / "U").write_text("12")
    assert plan_items(mapping, cutouts / "out")[0].request != before


def damaged(folder: Path, ending: str) -> None:
    velocity, pressure = flow(0)
    if ending == "npy":
        write_npy(folder, velocity, pressure)
    elif ending == "mat":
        write_matlab(folder, velocity, pressure)
        (folder / "flow.mat").rename(folder / "u.mat")
    elif ending in ("tif", "tiff"):
        tifffile.imwrite(folder / f"u.{ending}", pressure)
    else:
        write_vtk(folder, velocity, pressure, ending, "cell")
        (folder / f"flow_0.{ending}").rename(folder / f"u.{ending}")
    data = (folder / f"u.{ending}").read_bytes()
    (folder / f"u.{ending}").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("ending", ["npy", "mat", "tif", "vti", "vtu", "vtk"])
def test_a_truncated_file_is_named(cutouts: Path, capfd: pytest.CaptureFixture[str], ending: str) -> None:  # noqa: F811
    damaged(cutouts, ending)
    names = {"vti": "cell/p", "vtu": "cell/p", "vtk": "cell/p", "tif": "image"}
    name = names.get(ending, "u")
    files = {"train": [f"u.{ending}"]}
    axes = ["t", "x", "y", "z"] if ending in ("npy", "mat", "tif") else ["z", "y", "x"]
    mapping = mapping_file(cutouts, **{**ONE_FILE, "axes": axes, "velocity": [name] * 3, "pressure": name}, files=files)
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=(f"u.{ending}",))


TEXTS = {
    "flow.xdmf": ('<DataItem Format="HDF">more/flow.h5:/u</DataItem>', ("only names other files", "more/flow.h5")),
    "flow.pvd": ('<DataSet file="a_1.vti"/><DataSet file="a_2.vti"/>', ("only names other files", "a_1.vti, a_2.vti")),
    "case.foam": ("", ("name the case's folder",)),
    "flow.cgns": ("x", ("cannot be imported", "ParaView", ".vti")),
    "flow.grib": ("x", ("convert them", "cdo -f nc4 copy")),
    "flow.pt": ("x", ("convert them", "torch.load")),
    "flow.csv": ("1,2", ("convert them", "numpy.loadtxt")),
    "flow.xyz": ("x", ("not HDF5, NetCDF 3 or 4, or npz",)),
    "flow.npy": ("x", ("cannot read flow.npy",)),
    "flow.mhd": ("NDims = 3\nElementDataFile = ../other.raw\n", ("keeps its values in ../other.raw",)),
    "empty/file": ("", ("empty is a folder, but neither",)),
    "case/system/controlDict": ("", ("case without constant/polyMesh", "blockMesh")),
    "case2/processor0/0/U": ("", ("case without constant/polyMesh", "reconstructPar")),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_way_to_import_another_format_is_named(
    cutouts: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    text, messages = TEXTS[name]
    if name.endswith(("mhd", "controlDict", "U")):
        pytest.importorskip("vtk")
    (cutouts / name).parent.mkdir(parents=True, exist_ok=True)
    (cutouts / name).write_text(text)
    if name.startswith("case2"):
        (cutouts / "case2" / "system").mkdir()
        (cutouts / "case2" / "system" / "controlDict").write_text("")
    mapping = mapping_file(cutouts, files={"train": [name.split("/")[0]]})
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=messages)


@pytest.mark.parametrize("package", sorted({str(one.package) for one in FORMATS.values() if one.package}))
def test_a_missing_package_is_named(
    cutouts: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    ending = next(ending for ending, one in FORMATS.items() if one.package == package)
    (cutouts / f"flow{ending}").write_text("x")
    monkeypatch.setitem(sys.modules, package, None)
    mapping = mapping_file(cutouts, files={"train": [f"flow{ending}"]})
    says = (f"flow{ending} needs the package {package}", "pip install", "shodh_moe[formats]")
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=says)


def test_curved_and_scattered_grids_are_refused(cutouts: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    pytest.importorskip("vtk")
    from vtkmodules.util.numpy_support import vtk_to_numpy
    from vtkmodules.vtkIOXML import vtkXMLUnstructuredGridReader, vtkXMLUnstructuredGridWriter

    changes = write_vtk(cutouts, *flow(0), "vtu", "point")
    reader, writer = vtkXMLUnstructuredGridReader(), vtkXMLUnstructuredGridWriter()
    reader.SetFileName(str(cutouts / "flow_1.vtu"))
    reader.Update()
    vtk_to_numpy(reader.GetOutput().GetPoints().GetData())[100, 1] += 0.1
    writer.SetInputData(reader.GetOutput())
    writer.SetFileName(str(cutouts / "flow_1.vtu"))
    writer.Write()
    says = ("flow_1.vtu: its 3072 points are not those of a grid", "Resample To Image")
    refused(capfd, "data", "import", str(mapping_file(cutouts, **changes)), "--output", "out", says=says)


def test_values_that_vtk_leaves_unset_are_refused(cutouts: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """VTK decodes the values up to the damage, and returns without an error."""
    pytest.importorskip("vtk")
    from vtkmodules.vtkIOXML import vtkXMLImageDataWriter

    changes = write_vtk(cutouts, *flow(0), "vti", "cell")
    writer = vtkXMLImageDataWriter()
    writer.SetInputData(image(flow(0)[0][1], flow(0)[1][1], "cell", 0.25))
    writer.SetDataModeToBinary()
    writer.SetCompressorTypeToNone()
    writer.SetFileName(str(cutouts / "flow_1.vti"))
    writer.Write()
    content = (cutouts / "flow_1.vti").read_bytes()
    at = content.index(b'Name="U"') + 20_000
    (cutouts / "flow_1.vti").write_bytes(content[:at] + b"!" + content[at + 1 :])
    says = ("flow_1.vti: velocity of snapshot 1 (cell/U) has values up to 3.",)
    refused(capfd, "data", "import", str(mapping_file(cutouts, **changes)), "--output", "out", says=says)


def test_the_table_in_the_docs_lists_every_format() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert [ending for ending in (*FORMATS, *CONVERT) if f"`{ending}`" not in text] == []


def test_only_a_part_of_an_array_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "u.npy", np.arange(24.0).reshape(4, 6))
    with open_file(tmp_path / "u.npy") as file:
        assert file.names == ["u"]
        np.testing.assert_array_equal(file.array("u").read((2, slice(1, 3))), [13, 14])
    shutil.rmtree(tmp_path)
