"""Telemetry of routers, experts and exchanges: sums are accumulated on the device, then made into one record per layer.

Shapes: L layers, B samples, S tokens per sample, N = B S tokens, D domains, E experts, J experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.base.tensors import sent
from shodh_moe.config import TelemetryConfig
from shodh_moe.model import Routing
from shodh_moe.model.routers import Router
from shodh_moe.parallel import Exchange, SampleExchange, sum_over_ranks

SUMS = ("dropped_fraction", "entropy", "mean_gate")  # the columns after those of the experts
DIRECTIONS = ("dispatch", "combine")


class RoutingCounts:
    """Sums of one rank's routing decisions over steps. `add` never waits for the device; `summary` sums over ranks.

    Attributes:
        table_LDM: for each layer and domain, the number of tokens of each expert and the sums for `SUMS`, M = E + 3
            columns, float64. With J > 1 a token counts once for each of its experts.
        largest_L: each layer's largest logit of any token, float64.
    """

    def __init__(self, layers: int, domains: list[str], experts: int, device: torch.device | str = "cpu"):
        self.domains, self.experts = domains, experts
        self.table_LDM = torch.zeros(layers, len(domains), experts + len(SUMS), dtype=torch.float64, device=device)
        self.largest_L = torch.full((layers,), -torch.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, routing: list[Routing], domain_B: Tensor) -> None:
        """Count one forward pass over B samples; every layer routes the same tokens, sample by sample.

        Tokens whose logits are not finite add nothing to the sums for `SUMS`. A dense model has nothing to count.
        """
        if not routing:
            return
        table, domain_B = self.table_LDM, domain_B.to(self.table_LDM.device)
        layers, domains, columns = table.shape
        expert_LBS = torch.stack([r.chosen_N for r in routing]).view(layers, len(domain_B), -1)
        row_LD = torch.arange(layers * domains, device=table.device).view(layers, domains) * columns
        cell = (expert_LBS + row_LD[:, domain_B, None]).flatten()
        table.view(-1).index_add_(0, cell, torch.ones_like(cell, dtype=table.dtype))

        values = torch.stack([value for r in routing for value in _values(r)])
        sums_LVB = values.nan_to_num_(0).view(layers, len(SUMS), len(domain_B), -1).sum(-1, dtype=table.dtype)
        table[:, :, self.experts :].index_add_(1, domain_B, sums_LVB.transpose(1, 2))

        # The chosen expert has the largest logit: the logarithm of its probability plus the logsumexp.
        largest_LN = torch.stack([r.logsumexp_N + r.gate_N.log() for r in routing]).nan_to_num_(-torch.inf)
        torch.maximum(self.largest_L, largest_LN.amax(1), out=self.largest_L)

    def summary(self) -> list[dict[str, Any]]:
        """One record per layer (collective): ``load``, ``dropped_fraction``, ``entropy`` and ``mean_gate`` by domain,
        the load over all domains ``load_all``, and ``largest_logit``.
        """
        table_LDM = sum_over_ranks(self.table_LDM).cpu()
        largest = sum_over_ranks(self.largest_L, dist.ReduceOp.MAX).tolist()
        experts, layers = self.experts, []
        tokens_LD1 = table_LDM[:, :, :experts].sum(2, keepdim=True)
        share_LDM = table_LDM / tokens_LD1.clamp(min=1)
        load_LE = table_LDM[:, :, :experts].sum(1) / tokens_LD1.sum(1).clamp(min=1)
        for layer, share_DM in enumerate(share_LDM.tolist()):
            by_domain = dict(zip(self.domains, share_DM, strict=True))
            record: dict[str, Any] = {"layer": layer, "load": {d: row[:experts] for d, row in by_domain.items()}}
            record["load_all"] = load_LE[layer].tolist()
            for column, name in enumerate(SUMS, start=experts):
                record[name] = {domain: row[column] for domain, row in by_domain.items()}
            record["largest_logit"] = largest[layer]
            layers.append(record)
        return layers

    def clear(self) -> None:
        """Reset the sums to zero."""
        self.table_LDM.zero_()
        self.largest_L.fill_(-torch.inf)


class ExchangeCounts:
    """Sums over micro-batches of how an exchange of samples divides them among the ranks of a group.

    Attributes:
        sums: number of micro-batches; sums of the largest number of samples whose experts a rank holds, and of the
            largest number that a rank computes, both over an even share; sum of the share of samples that are computed
            without their expert. float64 [4].
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, exchange: SampleExchange) -> None:
        """Count one micro-batch."""
        samples = sum(exchange.computed_G)
        even = samples / len(exchange.computed_G)
        shares = [1, max(exchange.held_G) / even, max(exchange.computed_G) / even, exchange.strangers / samples]
        self.sums += torch.tensor(shares, dtype=torch.float64)

    def record(self, exchanges: list[Exchange], device: torch.device | str) -> dict[str, float]:
        """Return ``held_imbalance``, ``imbalance`` and ``by_tokens``, and of one step ``ms``, ``wait_ms`` and ``bytes``
        of the exchanges of samples, all as means over ranks (collective).
        """
        cost = _sum([exchange for exchange in exchanges if exchange.direction == "samples"])
        means = _mean_over_ranks(sent(torch.cat([self.sums[1:] / self.sums[0].clamp(min=1), cost]), device)).tolist()
        return dict(zip(("held_imbalance", "imbalance", "by_tokens", "ms", "wait_ms", "bytes"), means, strict=True))


