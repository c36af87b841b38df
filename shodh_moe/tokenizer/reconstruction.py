"""The training objective of a tokenizer: errors of reconstructed fields.

Shapes: B batch, X Y Z space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shodh_moe.kernels import divergence
from shodh_moe.tokenizer.tokenizer import Tokenizer


class Reconstruction(nn.Module):
    """Errors of a tokenizer on fields that pass through its encoder and decoder."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.names = ["velocity_mse", "pressure_mse"]
        if tokenizer.config.decoder == "direct":
            self.names.append("divergence_mse")

    def forward(self, fields_B5XYZ: Tensor) -> Tensor:
        """Mean squares over each sample's voxels and components, [names, B], in the order of `names`.

        They are the errors of velocity and pressure over their training rms, and cell width times divergence of that
        velocity under the config's operator.
        """
        tokenizer = self.tokenizer
        normalised = tokenizer.normalise(fields_B5XYZ)
        flow = tokenizer.decode_normalised(tokenizer.encoder(normalised), fields_B5XYZ[:, 4:])
        parts = [flow.velocity_B3XYZ - normalised[:, :3], flow.pressure_B1XYZ - normalised[:, 3:4]]
        if "divergence_mse" in self.names:
            parts.append(divergence(flow.conserved_B3XYZ, tokenizer.config.operator))
        return torch.stack([part.square().flatten(1).mean(1) for part in parts])
