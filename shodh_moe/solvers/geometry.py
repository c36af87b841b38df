"""Random periodic solids with exact porosity, connected pores and flow paths along x."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BoolGrid = NDArray[np.bool_]
FloatGrid = NDArray[np.float64]


def add_sphere(distance_XYZ: FloatGrid, centre_3: NDArray[np.float64], radius: float, periodic_z: bool = True) -> None:
    """Lower distance_XYZ in place to the signed distance to a sphere in cells, where that is smaller.

    Distances are periodic in x and y, and in z unless ``periodic_z`` is False.
    """
    squares = []
    for axis, (size, centre) in enumerate(zip(distance_XYZ.shape, centre_3, strict=True)):
        offset = np.abs(np.arange(size) + 0.5 - centre)
        if axis < 2 or periodic_z:
            offset = np.minimum(offset, size - offset)
        squares.append(offset**2)
    reach_XYZ = np.sqrt(squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :])
    np.minimum(distance_XYZ, reach_XYZ - radius, out=distance_XYZ)


def sphere_field(shape: tuple[int, int, int], radius: float, porosity: float, rng: np.random.Generator) -> FloatGrid:
    """Smooth periodic field [X, Y, Z], low inside a random pack of overlapping spheres of about ``radius`` cells.

    Spheres are added until they fill 1 - porosity of the box; a slight blur rounds the cusps where two of them meet.
    """
    from scipy import ndimage

    distance_XYZ = np.full(shape, np.inf)
    while (distance_XYZ > 0).mean() > porosity:
        centre_3 = rng.uniform(0, 1, 3) * shape
        add_sphere(distance_XYZ, centre_3, radius * rng.uniform(0.75, 1.25))
    return ndimage.gaussian_filter(np.clip(distance_XYZ, -radius, radius), 1.0, mode="wrap")


def bed_field(shape: tuple[int, int, int], radius: float, porosity: float, rng: np.random.Generator) -> FloatGrid:
    """Smooth field [X, Y, Z], low inside a bed of randomly packed spheres of about ``radius`` cells.

    The bed is periodic in x and y. Its floor cuts the lowest spheres, and none rises above the last layer. Spheres are
    added until they fill 1 - porosity of the `dense_layers`; above these the bed becomes ever looser.
    """
    from scipy import ndimage

    nx, ny, nz = shape
    distance_XYZ = np.full(shape, np.inf)
    while (distance_XYZ[:, :, : dense_layers(nz, radius)] > 0).mean() > porosity:
        size = radius * rng.uniform(0.75, 1.25)
        centre_3 = np.array([rng.uniform(0, nx), rng.uniform(0, ny), rng.uniform(-size, nz - size)])
        add_sphere(distance_XYZ, centre_3, size, periodic_z=False)
    return ndimage.gaussian_filter(np.clip(distance_XYZ, -radius, radius), 1.0, mode=("wrap", "wrap", "nearest"))


def dense_layers(height: int, radius: float) -> int:
    """Number of layers in a bed of ``height`` layers that lie below its loose top, which is 2 ``radius`` thick."""
    return max(0, int(height - 2 * radius))


def blob_field(shape: tuple[int, int, int], length: float, rng: np.random.Generator) -> FloatGrid:
    """Periodic Gaussian-filtered noise [X, Y, Z] with blobs about as thick as spheres of radius ``length`` (cells)."""
    from scipy import ndimage

    return ndimage.gaussian_filter(rng.standard_normal(shape), 0.6 * length, mode="wrap")


def fractures(
    shape: tuple[int, int, int], aperture: float, count: int, roughness: float, rng: np.random.Generator
) -> BoolGrid:
    """Periodic solid mask [X, Y, Z] of a rock cut by ``count`` rough planes of open width ``aperture`` (cells).

    ``roughness`` is the rms displacement of a plane in cells. The first plane lies along x; the others cross it in
    any direction in which a plane fits the periodic box.
    """
    from scipy import ndimage

    grid = np.meshgrid(*[(np.arange(size) + 0.5) / size for size in shape], indexing="ij", sparse=True)
    solid_XYZ = np.ones(shape, dtype=bool)
    for number in range(count):
        # A plane is periodic in the box if it has a whole number of periods along each axis.
        waves_3 = rng.integers(-1, 2, 3)
        if number == 0:
            waves_3[0] = 0
        if not waves_3.any():
            waves_3[rng.integers(1, 3)] = 1
        phase_XYZ = sum(wave * axis for wave, axis in zip(waves_3, grid, strict=True)) + rng.uniform()
        apart = 1 / float(np.sqrt(((waves_3 / np.array(shape)) ** 2).sum()))
        noise_XYZ = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5 * aperture, mode="wrap")
        offset_XYZ = apart * ((phase_XYZ + 0.5) % 1 - 0.5) + noise_XYZ * (roughness / noise_XYZ.std())
        solid_XYZ &= np.abs(offset_XYZ) >= aperture / 2
    return solid_XYZ


def threshold(field_XYZ: FloatGrid, porosity: float) -> BoolGrid:
    """Solid mask: the lowest 1 - porosity of the cells of field_XYZ."""
    return field_XYZ < np.quantile(field_XYZ, 1 - porosity)


def connected_pores(solid_XYZ: BoolGrid) -> NDArray[np.int64]:
    """Number the pores of a periodic mask [X, Y, Z]: 0 in solids, from 1 on in fluid.

    Fluid cells have the same number if a path through cell faces, including those of the periodic box, connects them.
    """
    from scipy import ndimage
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    label_XYZ, count = ndimage.label(~solid_XYZ)
    pairs = []
    for axis in range(3):
        first, last = np.take(label_XYZ, 0, axis), np.take(label_XYZ, -1, axis)
        both = (first > 0) & (last > 0)
        pairs.append(np.stack([first[both], last[both]]))
    row, column = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(row)), (row, column)), shape=(count + 1, count + 1))
    _, merged = connected_components(graph, directed=False)
    return np.where(solid_XYZ, 0, merged[label_XYZ].astype(np.int64) + 1)


def percolating(solid_XYZ: BoolGrid) -> BoolGrid | None:
    """Fill every pore that cannot carry flow along x; return the new mask, or None if no pore can carry flow.

    A pore carries flow if it connects a cell of the first x layer to the same cell of the last layer within the box.
    """
    from scipy import ndimage

    # Cutting the box at x = 0 makes "the same pore on both faces" mean a path from one to the other.
    inside_XYZ, _ = ndimage.label(~solid_XYZ)
    first_YZ, last_YZ = inside_XYZ[0], inside_XYZ[-1]
    through_YZ = (first_YZ > 0) & (first_YZ == last_YZ)
    if not through_YZ.any():
        return None
    pore_XYZ = connected_pores(solid_XYZ)
    keep = np.unique(pore_XYZ[0][through_YZ])
    return ~np.isin(pore_XYZ, keep)