def _values(r: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """What each token adds to the sums for `SUMS`, [N] each."""
    if r.kept_N.ndim == 1:
        return ~r.kept_N, r.entropy_N, r.gate_N
    choices = r.kept_N.shape[1]
    return (~r.kept_N).sum(1), choices * r.entropy_N, choices * r.gate_N


def layer_records(
    counts: RoutingCounts, routers: list[Router], exchanges: list[Exchange], expert_norms_LE: Tensor | None
) -> list[dict[str, Any]]:
    """`RoutingCounts.summary` with each layer's ``temperature``, ``expert_grad_norm`` and ``all_to_all`` (collective).

    Args:
        routers: the router of each MoE layer in order; the temperature of a router without one is None.
        exchanges: records of one step (`ExpertParallel.exchanges`).
        expert_norms_LE: gradient norm of every expert, equal on all ranks; None: no ``expert_grad_norm``.
    """
    records, traffic = counts.summary(), _traffic(len(routers), exchanges, counts.table_LDM.device)
    for layer, record in enumerate(records):
        temperature = routers[layer].temperature
        record["temperature"] = None if temperature is None else float(temperature)
        if expert_norms_LE is not None:
            record["expert_grad_norm"] = expert_norms_LE[layer].tolist()
        record["all_to_all"] = traffic[layer]
    return records


def _traffic(layers: int, exchanges: list[Exchange], device: torch.device) -> list[dict[str, Any]]:
    """Each layer's sums ``ms``, ``wait_ms`` and ``bytes``, averaged over ranks, in total and by direction."""
    found: list[list[list[Exchange]]] = [[[] for _ in DIRECTIONS] for _ in range(layers)]
    for exchange in exchanges:
        if exchange.direction in DIRECTIONS:
            found[exchange.layer][DIRECTIONS.index(exchange.direction)].append(exchange)
    sums = torch.stack([torch.stack([_sum(part) for part in layer]) for layer in found])
    means = _mean_over_ranks(sent(sums, device))
    return [
        _named(layer.sum(0)) | {name: _named(part) for name, part in zip(DIRECTIONS, layer, strict=True)}
        for layer in means
    ]


def _sum(exchanges: list[Exchange]) -> Tensor:
    """Sums of duration and waiting time in milliseconds and of bytes, float64 [3]."""
    numbers = [[*exchange.times_ms(), exchange.sent_bytes] for exchange in exchanges]
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 3).sum(0)


def _mean_over_ranks(values: Tensor) -> Tensor:
    return sum_over_ranks(values).cpu() / (dist.get_world_size() if dist.is_initialized() else 1)


def _named(numbers: Tensor) -> dict[str, Any]:
    return dict(zip(("ms", "wait_ms", "bytes"), numbers.tolist(), strict=True))


def first_nonfinite(routing: list[Routing], domain_B: Tensor, domains: list[str]) -> tuple[int, str] | None:
    """Return the first layer with router logits that have no softmax (NaN or infinite), and the domain of the first
    such token; None if all logits are finite. Waits for the device.
    """
    for layer, record in enumerate(routing):
        broken_B = ~record.logsumexp_N.isfinite().view(len(domain_B), -1).all(dim=1)
        if broken_B.any():
            return layer, domains[int(domain_B[int(broken_B.nonzero()[0])])]
    return None


class Warnings:
    """Warns once when an expert starves or a domain loses tokens, and again if the condition ends and returns.

    Args:
        balance: ``model.moe.router.balance``, which determines the advice.
    """

    def __init__(self, config: TelemetryConfig, balance: str = "loss"):
        self.config = config
        self._knob = f"model.moe.router.{'bias_rate' if balance == 'bias' else 'balance_weight'}"
        self._warned: set[tuple[str, int, int | str]] = set()

    def check(self, step: int, layers: list[dict[str, Any]]) -> list[str]:
        """Return new warnings from one step's layer records (`RoutingCounts.summary`), one line per layer and kind."""
        c, lines = self.config, []
        now: set[tuple[str, int, int | str]] = set()
        for record in layers:
            layer, load = record["layer"], record["load_all"]
            place = f"warning: step {step}, layer {layer}: "
            least = c.starved_below / len(load) if sum(load) else 0.0
            starved = {
                ("starved", layer, e): f"expert {e} gets {share:.2%}" for e, share in enumerate(load) if share < least
            }
            dropped = {
                ("dropped", layer, domain): f"{share:.1%} of {domain}"
                for domain, share in record["dropped_fraction"].items()
                if share > c.dropped_above
            }
            if new := [text for key, text in starved.items() if key not in self._warned]:
                lines.append(
                    f"{place}{', '.join(new)} of the tokens, an even share is {1 / len(load):.1%}; "
                    f"raise {self._knob} or use fewer experts (model.moe.num_experts)"
                )
            if new := [text for key, text in dropped.items() if key not in self._warned]:
                lines.append(
                    f"{place}no room at their expert for {', '.join(new)} tokens; raise model.moe.capacity_factor "
                    f"or {self._knob}, or set model.moe.dropless=true"
                )
            now |= starved.keys() | dropped.keys()
        self._warned = now
        return lines
