"""How fast a machine computes and communicates: from data sheets, or measured by ``shodh plan --measure``.

All times are in seconds, sizes in bytes, rates in FLOP/s or bytes/s.
"""

from __future__ import annotations

import bisect
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import write_text
from shodh_moe.base.section import Positive, PositiveFloat, Section
from shodh_moe.plan.hardware import gpu_named, network_named

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
PRODUCTS = ("bfloat16", "float32", "float64")
FORMAT = 1  # of the file that `write_machine` writes
MEASURE = "shodh plan --measure --output machine.json"


@dataclass(frozen=True)
class Assumed:
    """What is assumed of a GPU, because data sheets do not say it. Nothing of this has been measured.

    Attributes:
        products, attention, attention_backward: share of the peak of matrix products that large products reach, and
            fused attention in its forward and backward pass.
        memory: share of the memory's bandwidth.
        link, network: share of a link's rate that a collective reaches, in a node and between nodes.
        hop, network_hop: time of a step of a collective in a node and between nodes: the latencies of a ring with
            protocol Simple in NCCL's own model (src/graph/tuning.cc).
        start: time until a collective starts, from the same table.
        operation: time of the host to launch an operation in eager mode, with autograd and autocast.
        kernel: the same for dispatch and combine, which Python code launches.
        recompute: time of the host for a block that activation checkpointing recomputes, besides its operations.
        tensor: time of the host for each tensor of parameters in an optimizer step, by ZeRO stage.
        step: time of the host for a step besides.
        sample: time of the host to find and read a sample.
        reading: rate at which a rank reads latents from the page cache and copies them to its device.
        reserved: memory of CUDA, NCCL and the allocator's gaps.
    """

    products: float = 0.6
    attention: float = 0.4
    attention_backward: float = 0.3
    memory: float = 0.85
    link: float = 0.8
    network: float = 0.8
    hop: float = 3.4e-6
    network_hop: float = 14e-6
    start: float = 8.4e-6
    operation: float = 6e-6
    kernel: float = 60e-6
    recompute: float = 5e-4
    tensor: tuple[float, float, float] = (40e-6, 80e-6, 80e-6)
    step: float = 2e-3
    sample: float = 3e-4
    reading: float = 2e9
    reserved: float = 4e9


ASSUMED = Assumed()
_Time = Annotated[float, Field(ge=0)]
_Points = Annotated[list[tuple[PositiveFloat, PositiveFloat]], Field(min_length=1)]


