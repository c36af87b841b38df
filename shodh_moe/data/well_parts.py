"""Parts of the_well's HDF5 schema that all our writers share: attributes, boundaries and provenance."""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

FIELDS = ("velocity", "pressure")
AXES = ("x", "y", "z")


def text_array(names: list[str]) -> NDArray[Any]:
    """Convert texts to an array that HDF5 stores as variable-length text, even if it is empty."""
    return np.array(names, dtype=h5py.string_dtype())


def write_provenance(file: h5py.File, provenance: dict[str, Any]) -> None:
    """Create the group ``provenance``; values other than numbers, texts and booleans are stored as JSON."""
    group = file.create_group("provenance")
    for key, value in provenance.items():
        group.attrs[key] = value if isinstance(value, (str, bool, int, float)) else json.dumps(value)


def add_boundary(parent: h5py.Group, name: str, axis: str, size: int, kind: str, cells: list[int]) -> h5py.Group:
    """Add a boundary condition of ``kind`` WALL, OPEN or PERIODIC at some ``cells`` of an axis with ``size`` cells."""
    group = parent.create_group(name)
    group.attrs["associated_dims"] = [axis]
    group.attrs["associated_fields"] = list(FIELDS)
    group.attrs["bc_type"] = kind
    mark_varying(group)
    mask = np.zeros(size, dtype=bool)
    mask[cells] = True
    group.create_dataset("mask", data=mask)
    return group


def mark_field(dataset: h5py.Dataset, time_varying: bool, sample_varying: bool = True) -> None:
    """Set the attributes of a field that varies along all three axes of space."""
    dataset.attrs["dim_varying"] = np.ones(3, dtype=bool)
    mark_varying(dataset, sample_varying, time_varying)


def mark_varying(item: h5py.HLObject, sample_varying: bool = False, time_varying: bool = False) -> None:
    """Set the attributes that say whether an object varies by trajectory and with time."""
    item.attrs["sample_varying"] = sample_varying
    item.attrs["time_varying"] = time_varying
