"""Check a file against the rules of the_well's own checker and loader that our training does not need."""

from __future__ import annotations

from collections.abc import Iterator

import h5py
import numpy as np

_ROOT = ("dataset_name", "grid_type", "n_spatial_dims", "n_trajectories", "simulation_parameters")
_GROUPS = ("dimensions", "boundary_conditions", "scalars", "t0_fields", "t1_fields", "t2_fields")
_KINDS = ("WALL", "OPEN", "PERIODIC")


def schema_findings(file: h5py.File) -> Iterator[tuple[str, str]]:
    """Yield (dataset or attribute, what was found and expected) for each rule that the file breaks."""
    for name in _ROOT:
        if name not in file.attrs:
            yield name, "the root has no such attribute"
    missing = [name for name in _GROUPS if not isinstance(file.get(name), h5py.Group)]
    for name in missing:
        yield name, "no such group"
    for name in set(_GROUPS) - set(missing):
        yield from {"dimensions": _dimensions, "boundary_conditions": _boundaries, "scalars": _scalars}.get(
            name, _fields
        )(file[name])


def _flags(item: h5py.HLObject) -> Iterator[tuple[str, str]]:
    for flag in ("sample_varying", "time_varying"):
        if not isinstance(item.attrs.get(flag), (bool, np.bool_)):
            yield item.name.lstrip("/"), f"attribute {flag} is not a boolean"


def _dimensions(group: h5py.Group) -> Iterator[tuple[str, str]]:
    axes = [str(axis) for axis in np.atleast_1d(group.attrs.get("spatial_dims", []))]
    if len(axes) != 3:
        yield "dimensions", f"attribute spatial_dims is {axes}, expected the names of three axes"
    for name in ("time", *axes):
        if not isinstance(group.get(name), h5py.Dataset):
            yield f"dimensions/{name}", "no such dataset"
            continue
        if group[name].dtype != np.float32:
            yield f"dimensions/{name}", f"holds {group[name].dtype}, expected float32"
        yield from _flags(group[name])


def _boundaries(group: h5py.Group) -> Iterator[tuple[str, str]]:
    for name, item in group.items():
        where = f"boundary_conditions/{name}"
        kind = str(item.attrs.get("bc_type", "missing"))
        if kind not in _KINDS:
            yield where, f"attribute bc_type is {kind}, expected one of {', '.join(_KINDS)}"
        for attribute in ("associated_dims", "associated_fields"):
            if attribute not in item.attrs:
                yield where, f"no attribute {attribute}"
        mask = item.get("mask") if isinstance(item, h5py.Group) else None
        if not isinstance(mask, h5py.Dataset) or mask.dtype != bool:
            yield f"{where}/mask", "expected a dataset of booleans"
        yield from _flags(item)


def _names(group: h5py.Group) -> Iterator[tuple[str, str]]:
    where = group.name.lstrip("/")
    if "field_names" not in group.attrs:
        yield where, "no attribute field_names"
        return
    names = {str(name) for name in np.atleast_1d(group.attrs["field_names"])}
    if names != set(group):
        yield where, f"field_names is {sorted(names)}, but the group holds {sorted(group)}"


def _scalars(group: h5py.Group) -> Iterator[tuple[str, str]]:
    yield from _names(group)
    for name, item in group.items():
        yield from _flags(item)
        constant = not item.attrs.get("sample_varying", False) and not item.attrs.get("time_varying", False)
        if constant and getattr(item, "shape", None) != ():
            yield f"scalars/{name}", f"has shape {getattr(item, 'shape', None)}, expected () for a constant"


def _fields(group: h5py.Group) -> Iterator[tuple[str, str]]:
    yield from _names(group)
    for name, item in group.items():
        where = f"{group.name.lstrip('/')}/{name}"
        yield from _flags(item)
        varying = np.atleast_1d(item.attrs.get("dim_varying", []))
        if len(varying) != 3 or varying.dtype != bool:
            yield where, "attribute dim_varying is not three booleans"
        if not isinstance(item, h5py.Dataset) or item.dtype != np.float32:
            yield where, f"holds {getattr(item, 'dtype', 'a group')}, expected float32"