class Curve(Section):
    """A rate as a function of the size of an operation.

    Attributes:
        points: sizes in increasing order, each with its rate. Between two sizes the logarithms are interpolated, and
            outside the nearest rate holds.
    """

    points: _Points

    @model_validator(mode="after")
    def _check_order(self) -> Curve:
        sizes = [size for size, _ in self.points]
        if sizes != sorted(set(sizes)):
            raise ValueError("sizes must increase")
        return self

    def at(self, size: float) -> float:
        """The rate of an operation of this size."""
        sizes = [point[0] for point in self.points]
        place = bisect.bisect(sizes, size)
        if place in (0, len(sizes)):
            return self.points[min(place, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.points[place - 1 : place + 1]
        share = math.log(size / low) / math.log(high / low)
        return float(slow * (fast / slow) ** share)


class Link(Section):
    """Time of a step of a collective is ``hop`` plus its bytes over ``rate``."""

    hop: _Time
    rate: PositiveFloat


class Rates(Section):
    """What one rank reaches while the other ranks of its node are as busy.

    Attributes:
        products: rate of matrix products against FLOPs, by dtype.
        attention, attention_backward: the same of fused attention, FLOPs of both passes counted without recomputing.
        memory: rate of elementwise operations, against bytes read and written.
        operation: time that each operation takes besides; on a GPU the host's time to launch it.
        kernel: the same for dispatch and combine.
        recompute: time for a block that activation checkpointing recomputes, besides its operations.
        tensor: time for each tensor of parameters in an optimizer step, by ZeRO stage.
        step: time of an optimizer step besides.
        start: time until a collective starts.
        links: between the ranks of a node, by kind of collective.
        sample: time to find a sample.
        reading: rate at which a rank reads samples.
    """

    products: dict[str, Curve]
    attention: dict[str, Curve]
    attention_backward: dict[str, Curve]
    memory: Curve
    operation: PositiveFloat
    kernel: PositiveFloat
    recompute: _Time
    tensor: tuple[_Time, _Time, _Time]
    step: _Time
    start: _Time = 0.0
    links: dict[Kind, Link]
    sample: _Time
    reading: PositiveFloat


class Machine(Section):
    """A machine of equal nodes.

    Attributes:
        name: for tables.
        source: where the rates are from.
        device: ``cuda`` if the host launches operations ahead of the device, else ``cpu``.
        per_node: ranks of a node.
        memory: of a rank's device; None: unknown or shared with other ranks.
        ranks: rates by the number of busy ranks in a node.
        network: between nodes; None: there is none.
    """

    format: Literal[1] = 1
    name: str
    source: Literal["data sheets", "measured"] = "measured"
    device: Literal["cpu", "cuda"]
    per_node: Positive
    memory: PositiveFloat | None = None
    ranks: Annotated[dict[Positive, Rates], Field(min_length=1)]
    network: Link | None = None

    def rates(self, world: int) -> Rates:
        """The rates with ``world`` ranks: those of as many busy ranks in a node, or of the next smaller number."""
        busy = min(world, self.per_node)
        fits = [count for count in self.ranks if count <= busy]
        return self.ranks[max(fits) if fits else min(self.ranks)]


def from_data_sheets(gpu: str, assumed: Assumed = ASSUMED) -> Machine:
    """Return nodes of eight GPUs of this name. Raises `UserError` if it is not known."""
    sheet = gpu_named(gpu)

    def constant(rate: float) -> Curve:
        return Curve(points=[(1.0, rate)])

    def products(share: float) -> dict[str, Curve]:
        return {dtype: constant(share * peak) for dtype, peak in sheet.flops.items()}

    link = Link(hop=assumed.hop, rate=assumed.link * sheet.link)
    rates = Rates(
        products=products(assumed.products),
        attention=products(assumed.attention),
        attention_backward=products(assumed.attention_backward),
        memory=constant(assumed.memory * sheet.bandwidth),
        operation=assumed.operation,
        kernel=assumed.kernel,
        recompute=assumed.recompute,
        tensor=assumed.tensor,
        step=assumed.step,
        sample=assumed.sample,
        start=assumed.start,
        links=dict.fromkeys(KINDS, link),
        reading=assumed.reading,
    )
    return Machine(
        name=f"{gpu.lower()}, 8 in a node",
        source="data sheets",
        device="cuda",
        per_node=8,
        memory=sheet.memory - assumed.reserved,
        ranks={1: rates},
    )


def with_network(machine: Machine, name: str | None, assumed: Assumed = ASSUMED) -> Machine:
    """Return the machine with nodes that this network connects. Raises `UserError` if it is not known."""
    if name is None:
        return machine
    link = Link(hop=assumed.network_hop, rate=assumed.network * network_named(name).rate)
    return machine.model_copy(update={"name": f"{machine.name}, {name.lower()}", "network": link})


def write_machine(path: Path, machine: Machine) -> None:
    """Write a machine as JSON."""
    write_text(path, json.dumps(machine.model_dump(), indent=1) + "\n")


def read_machine(path: Path) -> Machine:
    """Read a machine that `write_machine` has written.

    Raises:
        UserError: the file is missing, or is not one.
    """
    again = f"make it anew with `{MEASURE}`"
    try:
        tree = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--machine {path} cannot be read ({error}): {again}") from None
    try:
        return Machine.model_validate_json(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"--machine {path} is damaged or of another version ({what}): {again}") from None


def assumptions(assumed: Assumed = ASSUMED) -> str:
    """One line with the assumptions about GPUs."""
    texts = {
        name: "/".join(f"{one:g}" for one in (value if isinstance(value, tuple) else (value,)))
        for name, value in asdict(assumed).items()
    }
    return ", ".join(f"{name} {text}" for name, text in texts.items())
