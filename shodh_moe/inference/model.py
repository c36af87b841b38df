"""A trained model in this process, and the flows that it predicts.

Shapes: H given snapshots, N predicted ones, C latent channels, x y z latent grid, X Y Z space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.tensors import sent
from shodh_moe.data.dataset import Fields
from shodh_moe.inference.rollout import decode_both, rollout
from shodh_moe.model import LatentTransformer
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
        """Numbers of voxels along x, y and z, of every flow that it predicts."""
        return self.tokenizer.grid

    @property
    def history(self) -> int:
        """Number of snapshots that it predicts the next one from, H."""
        return self.transformer.config.history

    @property
    def operator(self) -> str:
        """The operator for which its velocities are divergence-free, as `shodh_moe.kernels.divergence` takes it."""
        return self.tokenizer.config.operator

    def forecast(self, fields: Mapping[str, Tensor], steps: int) -> Fields:
        """Predict the next ``steps`` snapshots of a flow; runs on a GPU if there is one.

        Args:
            fields: ``velocity`` [T, 3, X, Y, Z], ``pressure`` [T, 1, X, Y, Z] and, if there are walls, ``solid``
                [1, X, Y, Z], in the units of the training data. Any `Dataset` of the model's grid gives them. The last
                ``history`` snapshots are used, which must be the training data's time step apart.

        Returns:
            velocity and pressure at the voxel centres in float64 on the CPU, and the solid mask; ``time``, if the
            given fields have it; with the operator ``staggered`` also ``velocity_face``. The divergence of
            ``velocity_face``, or of ``velocity`` with other operators, vanishes to rounding for the model's operator.

        Raises:
            UserError: a field is missing or does not have the model's grid, there are too few snapshots, or a given or
                predicted value is not finite.
        """
        given_H4XYZ, solid_1XYZ = self._checked(fields, steps)
        with torch.no_grad():
            predicted = list(islice(self.continue_flow(given_H4XYZ, solid_1XYZ), steps))
        for step, (fields_4XYZ, _) in enumerate(predicted, 1):
            if not fields_4XYZ.isfinite().all():
                raise UserError(f"the prediction is not finite at step {step}: ask for fewer steps")
        centres_N4XYZ = torch.stack([one for one, _ in predicted])
        tensors = {"velocity": centres_N4XYZ[:, :3], "pressure": centres_N4XYZ[:, 3:], "solid": solid_1XYZ}
        if self.operator == "staggered":
            tensors["velocity_face"] = torch.stack([one for _, one in predicted])
        time_T = fields.get("time")
        if time_T is not None and len(time_T) > 1:
            tensors["time"] = time_T[-1] + (time_T[-1] - time_T[-2]) * torch.arange(1, steps + 1, dtype=torch.float64)
        return Fields(tensors, fields.source if isinstance(fields, Fields) else None)

    def continue_flow(self, fields_H4XYZ: Tensor, solid_1XYZ: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Predict one snapshot after another, without end, on a GPU if there is one.

        Args:
            fields_H4XYZ: exactly H snapshots of velocity and pressure in the units of the training data, float32.
            solid_1XYZ: 1 in solid voxels, 0 in fluid, float32.

        Yields:
            Velocity and pressure at the centres [4, X, Y, Z], and the velocity whose divergence vanishes [3, X, Y, Z]
            (see `Flow`), both float64 on the CPU.
        """
        z_HCxyz, geometry_1Cxyz = self.encode_flow(fields_H4XYZ, solid_1XYZ)
        solid_1XYZ = sent(solid_1XYZ, z_HCxyz.device)
        for z_BCxyz in rollout(self.transformer, z_HCxyz[None], geometry_1Cxyz):
            exact_4XYZ, conserved_3XYZ = (x[0].cpu() for x in decode_both(self.tokenizer, z_BCxyz, solid_1XYZ))
            yield exact_4XYZ, conserved_3XYZ

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

    def _checked(self, fields: Mapping[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
        """Return the last H snapshots [H, 4, X, Y, Z] and the solid mask [1, X, Y, Z], both float32 on the CPU."""
        if missing := {"velocity", "pressure"} - fields.keys():
            raise UserError(f"the fields have no {' and no '.join(sorted(missing))}: give both, as a Dataset does")
        velocity, pressure = (torch.as_tensor(fields[name]) for name in ("velocity", "pressure"))
        solid = torch.as_tensor(fields["solid"]) if "solid" in fields else torch.zeros(1, *self.grid)
        shapes = [list(one.shape) for one in (velocity, pressure, solid)]
        wanted = [[len(velocity), 3, *self.grid], [len(velocity), 1, *self.grid], [1, *self.grid]]
        if shapes != wanted:
            axes = ", ".join(map(str, self.grid))
            raise UserError(
                f"velocity {shapes[0]}, pressure {shapes[1]} and solid {shapes[2]} do not fit the model: "
                f"give [T, 3, {axes}], [T, 1, {axes}] and [1, {axes}]"
            )
        if len(velocity) < self.history or steps < 1:
            raise UserError(
                f"{len(velocity)} snapshots given and {steps} asked for: give at least {self.history}, and ask for at "
                "least 1"
            )
        given_H4XYZ = torch.cat([one[-self.history :].float().cpu() for one in (velocity, pressure)], dim=1)
        solid_1XYZ = solid.float().cpu()
        if not (given_H4XYZ.isfinite().all() and solid_1XYZ.isfinite().all()):
            raise UserError("the given fields have values that are not finite: give snapshots without NaN or infinity")
        return given_H4XYZ, solid_1XYZ
