"""A passive concentration that any flow can carry, and its initial state."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.section import PositiveFloat, Section


class ScalarConfig(Section, changes="data"):
    """A passive concentration, advected and diffused. It starts between 0 and 1 and is zero in solid voxels."""

    diffusivity: PositiveFloat = 0.02
    pattern: Literal["blob", "stripes"] = "blob"

    def initial(self, solid_XYZ: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
        """Draw the initial concentration [X, Y, Z]: a round blob around a random fluid cell, or two periods along x.

        It is smooth and periodic except at solid voxels, where it is zero.
        """
        shape = solid_XYZ.shape
        if self.pattern == "stripes":
            phase_X = 4 * np.pi * (np.arange(shape[0]) + 0.5) / shape[0] + rng.uniform(0, 2 * np.pi)
            wave_XYZ = np.broadcast_to((0.5 + 0.5 * np.sin(phase_X))[:, None, None], shape)
            return np.where(solid_XYZ, 0.0, wave_XYZ)
        fluid_N3 = np.argwhere(~solid_XYZ)
        centre_3 = fluid_N3[rng.integers(len(fluid_N3))]
        squares = []
        for size, centre in zip(shape, centre_3, strict=True):
            offset = np.abs(np.arange(size) - centre)
            squares.append(np.minimum(offset, size - offset) ** 2)
        square_XYZ = squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :]
        return np.where(solid_XYZ, 0.0, np.exp(-square_XYZ / (2 * (min(shape) / 8) ** 2)))
