"""Geometry files: every format gives the same solid, and errors name the file and the problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from pydantic import ValidationError

from shodh_moe.base.errors import UserError
from shodh_moe.solvers import simulate
from shodh_moe.solvers.domains import PorousMedia
from shodh_moe.solvers.domains.geometry_file import GeometryFile
from shodh_moe.solvers.geometry import percolating

GRID = (16, 16, 16)


@pytest.fixture
def volume() -> np.ndarray:
    """Rods along y and z, wider than half the grid in all directions; 1 in solids."""
    solid = np.zeros((12, 10, 9), np.uint8)
    solid[2:4, :, 3:5] = 1
    solid[7:9, 5:7, :] = 1
    return solid


def porous(path: Path, **keys: Any) -> PorousMedia:
    return PorousMedia(spinup_steps=5, steps_per_snapshot=5, grain=3.0, geometry_file={"path": str(path), **keys})


def saved(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def refused(words: str, path: Path, **keys: Any) -> None:
    with pytest.raises(UserError, match=words):
        simulate("porous_media", porous(path, **keys), GRID, 0, 0, 1)


def test_all_formats_give_the_same_solid(tmp_path: Path, volume: np.ndarray) -> None:
    saved(tmp_path / "rock.npy", volume)
    volume.astype("<u2").tofile(tmp_path / "rock.raw")
    (tmp_path / "rock_f.raw").write_bytes(volume.tobytes(order="F"))
    with h5py.File(tmp_path / "rock.hdf5", "w") as file:
        file["scan/solid"] = volume.astype(np.float32)
        file["pores"] = 1 - volume
    tifffile.imwrite(tmp_path / "rock.tif", volume.T, photometric="minisblack")
    tifffile.imwrite(tmp_path / "packed.tiff", 255 * volume.T, photometric="minisblack", compression="zlib")
    labels = np.where(volume, 2 + 5 * (np.arange(9) % 2), np.arange(9) % 2)  # solids 2 and 7, fluids 0 and 1
    saved(tmp_path / "labels.npy", labels.astype(np.uint16))
    files: list[dict[str, Any]] = [
        {"path": "rock.npy"},
        {"path": "rock.raw", "shape": [12, 10, 9], "dtype": "uint16"},
        {"path": "rock_f.raw", "shape": [12, 10, 9], "dtype": "uint8", "order": "F"},
        {"path": "rock.hdf5", "dataset": "scan/solid"},
        {"path": "rock.hdf5", "dataset": "pores", "solid_value": 0},
        {"path": "rock.tif"},
        {"path": "packed.tiff", "solid_value": 255},
        {"path": "labels.npy", "solid_value": [2, 7]},
    ]
    masks = []
    for keys in files:
        file = GeometryFile(**{**keys, "path": str(tmp_path / keys["path"])})
        mask_XYZ, corner_3 = file.read(GRID, np.random.default_rng(3))
        masks.append(mask_XYZ.tobytes())
        x, y, z = corner_3
        part = volume[x : x + 8, y : y + 8, z : z + 8] == 1
        assert np.array_equal(mask_XYZ[:8, :8, :8], part)
        for axis in range(3):
            assert np.array_equal(mask_XYZ, np.flip(mask_XYZ, axis)), "mirrored, hence periodic"
    assert len(set(masks)) == 1


def test_each_trajectory_flows_through_another_part_of_the_geometry(tmp_path: Path, volume: np.ndarray) -> None:
    config = porous(saved(tmp_path / "rock.npy", volume))
    results = [simulate("porous_media", config, GRID, 0, t, 2) for t in (0, 0, 1)]
    assert results[0].velocity_T3XYZ.tobytes() == results[1].velocity_T3XYZ.tobytes()
    corners = [[r.parameters[f"corner_{axis}"] for axis in "xyz"] for r in results]
    assert corners[0] != corners[2]
    assert results[0].parameters["geometry"] == "file"
    assert results[0].velocity_T3XYZ[-1][0].mean() > 0
    assert not results[0].velocity_T3XYZ[:, :, results[0].solid_XYZ].any()
    assert percolating(results[0].solid_XYZ) is not None


def test_a_periodic_file_is_used_unchanged(tmp_path: Path) -> None:
    solid = np.zeros(GRID, bool)
    solid[3:7, 2:9, 4:9] = True
    file = GeometryFile(path=str(saved(tmp_path / "cell.npy", solid)), periodic=True)
    mask_XYZ, corner_3 = file.read(GRID, np.random.default_rng(0))
    assert np.array_equal(mask_XYZ, solid)
    assert corner_3 == (0, 0, 0)


def test_another_geometry_file_gives_another_dataset(tmp_path: Path, volume: np.ndarray) -> None:
    path = saved(tmp_path / "rock.npy", volume)
    first = porous(path).identity()
    assert first == porous(path).identity()
    volume[0, 0, 0] = 1
    saved(path, volume)
    second = porous(path).identity()
    assert first["geometry_file"].pop("sha256") != second["geometry_file"].pop("sha256")
    assert first == second
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read geometry_file\.path .*rock\.npy"):
        porous(path).identity()


def test_bad_files_are_named(tmp_path: Path, volume: np.ndarray) -> None:
    refused(r"there is no file .*gone\.npy", tmp_path / "gone.npy")
    (tmp_path / "text.npy").write_text("not an array")
    refused(r"text\.npy cannot be read", tmp_path / "text.npy")
    path = saved(tmp_path / "short.npy", volume)
    path.write_bytes(path.read_bytes()[:-100])
    refused(r"short\.npy cannot be read", path)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    refused(r"objects\.npy cannot be read: .*[Oo]bject", tmp_path / "objects.npy")
    refused(
        r"flat\.npy must hold numbers of shape \[X, Y, Z\], not uint8 of shape \[12, 10\]",
        saved(tmp_path / "flat.npy", volume[..., 0]),
    )
    refused(r"words\.npy must hold numbers", saved(tmp_path / "words.npy", volume.astype("U1")))
    refused(
        r"small\.npy has shape \[7, 10, 9\], but \[8, 8, 8\] is needed: half of data\.grid",
        saved(tmp_path / "small.npy", volume[:7]),
    )
    refused(
        r"whole\.npy has shape \[12, 10, 9\], but \[16, 16, 16\] is needed: a periodic",
        saved(tmp_path / "whole.npy", volume),
        periodic=True,
    )
    grey = np.random.default_rng(0).integers(0, 255, (12, 10, 9))
    refused(
        r"grey\.npy is not binary: it has more than two values, from \d+ to \d+", saved(tmp_path / "grey.npy", grey)
    )
    refused(r"nan\.npy is not binary", saved(tmp_path / "nan.npy", np.where(volume == 1, np.nan, 0)))
    refused(
        r"holes\.npy has values that are not finite",
        saved(tmp_path / "holes.npy", np.where(volume == 1, np.nan, 0)),
        solid_value=[0],
    )
    for name, options in (("short.tif", {}), ("packed.tif", {"compression": "zlib"})):
        tifffile.imwrite(tmp_path / name, grey.T.astype(np.uint8), photometric="minisblack", **options)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-300])
        refused(rf"{name} (cannot be read|must hold)", tmp_path / name, solid_value=[1])
    (tmp_path / "text.tif").write_text("no TIFF")
    refused(r"text\.tif cannot be read", tmp_path / "text.tif")
    wall = np.zeros_like(volume)
    wall[5:7] = 1
    refused(
        r"porous_media trajectory 0 .*no part of .*wall\.npy in 100 draws", saved(tmp_path / "wall.npy", wall[2:10])
    )
    refused(r"ones\.npy in 100 draws .*solid_value", saved(tmp_path / "ones.npy", volume + 1))
    volume.tofile(tmp_path / "rock.raw")
    refused(
        r"rock\.raw has 1080 bytes, but uint16 of shape \[12, 10, 9\] needs 2160",
        tmp_path / "rock.raw",
        shape=[12, 10, 9],
        dtype="uint16",
    )


def test_hdf5_datasets_without_readable_values_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "rock.h5", "w") as file:
        file["none"] = h5py.Empty("u1")
        file.create_dataset("packed", data=np.zeros(GRID, np.uint8), compression="lzf")
    refused(r"rock\.h5 must hold numbers of shape", tmp_path / "rock.h5", dataset="none")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    refused(r"packed is compressed with filter 32000 .*pip install hdf5plugin", tmp_path / "rock.h5", dataset="packed")


def test_hdf5_links_out_of_the_file_are_refused(tmp_path: Path, volume: np.ndarray) -> None:
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["solid"] = volume
    with h5py.File(tmp_path / "rock.hdf5", "w") as file:
        file["far"] = h5py.ExternalLink("other.hdf5", "solid")
        file.create_group("group")
        layout = h5py.VirtualLayout(volume.shape, volume.dtype)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "solid", volume.shape)
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", volume.shape, volume.dtype, external=[(str(tmp_path / "bytes.bin"), 0, 1080)])
    for name in ("far", "group", "virtual", "raw", "none"):
        refused(rf"rock\.hdf5 holds no dataset '{name}' of its own", tmp_path / "rock.hdf5", dataset=name)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"path": "rock.jpg"}, "path must end in"),
        ({"path": "rock.raw", "dtype": "uint8"}, "needs its shape"),
        ({"path": "rock.raw", "shape": [3, 3, 3]}, "needs its shape"),
        ({"path": "rock.raw", "shape": [3, 3], "dtype": "uint8"}, "needs its shape"),
        ({"path": "rock.h5"}, "name of its dataset"),
        ({"path": "rock.npy", "solid": 1}, "Extra inputs"),
    ],
)
def test_incomplete_descriptions_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GeometryFile(**keys)
