"""Measures of plasticity at the end of training: share of dormant units, and effective rank of the features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.audit.windows import all_windows
from shodh_moe.inference.one_step import predict_windows
from shodh_moe.model import LatentTransformer, MoE, Routing
from shodh_moe.model.experts import Experts, FeedForward
from shodh_moe.tokenizer.latents import LatentSamples

TAU = 0.025  # threshold of dormant units, as a share of the layer's mean activation (Sokar et al., arXiv 2302.12902)


def plasticity(transformer: LatentTransformer, samples: LatentSamples, count: int, batch_size: int) -> dict[str, Any]:
    """Dormant units and effective rank over ``count`` evenly spread samples per domain (all, if it has fewer).

    Args:
        transformer: the model in evaluation mode, with all experts in this process.
        samples: held-out samples.
        batch_size: number of samples at a time; it affects the result only by rounding.

    Returns:
        ``dormant``: share of `dormant_units` among the hidden units (silu(gate) * up) of the SwiGLU networks of all
        blocks, by group: ``shared`` over all tokens, and ``expert 0``, ``expert 1``, ... over the tokens routed to that
        expert. Each network of each block counts as a layer. All units of an expert without tokens are dormant.
        ``effective_rank``: `effective_rank` of the token features after the last norm, which enter the head. They are
        centred: the head has a bias, so the features need no direction for their mean over tokens.
        ``width``: number of features, the largest possible rank.

    Raises:
        ValueError: the transformer is in training mode.
    """
    units: dict[tuple[str, str], Tensor] = {}  # sum over tokens of the absolute activation [F], by group and layer
    features = _Moments()

    def add(group: str, layer: str, hidden_TF: Tensor) -> None:
        total_F = hidden_TF.flatten(0, -2).abs().sum(0, dtype=torch.float64)
        units[group, layer] = units.get((group, layer), 0) + total_F

    def shared_hook(layer: str) -> Callable[..., None]:
        return lambda down, inputs: add("shared", layer, inputs[0])

    def routed_hook(layer: str) -> Callable[..., None]:
        def hook(moe: MoE, inputs: tuple[Tensor, ...], output: tuple[Tensor, Routing]) -> None:
            for expert in range(moe.config.num_experts):
                chose_N = (output[1].chosen_N == expert).view(len(inputs[0]), -1).any(1)
                chosen_TD = inputs[0][chose_N]
                add(f"expert {expert}", layer, _hidden(moe.experts, expert, chosen_TD))

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(transformer.head.register_forward_pre_hook(lambda head, inputs: features.add(inputs[0])))
        for name, module in transformer.named_modules():
            if isinstance(module, FeedForward):
                hooks.enter_context(module.down.register_forward_pre_hook(shared_hook(name)))
            elif isinstance(module, MoE):
                hooks.enter_context(module.register_forward_hook(routed_hook(name)))
        for _ in predict_windows(transformer, samples, all_windows(samples, count), batch_size):
            pass

    dormant: dict[str, list[Tensor]] = {}
    for (group, _), total_F in units.items():
        dormant.setdefault(group, []).append(dormant_units(total_F))
    return {
        "dormant": {group: float(torch.cat(parts).double().mean()) for group, parts in sorted(dormant.items())},
        "effective_rank": effective_rank(features.centred_DD()),
        "width": transformer.head.in_features,
    }


def dormant_units(activation_F: Tensor, tau: float = TAU) -> Tensor:
    """Mask of a layer's tau-dormant units, bool [F]: E|h_i| <= tau mean_k E|h_k| (Sokar et al., definition 3.1).

    ``activation_F`` is each unit's mean absolute activation over tokens, up to a common factor. If all activations are
    zero, all units are dormant.
    """
    return activation_F <= tau * activation_F.mean()


def effective_rank(moment_DD: Tensor) -> float:
    """exp of the entropy of X's normalised singular values, in [1, D], from ``moment_DD`` = X^T X; 0 for X = 0.

    Roy and Vetterli, The effective rank, EUSIPCO 2007. Eigenvalues within rounding of the largest count as zero.
    """
    square_D = torch.linalg.eigvalsh(moment_DD.double())
    square_D = square_D[square_D > len(square_D) * torch.finfo(torch.float64).eps * square_D[-1].abs()]
    if not len(square_D):
        return 0.0
    share_D = square_D.sqrt() / square_D.sqrt().sum()
    return float(torch.exp(-(share_D * share_D.log()).sum()))


ROUNDING = 8.0  # units in the last place by which equal tokens may differ, as products differ by a row's position


class _Moments:
    """Sums over tokens of the features and their products, for the centred second moment."""

    def __init__(self) -> None:
        self.tokens, self.sum_D, self.moment_DD = 0, torch.zeros(()), torch.zeros(())
        self.origin_D: Tensor | None = None
        self.rounding = 0.0  # distance from the origin within which a token is equal to it

    def add(self, x: Tensor) -> None:
        x_TD = x.flatten(0, -2).double()
        # The origin does not affect the result, but with the first token as origin, constant features give almost 0.
        if self.origin_D is None:
            self.origin_D = x_TD[0]
            self.rounding = ROUNDING * torch.finfo(x.dtype).eps * float(x_TD[0].norm())
        x_TD = x_TD - self.origin_D
        self.tokens += len(x_TD)
        self.sum_D = self.sum_D + x_TD.sum(0)
        self.moment_DD = self.moment_DD + x_TD.T @ x_TD

    def centred_DD(self) -> Tensor:
        """The centred second moment; exactly 0 if the tokens differ by rounding alone."""
        centred_DD = self.moment_DD - self.sum_D.outer(self.sum_D) / self.tokens
        constant = centred_DD.trace() <= self.tokens * self.rounding**2
        return torch.zeros_like(centred_DD) if constant else centred_DD


def _hidden(experts: Experts, expert: int, x_TD: Tensor) -> Tensor:
    """Recompute the hidden units [T, F] of one routed expert, which `Experts` does not return."""
    gate, up = (x_TD @ experts.gate_up_LDF[expert]).chunk(2, dim=-1)
    return F.silu(gate) * up
