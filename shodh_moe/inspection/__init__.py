"""Look through HDF5 files in a process of its own: HDF5 crashes, hangs and asks for any memory on damaged ones.

`shodh_moe.data.opening` starts ``python -m shodh_moe.inspection`` and asks it about every file before its own process
opens it. What is imported here is h5py and numpy alone, so that the process is up in a tenth of a second.
"""
