"""A trained model in this process, and the flows that it predicts.

Shapes: H given snapshots, N predicted ones, C latent channels, x y z latent grid, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from shodh_moe.base.boundaries import UNKNOWN_BOUNDARIES, Boundaries, codes_of
from shodh_moe.base.errors import UserError
from shodh_moe.base.tensors import sent
from shodh_moe.config.sizes import require_size, size_step
from shodh_moe.data.dataset import Fields, source_of
from shodh_moe.inference.rollout import decode_both, rollout
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.stride import require_stride
from shodh_moe.tokenizer import Tokenizer


@dataclass
class Model:
    """A trained model: its two networks with all experts in this process, in evaluation mode.

    Attributes:
        step: training step of the weights.
        world_size, ep_size: number of ranks and expert-parallel size of the training.
        weights_sha256: see `shodh_moe.inference.loading.weights_sha256`.
    """

    tokenizer: Tokenizer
    transformer: LatentTransformer
    step: int
    world_size: int
    ep_size: int
    weights_sha256: str

    @property
    def grid(self) -> list[int]:
        """Numbers of voxels along x, y and z of the flows that its tokenizer was trained on."""
        return self.tokenizer.grid

    @property
    def size_step(self) -> int:
        """It takes flows on any grid whose sizes are multiples of this number."""
        return size_step(self.transformer.config)

    @property
    def history(self) -> int:
        """Number of snapshots that it predicts the next one from, H."""
        return self.transformer.config.history

    @property
    def operator(self) -> str:
        """The operator for which its velocities are divergence-free, as `shodh_moe.kernels.divergence` takes it."""
        return self.tokenizer.config.operator

    @property
    def strides(self) -> list[int]:
        """The time strides that it was trained with, in time steps of the training data."""
        return self.transformer.config.strides

    def span(self, stride: int | None = None) -> int:
        """Number of snapshots from the first to the last that it is given; ``stride`` as in `forecast`."""
        return (self.history - 1) * (self.strides[0] if stride is None else stride) + 1

    def forecast(self, fields: Mapping[str, Tensor], steps: int, stride: int | None = None) -> Fields:
        """Predict the next ``steps`` snapshots of a flow; runs on a GPU if there is one.

        Args:
            fields: ``velocity`` [T, 3, X, Y, Z], ``pressure`` [T, 1, X, Y, Z] and, if there are walls, ``solid``
                [1, X, Y, Z], in the units of the training data, on a grid whose sizes are multiples of ``size_step``.
                Any `Dataset` gives them. They must be the training data's time step apart. Of the last ones every
                ``stride``-th is used, ``history`` in all. A model that is told boundaries (``model.boundaries`` or
                ``model.positions``) reads them from ``fields.source``; those of a plain dictionary are unknown.
            steps: number of snapshots to predict.
            stride: number of time steps from one used or predicted snapshot to the next, one of ``strides``; None: the
                first of them.

        Returns:
            velocity and pressure at the voxel centres in float64 on the CPU, and the solid mask; ``time``, if the
            given fields have it; with the operator ``staggered`` also ``velocity_face``. The divergence of
            ``velocity_face``, or of ``velocity`` with other operators, vanishes to rounding for the model's operator.

        Raises:
            UserError: a field is missing, the model does not take the grid, there are too few snapshots, the model was
                not trained with the stride, or a given or predicted value is not finite.
        """
        stride = self.strides[0] if stride is None else stride
        require_stride(stride, self.strides)
        given_H4XYZ, solid_1XYZ = self.checked(fields, steps, stride)
        with torch.no_grad():
            flow = self.continue_flow(given_H4XYZ, solid_1XYZ, stride, source_of(fields).boundaries)
            predicted = list(islice(flow, steps))
        return self.collected(predicted, fields, solid_1XYZ, stride)

    def collected(
        self, predicted: Sequence[tuple[Tensor, Tensor]], fields: Mapping[str, Tensor], solid_1XYZ: Tensor, stride: int
    ) -> Fields:
        """Return the results of `continue_flow` as `forecast` does.

        Raises:
            UserError: a value is not finite.
        """
        for step, (fields_4XYZ, _) in enumerate(predicted, 1):
            if not fields_4XYZ.isfinite().all():
                raise UserError(f"the prediction is not finite at step {step}: ask for fewer steps")
        centres_N4XYZ = torch.stack([one for one, _ in predicted])
        tensors = {"velocity": centres_N4XYZ[:, :3], "pressure": centres_N4XYZ[:, 3:], "solid": solid_1XYZ}
        if self.operator == "staggered":
            tensors["velocity_face"] = torch.stack([one for _, one in predicted])
        time_T = fields.get("time")
        if time_T is not None and len(time_T) > 1:
            later_N = stride * torch.arange(1, len(predicted) + 1, dtype=torch.float64)
            tensors["time"] = time_T[-1] + (time_T[-1] - time_T[-2]) * later_N
        return Fields(tensors, source_of(fields))

    def continue_flow(
        self, fields_H4XYZ: Tensor, solid_1XYZ: Tensor, stride: int, boundaries: Boundaries = UNKNOWN_BOUNDARIES
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Predict one snapshot after another, without end, on a GPU if there is one.

        Args:
            fields_H4XYZ: exactly H snapshots of velocity and pressure in the units of the training data, float32.
            solid_1XYZ: 1 in solid voxels, 0 in fluid, float32.
            stride: distance of the given snapshots, one of ``strides``.
            boundaries: kind of the low and the high face of each axis.

        Yields:
            Velocity and pressure at the centres [4, X, Y, Z], and the velocity whose divergence vanishes [3, X, Y, Z]
            (see `Flow`), both float64 on the CPU.
        """
        flows = self.continue_flows(fields_H4XYZ[None], solid_1XYZ[None], stride, [boundaries])
        for exact_B4XYZ, conserved_B3XYZ in flows:
            yield exact_B4XYZ[0], conserved_B3XYZ[0]

    def continue_flows(
        self, fields_BH4XYZ: Tensor, solid_B1XYZ: Tensor, stride: int, boundaries: Sequence[Boundaries]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `continue_flow`, for B flows on one grid at a time: yields [B, 4, X, Y, Z] and [B, 3, X, Y, Z]."""
        pairs = zip(fields_BH4XYZ, solid_B1XYZ, strict=True)
        encoded = [self.encode_flow(fields_H4XYZ, solid_1XYZ) for fields_H4XYZ, solid_1XYZ in pairs]
        z_BHCxyz = torch.stack([z_HCxyz for z_HCxyz, _ in encoded])
        geometry_BCxyz = torch.cat([geometry_1Cxyz for _, geometry_1Cxyz in encoded])
        solid_B1XYZ = sent(solid_B1XYZ, z_BHCxyz.device)
        samples, device = len(z_BHCxyz), z_BHCxyz.device
        stride_B = torch.full((samples,), stride, device=device)
        boundary_B32 = sent(torch.tensor([codes_of(one) for one in boundaries]), device)
        context = Context(samples, stride_B=stride_B, boundary_B32=boundary_B32)
        for z_BCxyz in rollout(self.transformer, z_BHCxyz, geometry_BCxyz, context):
            exact_B4XYZ, conserved_B3XYZ = decode_both(self.tokenizer, z_BCxyz, solid_B1XYZ)
            yield exact_B4XYZ.cpu(), conserved_B3XYZ.cpu()

    def encode_flow(self, fields_H4XYZ: Tensor, solid_1XYZ: Tensor) -> tuple[Tensor, Tensor]:
        """Encode H snapshots and their geometry, [H, C, x, y, z] and [1, C, x, y, z]; on a GPU if there is one.

        Both networks move there.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer.to(device)
        self.transformer.to(device)
        given_H5XYZ = torch.cat([fields_H4XYZ, solid_1XYZ.expand(len(fields_H4XYZ), -1, -1, -1, -1)], dim=1)
        z_HCxyz = torch.cat([self.tokenizer.encode(sent(one, device)) for one in given_H5XYZ.split(1)])
        return z_HCxyz, self.tokenizer.encode_geometry(sent(solid_1XYZ, device)[None])

    def checked(self, fields: Mapping[str, Tensor], steps: int, stride: int) -> tuple[Tensor, Tensor]:
        """Return the H snapshots to use [H, 4, X, Y, Z] and the solid mask [1, X, Y, Z], both float32 on the CPU.

        Raises:
            UserError: as `forecast`, of what is given.
        """
        if missing := {"velocity", "pressure"} - fields.keys():
            raise UserError(f"the fields have no {' and no '.join(sorted(missing))}: give both, as a Dataset does")
        velocity, pressure = (torch.as_tensor(fields[name]) for name in ("velocity", "pressure"))
        grid = velocity.shape[2:]
        solid = torch.as_tensor(fields["solid"]) if "solid" in fields else torch.zeros(1, *grid)
        shapes = [list(one.shape) for one in (velocity, pressure, solid)]
        if velocity.ndim != 5 or shapes != [[len(velocity), 3, *grid], [len(velocity), 1, *grid], [1, *grid]]:
            raise UserError(
                f"velocity {shapes[0]}, pressure {shapes[1]} and solid {shapes[2]} do not fit together: "
                "give [T, 3, X, Y, Z], [T, 1, X, Y, Z] and [1, X, Y, Z]"
            )
        require_size(grid, self.transformer.config, "the grid of the fields is")
        needed = self.span(stride)
        if len(velocity) < needed or steps < 1:
            raise UserError(
                f"{len(velocity)} snapshots given and {steps} asked for: give at least {needed}, and ask for at least 1"
            )
        given_H4XYZ = torch.cat([one[-needed::stride].float().cpu() for one in (velocity, pressure)], dim=1)
        solid_1XYZ = solid.float().cpu()
        if not (given_H4XYZ.isfinite().all() and solid_1XYZ.isfinite().all()):
            raise UserError("the given fields have values that are not finite: give snapshots without NaN or infinity")
        return given_H4XYZ, solid_1XYZ
