"""Inspect HDF5 files in a separate process, because HDF5 can crash, hang or exhaust memory on damaged files.

`shodh_moe.data.opening` starts ``python -m shodh_moe.inspection`` and asks it about every file before its own process
opens the file. This folder imports only h5py and numpy, so that the process starts in a tenth of a second.
"""
