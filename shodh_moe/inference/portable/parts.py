"""The parts of a model that are exported as graphs: encoder, paths, step and decoder, each for one flow.

They compute what `Model.forecast` computes, with the same networks. Only what a graph cannot hold is replaced: tokens
are not sorted by expert, but every expert of the plan sees every token and its output is scaled by its gate, which is
zero for the tokens of other experts. If the paths are chosen by sample, the plan holds the chosen experts alone.

Shapes: H history, C latent channels, x y z latent grid, X Y Z space, N tokens, E experts of a plan, J experts per
token, R rows that choose a path (1, or N where each token or window chooses), D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import marks
from shodh_moe.inference.model import Model
from shodh_moe.inference.portable.velocity import MatrixOperations
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.moe import MoE
from shodh_moe.model.plan import Plan
from shodh_moe.model.routers.cosine import CosineRouter
from shodh_moe.model.routers.grown import GrownRouter
from shodh_moe.model.routers.linear import LinearRouter
from shodh_moe.model.routers.oracle import OracleRouter
from shodh_moe.model.routing import Routing
from shodh_moe.model.transformer import Block
from shodh_moe.tokenizer import Tokenizer
from shodh_moe.tokenizer.helmholtz import Operations


@dataclass(frozen=True)
class DensePlan(Plan):
    """A plan in which every expert takes all tokens, for graphs.

    Attributes:
        gates_NE: p_e of each token's experts, 0 for all others.
    """

    gates_NE: Tensor = field(default_factory=lambda: torch.zeros(0))

    @staticmethod
    def of(gates_NE: Tensor) -> DensePlan:
        """Make a plan of gates. It has no record of the routing."""
        none = cast(Any, None)
        return DensePlan(none, none, capacity=gates_NE.shape[0], received_GL=None, gates_NE=gates_NE)

    @property
    def by_place(self) -> DensePlan:
        return self

    def dispatch(self, x_ND: Tensor) -> Tensor:
        """Every expert's copy of the tokens, [E, N, D]."""
        return x_ND.expand(self.gates_NE.shape[1], -1, -1).contiguous()

    def combine(self, rows: Tensor, shared_ND: Tensor | None) -> Tensor:
        """See `Plan`; ``rows`` are [E, N, D]."""
        y_ND = (rows * self.gates_NE.T[:, :, None].to(rows.dtype)).sum(0)
        return y_ND if shared_ND is None else y_ND + shared_ND


def require_portable(model: Model) -> None:
    """Check that a model can be written as graphs. Raises: UserError: its router needs to know each sample's domain."""
    if any(isinstance(module, OracleRouter) for module in model.transformer.modules()):
        raise UserError(
            "model.moe.router.kind oracle needs each sample's domain, which a graph does not know: export a model with "
            "another router, or leave --portable out"
        )


