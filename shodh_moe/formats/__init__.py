"""Read the arrays in files of other programs, in a process of its own that starts fast and imports no torch."""

from shodh_moe.formats.apart import open_file
from shodh_moe.formats.arrays import Array, ArrayFile, Part

__all__ = ["Array", "ArrayFile", "Part", "open_file"]
