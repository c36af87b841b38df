"""Inspect HDF5 files in a separate process, because HDF5 may crash, hang or use up all memory on damaged files.

`shodh_moe.data.opening` starts ``python -m shodh_moe.inspection`` and asks it about every file before opening the file
in its own process. This package imports only h5py and numpy, so that the process starts in a tenth of a second.
"""