def choose(router: nn.Module, x_RF: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the experts of each row as `shodh_moe.kernels.topk_gating` does.

    Returns:
        Their numbers, int64, and their gates, both [R, J].
    """
    if isinstance(router, GrownRouter):
        expert_RJ, gate_RJ = choose(cast(nn.Module, router.base), x_RF, top_k)
        taken_R1 = router.taken(x_RF)[:, None]
        added_R1 = router.num_experts - len(router.added) + taken_R1
        return torch.where(taken_R1 >= 0, added_R1, expert_RJ), torch.where(taken_R1 >= 0, 1.0, gate_RJ)
    assert isinstance(router, (CosineRouter, LinearRouter))  # see `require_portable`
    logits_RE = router.logits(x_RF)
    p_RE = torch.softmax(logits_RE, dim=1)
    score_RE = logits_RE if router.bias_E is None else p_RE + router.bias_E
    expert_RJ = score_RE.argmax(1, keepdim=True) if top_k == 1 else score_RE.topk(top_k, dim=1).indices
    return expert_RJ, p_RE.gather(1, expert_RJ)


def _dense(expert_NJ: Tensor, gate_NJ: Tensor, experts: int) -> Tensor:
    """The gates of all experts, [N, E]."""
    chosen_NJE = expert_NJ[:, :, None] == torch.arange(experts)
    return (gate_NJ[:, :, None] * chosen_NJE.to(gate_NJ.dtype)).sum(1)


class _RoutedHere(nn.Module):
    """A MoE layer with scope ``layer``, whose router chooses for the layer's own tokens."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.moe, self.router, self.config = moe, cast(nn.Module, moe.router), moe.config
        moe.router = None

    def forward(self, x_ND: Tensor, context: Context, plan: Plan | None) -> tuple[Tensor, Routing]:
        gates_NE = _dense(*choose(self.router, x_ND, self.config.top_k), self.config.num_experts)
        return self.moe(x_ND, context, DensePlan.of(gates_NE))


class EncoderPart(nn.Module):
    """Given snapshots and the solid mask to latents."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, velocity: Tensor, pressure: Tensor, solid: Tensor) -> tuple[Tensor, Tensor]:
        """[H, 3, X, Y, Z], [H, 1, X, Y, Z] and [1, X, Y, Z] to latents [H, C, x, y, z] and geometry [C, x, y, z]."""
        given_H5XYZ = torch.cat([velocity, pressure, solid.expand(len(velocity), -1, -1, -1, -1)], dim=1)
        return self.tokenizer.encode(given_H5XYZ), self.tokenizer.encode_geometry(solid[None])[0]


class PathsPart(nn.Module):
    """The router's decision."""

    def __init__(self, transformer: LatentTransformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """[H, C, x, y, z] and [C, x, y, z] to the chosen experts, int64 [R, J], and their gates [R, J]."""
        path = self.transformer.path
        assert path is not None
        x_MF, row_N = path.features(self.transformer.embedding_inputs(latents[None], geometry[None]))
        expert_MJ, gate_MJ = choose(cast(nn.Module, path.router), x_MF, path.config.top_k)
        if len(x_MF) == 1 or row_N is None:
            return expert_MJ, gate_MJ
        return expert_MJ.index_select(0, row_N), gate_MJ.index_select(0, row_N)


class StepPart(nn.Module):
    """Latents of the last H snapshots to those of the next one.

    Args:
        per_expert: names of the parameters that have an axis of experts.
    """

    def __init__(self, transformer: LatentTransformer, per_expert: list[str]):
        super().__init__()
        self.transformer, self.per_expert = transformer, per_expert
        for block in transformer.blocks:
            if isinstance(block.moe, MoE) and block.moe.router is not None:
                block.moe = _RoutedHere(block.moe)
        config = transformer.config
        first = transformer.blocks[0]
        assert isinstance(first, Block)
        self.tokens = len(first.attention.angles_SP)
        self.experts, self.by_sample = config.moe.num_experts, config.moe.router.context == "sample"

    def forward(
        self, latents: Tensor, geometry: Tensor, expert: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """[H, C, x, y, z], [C, x, y, z] and the result of `PathsPart`, if there are paths, to [C, x, y, z]."""
        inputs = (latents[None], geometry[None], Context(1))
        if expert is None or gate is None:
            return self.transformer(*inputs).latent_BCxyz[0]
        if not self.by_sample:
            plan = DensePlan.of(_dense(expert, gate, self.experts))
            return self.transformer(*inputs, plan).latent_BCxyz[0]
        # All tokens share their experts: compute with the weights of those alone.
        chosen = {name: self.transformer.get_parameter(name).index_select(0, expert[0]) for name in self.per_expert}
        plan = DensePlan.of(gate.expand(self.tokens, -1))
        return functional_call(self.transformer, chosen, (*inputs, plan)).latent_BCxyz[0]


class DecoderPart(nn.Module):
    """One latent to fields in the units of the training data."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.matrices = MatrixOperations(tokenizer.grid, tokenizer.config.operator)
        self.tokenizer.operations = Operations(
            self.matrices.curl, self.matrices.vector_potential, self.matrices.project
        )

    def forward(self, latent: Tensor, solid: Tensor) -> tuple[Tensor, ...]:
        """[C, x, y, z] and [1, X, Y, Z] to velocity and pressure at voxel centres, both float64.

        With the operator ``staggered``, the third result is the velocity on the voxels' lower faces, whose divergence
        vanishes. With other operators that of the first one does.
        """
        flow = self.tokenizer.decode(latent[None], solid[None], torch.float64)
        centres = (flow.velocity_B3XYZ[0], flow.pressure_B1XYZ[0].double())
        return (*centres, flow.conserved_B3XYZ[0]) if self.tokenizer.config.operator == "staggered" else centres


def make_parts(model: Model) -> dict[str, nn.Module]:
    """Make the parts of a model by name, in the order in which they are used; ``paths`` only if it has paths."""
    # A copy of a parameter has no marks.
    per_expert = [name for name, weight in model.transformer.named_parameters() if marks(weight).per_expert]
    transformer = copy.deepcopy(model.transformer).cpu().eval().requires_grad_(False)
    tokenizer = copy.deepcopy(model.tokenizer).cpu().eval().requires_grad_(False)
    parts: dict[str, nn.Module] = {"encoder": EncoderPart(tokenizer)}
    if transformer.path is not None:
        parts["paths"] = PathsPart(transformer)
    return parts | {"step": StepPart(transformer, per_expert), "decoder": DecoderPart(tokenizer)}
