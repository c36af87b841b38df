"""Pictures of the load of the experts over time."""

from __future__ import annotations

from typing import Any

import numpy as np

COLUMNS = 256  # maximum width of a load map
MAP_HEIGHT = 128  # minimum height of a map in pixels
# Map colours at no load, at an even share 1 / E, and at a much larger load.
STARVED, EVEN, BUSY = (33, 102, 172), (247, 247, 247), (178, 24, 43)


class LoadMaps:
    """Load of the experts over time: one experts-by-time map per layer and domain.

    As soon as a map has `COLUMNS` columns, neighbours are averaged, so that each column covers twice as many records.

    Attributes:
        columns: loads [layers, domains, experts], oldest first.
        domains: names of the domains.
    """

    def __init__(self) -> None:
        self.columns: list[np.ndarray] = []
        self.domains: list[str] = []
        self._records_per_column = 1
        self._waiting: list[np.ndarray] = []

    def add(self, layers: list[dict[str, Any]]) -> None:
        """Add one routing record: a dict with ``load`` by domain for each layer."""
        self.domains = list(layers[0]["load"])
        self._waiting.append(np.array([list(layer["load"].values()) for layer in layers]))
        if len(self._waiting) < self._records_per_column:
            return
        self.columns.append(np.mean(self._waiting, axis=0))
        self._waiting = []
        if len(self.columns) == COLUMNS:
            pairs = np.stack(self.columns)
            self.columns = list((pairs[::2] + pairs[1::2]) / 2)
            self._records_per_column *= 2

    def images(self) -> dict[str, np.ndarray]:
        """Return RGB images, uint8 [height, width, 3], by ``layer_<number>/<domain>``.

        Expert 0 is at the top and time runs to the right. White is an even share, blue is less, red is more.
        """
        if not self.columns:
            return {}
        load_LDET = np.stack(self.columns, axis=-1)
        experts = load_LDET.shape[2]
        # 0 at no load, 1/2 at the even share, approaching 1 above it, for any number of experts.
        level = load_LDET * experts / (1 + load_LDET * experts)
        rgb = np.stack([np.interp(level, (0, 0.5, 1), ends) for ends in zip(STARVED, EVEN, BUSY, strict=True)], axis=-1)
        rgb = rgb.round().astype(np.uint8).repeat(max(MAP_HEIGHT // experts, 4), axis=2).repeat(2, axis=3)
        return {
            f"layer_{layer}/{domain}": rgb[layer, d]
            for layer in range(len(rgb))
            for d, domain in enumerate(self.domains)
        }
