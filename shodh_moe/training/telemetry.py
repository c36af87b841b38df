"""What a run tells about itself: ``metrics.jsonl`` and TensorBoard, written by rank 0.

Routing is reported per layer and per domain: the load of each expert (share of the domain's tokens that chose
it, before dropping), the dropped share, and the router's entropy in nats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from shodh_moe.model import Routing


class RoutingCounts:
    """Sums over steps and ranks of what the routers did.

    ``table_LDM`` holds, per layer and domain, the tokens of each expert, the dropped tokens and the summed
    entropy: M = E + 2 columns.
    """

    def __init__(self, layers: int, domains: list[str], experts: int):
        self.domains, self.experts = domains, experts
        self.table_LDM = torch.zeros(layers, len(domains), experts + 2, dtype=torch.float64)

    def add(self, routing: list[Routing], domain_B: Tensor) -> None:
        """Count one forward pass over B samples; every layer routes the same tokens, sample by sample."""
        for layer, record in enumerate(routing):
            domain_N = domain_B.repeat_interleave(len(record.expert_N) // len(domain_B)).to(record.expert_N.device)
            row = self.table_LDM[layer]
            pair = torch.bincount(domain_N * self.experts + record.expert_N, minlength=row[:, :-2].numel())
            row[:, : self.experts] += pair.view(len(self.domains), self.experts).cpu()
            for column, weight_N in ((-2, ~record.kept_N), (-1, record.entropy_N)):
                row[:, column] += torch.bincount(domain_N, weight_N.double(), minlength=len(self.domains)).cpu()

    def reduced(self) -> Tensor:
        """The table summed over all ranks."""
        table = self.table_LDM.clone()
        if dist.is_initialized():
            on_gpu = dist.get_backend() == "nccl"
            table = table.cuda() if on_gpu else table
            dist.all_reduce(table)
        return table.cpu()

    def summary(self) -> list[dict[str, Any]]:
        """One record a layer: ``load``, ``dropped_fraction`` and ``entropy`` by domain (collective)."""
        layers = []
        for layer, table_DM in enumerate(self.reduced()):
            record: dict[str, Any] = {"layer": layer, "load": {}, "dropped_fraction": {}, "entropy": {}}
            for domain, row in zip(self.domains, table_DM, strict=True):
                tokens = max(float(row[: self.experts].sum()), 1.0)
                record["load"][domain] = (row[: self.experts] / tokens).tolist()
                record["dropped_fraction"][domain] = float(row[-2]) / tokens
                record["entropy"][domain] = float(row[-1]) / tokens
            layers.append(record)
        return layers

    def clear(self) -> None:
        self.table_LDM.zero_()


class Log:
    """Appends records to ``metrics.jsonl`` and scalars to TensorBoard; on resume forgets what came after ``step``."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step] if step else []
        self.path.write_text("".join(kept))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path) as file:
            # A killed run may leave half a line at the end.
            return [line for line in file if line.endswith("}\n")]

    def write(self, record: dict[str, Any]) -> None:
        """One record; its numbers become scalars ``<kind>/<key>``, its routing ``routing/...``."""
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        step, kind = record["step"], record["kind"]
        for key, value in record.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{kind}/{key}", value, step)
            elif isinstance(value, dict):
                for name, number in value.items():
                    self.writer.add_scalar(f"{kind}/{key}/{name}", number, step)
        for layer in record.get("routing", []):
            for domain, load in layer["load"].items():
                place = f"layer_{layer['layer']}/{domain}"
                for expert, share in enumerate(load):
                    self.writer.add_scalar(f"routing_load/{place}/expert_{expert}", share, step)
                self.writer.add_scalar(f"routing_dropped/{place}", layer["dropped_fraction"][domain], step)
                self.writer.add_scalar(f"routing_entropy/{place}", layer["entropy"][domain], step)

    def close(self) -> None:
        self.writer.close()
