"""The terms of a tokenizer's training loss: errors of reconstructed fields.

Shapes: B batch, X Y Z space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shodh_moe.kernels import divergence
from shodh_moe.tokenizer.tokenizer import Tokenizer


class Reconstruction(nn.Module):
    """A module that encodes and decodes fields with a tokenizer and returns their errors.

    Attributes:
        names: names of the errors, in the order of the results of `forward`.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.names = ["velocity_mse", "pressure_mse"]
        if tokenizer.config.decoder == "direct":
            self.names.append("divergence_mse")

    def forward(self, fields_B5XYZ: Tensor) -> Tensor:
        """Return mean squares over each sample's voxels and components, float32 or wider [len(names), B].

        ``velocity_mse`` and ``pressure_mse`` are errors of the fields as `Tokenizer.normalise` divides them: by their
        training rms, or with ``tokenizer.scales: sample`` by the rms of each sample itself. A direct decoder
        also has ``divergence_mse``, the cell width times the divergence of that velocity under the config's operator.

        Args:
            fields_B5XYZ: velocity, pressure and solid mask in the data's units.
        """
        tokenizer = self.tokenizer
        z_raw, normalised = tokenizer.encode_raw(fields_B5XYZ)
        flow = tokenizer.decode_normalised(z_raw, fields_B5XYZ[:, 4:])
        parts = [flow.velocity_B3XYZ - normalised[:, :3], flow.pressure_B1XYZ - normalised[:, 3:4]]
        if "divergence_mse" in self.names:
            parts.append(divergence(flow.conserved_B3XYZ, tokenizer.config.operator))
        return torch.stack([part.square().flatten(1).mean(1) for part in parts])
