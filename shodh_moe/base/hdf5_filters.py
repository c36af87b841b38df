"""HDF5's compression filters: which of them a dataset needs, and whether this machine has them."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path

import h5py

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable


def require_filters(path: Path | str, name: str, dataset: h5py.Dataset) -> None:
    """Check that the filters of a dataset are there; load those of the package hdf5plugin if one is missing.

    Raises:
        UserError: a filter is missing; the message says how to get it and how to do without it.
    """
    properties = dataset.id.get_create_plist()
    for index in range(properties.get_nfilters()):
        code, _, _, text = properties.get_filter(index)
        if h5py.h5z.filter_avail(code):
            continue
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")
        if not h5py.h5z.filter_avail(code):
            title = printable(text.decode(errors="replace"))[:80] or "unnamed"
            raise UserError(
                f"{path}: {name} is compressed with filter {code} ({title}), which is not installed: install it with "
                "`pip install hdf5plugin`, or convert the file where it is with `h5repack -f GZIP=4 in.h5 out.h5`"
            )
