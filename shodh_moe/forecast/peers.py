"""The networks that ours is compared with: they map the history, as channels, to the change to the next snapshot.

Shapes: B batch, H given snapshots, X Y Z space. Channels of the input: velocity and pressure of each given snapshot,
the oldest first, and the solid mask. Fields are divided by their rms over the training data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file
from shodh_moe.base.tensors import save_tensors
from shodh_moe.data import FieldStats
from shodh_moe.forecast.config import DPOTPeer, FNOPeer, ForecastConfig, Peer, UNetPeer, UNOPeer
from shodh_moe.operators import DPOT3d, DPOTSize, UNet3d
from shodh_moe.operators.layers import initial_weights

FIELDS = 4  # velocity and pressure


def make_peer(peer: Peer, history: int, seed: int) -> nn.Module:
    """Make a network with the given seed, [B, 4 H + 1, X, Y, Z] to [B, 4, X, Y, Z].

    Raises:
        UserError: the network needs a library that is not installed.
    """
    channels = FIELDS * history + 1
    if isinstance(peer, UNetPeer):
        return UNet3d(channels, FIELDS, peer.width, peer.levels, seed)
    if isinstance(peer, DPOTPeer):
        return DPOT3d(DPOTSize(peer.width, peer.patch, peer.blocks, peer.heads), channels, FIELDS, seed)
    library = neuraloperator()
    with initial_weights(seed):
        if isinstance(peer, FNOPeer):
            modes = (peer.modes,) * 3
            return library.FNO(modes, channels, FIELDS, hidden_channels=peer.width, n_layers=peer.layers)
        assert isinstance(peer, UNOPeer)
        return library.UNO(channels, FIELDS, **_uno(peer.width, peer.modes))


def _uno(width: int, modes: int) -> dict[str, Any]:
    """The five layers of the library's example: down, down, level, up, up; the inner layers are twice as wide."""
    outer, inner = [modes] * 3, [max(modes // 2, 1)] * 3
    return {
        "hidden_channels": width,
        "lifting_channels": 2 * width,
        "projection_channels": 2 * width,
        "n_layers": 5,
        "uno_out_channels": [width, 2 * width, 2 * width, 2 * width, width],
        "uno_n_modes": [outer, inner, inner, inner, outer],
        "channel_mlp_skip": "linear",  # the default needs layers of equal width
        "uno_scalings": [[1.0] * 3, [0.5] * 3, [1.0] * 3, [1.0] * 3, [2.0] * 3],
    }


def neuraloperator() -> Any:
    """The models of the library neuraloperator. Raises: UserError: it is not installed."""
    try:
        from neuralop import models
    except ImportError as error:
        raise UserError(
            f"the peers fno and uno need the library neuraloperator ({error}): install the extra `forecast` "
            "(pip install 'shodh_moe[forecast]'), or leave them out (peers.fno=null peers.uno=null)"
        ) from None
    return models


def require_library(config: ForecastConfig) -> None:
    """Raise `UserError` if a peer needs a library that is not installed."""
    if config.peers.fno or config.peers.uno:
        neuraloperator()


class PeerModel(nn.Module):
    """A peer with the scales of its fields.

    Args:
        network: from `make_peer`.
        history: H.
        stats: statistics of the training data.
    """

    scale_4111: Tensor

    def __init__(self, network: nn.Module, history: int, stats: FieldStats):
        super().__init__()
        self.network, self.history = network, history
        scale = torch.tensor([stats.velocity_rms] * 3 + [stats.pressure_rms])
        self.register_buffer("scale_4111", scale[:, None, None, None])

    def forward(self, fields_BH4XYZ: Tensor, solid_B1XYZ: Tensor) -> Tensor:
        """Predict velocity and pressure of the next snapshot, [B, 4, X, Y, Z], in the units of the data."""
        scaled = fields_BH4XYZ / self.scale_4111
        change_B4XYZ = self.network(torch.cat([scaled.flatten(1, 2), solid_B1XYZ], dim=1))
        return (scaled[:, -1] + change_B4XYZ) * self.scale_4111

    def parameter_count(self) -> int:
        """Number of trainable real numbers; a complex weight counts as two."""
        return sum(one.numel() * (2 if one.is_complex() else 1) for one in self.parameters())

    def save(self, path: Path) -> None:
        """Write all weights and buffers to a safetensors file."""
        with atomic_file(path) as temporary:
            save_tensors({name: _real(one) for name, one in _named(self)}, temporary)

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        stored = load_file(path)
        with torch.no_grad():
            for name, one in _named(self):
                _real(one).copy_(stored[name])


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    # Not state_dict(): that of the library's models holds a dictionary as well.
    return [*module.named_parameters(), *module.named_buffers()]


def _real(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return torch.view_as_real(detached) if detached.is_complex() else detached
