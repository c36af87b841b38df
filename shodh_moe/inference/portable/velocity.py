"""The Helmholtz decoder's operations in a form that a graph can hold: products with real matrices, and one loop.

The kernels of `shodh_moe.kernels` and complex Fourier transforms are not available outside this package or in ONNX. On
a periodic line every derivative, its Laplacian's eigenvectors and the operator T of `shodh_moe.tokenizer.walls` are
real N x N matrices, so all of them become matrix products. All of it is in float64.

Shapes: 3 components, X Y Z space, N points along an axis; the batch B is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from shodh_moe.kernels import differentiation_matrix
from shodh_moe.tokenizer.walls import MAX_ITERATIONS, may_flow, t_matrix

# Each round of conjugate gradients reduces the divergence by this factor, and removes what rounding left of the last.
REDUCTION = 1e-8
ROUNDS = 2
AXES = (1, 2, 3)  # of [B, X, Y, Z]


class MatrixOperations(nn.Module):
    """`shodh_moe.tokenizer.helmholtz.Operations` made of matrix products, for one grid and operator.

    Args:
        grid: X, Y and Z.
        operator: one of `shodh_moe.kernels.differentiation.OPERATORS`.
    """

    inverse_BXYZ: Tensor
    solver_inverse_BXYZ: Tensor

    def __init__(self, grid: list[int], operator: str):
        super().__init__()
        # Velocities conserved by central4 are made of those conserved by central2, see `walls`.
        kinds = {"": operator, "solver_": "central2" if operator == "central4" else operator}
        for axis, size in zip(AXES, grid, strict=True):
            for kind, name in kinds.items():
                derivative_NN = differentiation_matrix(size, name, 1.0, torch.float64)
                self._keep(f"{kind}derivative{axis}", derivative_NN)
                self._keep(f"{kind}adjoint{axis}", -derivative_NN.T)
            self._keep(f"from_modes{axis}", fourier_modes(size))
            self._keep(f"to_modes{axis}", fourier_modes(size).T)
            self._keep(f"t{axis}", t_matrix(size))
            self._keep(f"t_inverse{axis}", torch.linalg.inv(t_matrix(size)))
        for kind, name in kinds.items():
            self.register_buffer(f"{kind}inverse_BXYZ", inverse_laplacian(grid, name), persistent=False)

    def _keep(self, name: str, matrix_NN: Tensor) -> None:
        # Transposed, and each one a tensor of its own: a loop's inputs must not share memory.
        self.register_buffer(name, matrix_NN.T.clone(memory_format=torch.contiguous_format), persistent=False)

    def curl(
        self, potential_B3XYZ: Tensor, mean_B3: Tensor | None = None, operator: str = "", adjoint: bool = False
    ) -> Tensor:
        """See `shodh_moe.kernels.curl`; the operator is that of this object."""
        matrix = "adjoint" if adjoint else "derivative"  # -D^T in place of D
        a, parts = potential_B3XYZ.unbind(1), []
        for i in range(3):  # u_i = D_j a_k - D_k a_j
            j, k = (i + 1) % 3, (i + 2) % 3
            parts.append(self._along(a[k], AXES[j], matrix) - self._along(a[j], AXES[k], matrix))
        u_B3XYZ = torch.stack(parts, 1)
        return u_B3XYZ if mean_B3 is None else u_B3XYZ + mean_B3[:, :, None, None, None]

    def vector_potential(self, u_B3XYZ: Tensor, operator: str = "") -> Tensor:
        """See `shodh_moe.tokenizer.helmholtz.vector_potential`."""
        rotation = self.curl(u_B3XYZ, adjoint=True)
        return torch.stack([self._by_modes(one, self.inverse_BXYZ) for one in rotation.unbind(1)], 1)

    def project(self, w_B3XYZ: Tensor, solid_B1XYZ: Tensor, operator: str) -> Tensor:
        """See `shodh_moe.tokenizer.walls.project`. Not more than `MAX_ITERATIONS` iterations a round."""
        mask_B3XYZ = may_flow(solid_B1XYZ, operator)
        if operator != "central4":
            return self._projected(w_B3XYZ, mask_B3XYZ)
        w_B3XYZ = torch.where(solid_B1XYZ == 0, w_B3XYZ, 0.0)
        return self._along_others(self._projected(self._along_others(w_B3XYZ, "t_inverse"), mask_B3XYZ), "t")

    def _projected(self, w_B3XYZ: Tensor, mask_B3XYZ: Tensor) -> Tensor:
        u_B3XYZ = torch.where(mask_B3XYZ, w_B3XYZ, 0.0)
        mask_B3XYZ = mask_B3XYZ.to(u_B3XYZ.dtype)
        for _ in range(ROUNDS):
            phi_BXYZ = self._solve(self._divergence(u_B3XYZ), mask_B3XYZ)
            u_B3XYZ = u_B3XYZ - mask_B3XYZ * self._divergence_adjoint(phi_BXYZ)
        return u_B3XYZ

    def _solve(self, r_BXYZ: Tensor, mask_B3XYZ: Tensor) -> Tensor:
        """Solve D m D^T phi = r by conjugate gradients, preconditioned as those of `walls`."""
        target = REDUCTION**2 * r_BXYZ.square().sum()
        z_BXYZ = self._by_modes(r_BXYZ, self.solver_inverse_BXYZ)

        def unsolved(count: Tensor, phi: Tensor, r: Tensor, direction: Tensor, rz: Tensor) -> Tensor:
            return (r.square().sum() > target) & (rz > 0) & (count < MAX_ITERATIONS)

        def iterate(count: Tensor, phi: Tensor, r: Tensor, direction: Tensor, rz: Tensor) -> tuple[Tensor, ...]:
            product = self._divergence(mask_B3XYZ * self._divergence_adjoint(direction))
            step = rz / (direction * product).sum()
            r = r - step * product
            z = self._by_modes(r, self.solver_inverse_BXYZ)
            after = (r * z).sum()
            return count + 1, phi + step * direction, r, z + after / rz * direction, after

        start = (torch.zeros((), dtype=torch.int64), torch.zeros_like(r_BXYZ), r_BXYZ.clone(), z_BXYZ.clone())
        values: tuple[Tensor, ...] = (*start, (r_BXYZ * z_BXYZ).sum())
        if torch.compiler.is_exporting():
            return while_loop(unsolved, iterate, values)[1]
        while unsolved(*values):  # the same without the compiler
            values = iterate(*values)
        return values[1]

    def _divergence(self, u_B3XYZ: Tensor) -> Tensor:
        x, y, z = (self._along(u, axis, "solver_derivative") for axis, u in zip(AXES, u_B3XYZ.unbind(1), strict=True))
        return x + y + z

    def _divergence_adjoint(self, g_BXYZ: Tensor) -> Tensor:
        return -torch.stack([self._along(g_BXYZ, axis, "solver_adjoint") for axis in AXES], 1)

    def _by_modes(self, f_BXYZ: Tensor, factor_BXYZ: Tensor) -> Tensor:
        """Multiply each product of three Fourier modes in f by its factor."""
        for axis in AXES:
            f_BXYZ = self._along(f_BXYZ, axis, "to_modes")
        f_BXYZ = f_BXYZ * factor_BXYZ
        for axis in AXES:
            f_BXYZ = self._along(f_BXYZ, axis, "from_modes")
        return f_BXYZ

    def _along_others(self, u_B3XYZ: Tensor, matrix: str) -> Tensor:
        """Apply a matrix along the two axes other than each component's own."""
        parts = []
        for own, u_BXYZ in zip(AXES, u_B3XYZ.unbind(1), strict=True):
            for axis in sorted(set(AXES) - {own}):
                u_BXYZ = self._along(u_BXYZ, axis, matrix)
            parts.append(u_BXYZ)
        return torch.stack(parts, 1)

    def _along(self, f_BXYZ: Tensor, axis: int, matrix: str) -> Tensor:
        """Multiply every line of f along an axis by a matrix."""
        return (f_BXYZ.transpose(axis, 3) @ getattr(self, f"{matrix}{axis}")).transpose(axis, 3)


def inverse_laplacian(grid: list[int], operator: str) -> Tensor:
    """1 / |k_D|^2 for every product of three modes, float64 [1, X, Y, Z]; 0 where k_D = 0."""
    x, y, z = (
        (differentiation_matrix(size, operator, 1.0, torch.float64) @ fourier_modes(size)).square().sum(0)
        for size in grid
    )
    square = x[:, None, None] + y[:, None] + z
    return torch.where(square > 1e-12, 1 / square.clamp(min=1e-12), 0.0)[None]


def fourier_modes(size: int) -> Tensor:
    """Return an orthonormal basis of real Fourier modes as columns, float64 [N, N].

    It diagonalises D^T D of every derivative operator D, because that is a symmetric circulant matrix.
    """
    place_N = torch.arange(size, dtype=torch.float64)
    columns = [torch.full((size,), size**-0.5, dtype=torch.float64)]
    for k in range(1, (size + 1) // 2):
        angle_N = 2 * math.pi * k * place_N / size
        columns += [(2 / size) ** 0.5 * angle_N.cos(), (2 / size) ** 0.5 * angle_N.sin()]
    if size % 2 == 0:
        columns.append(size**-0.5 * (1 - 2 * (place_N % 2)))
    return torch.stack(columns, 1)
