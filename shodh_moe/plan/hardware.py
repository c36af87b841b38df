"""GPUs and networks by name, with the figures of their makers' data sheets.

Rates are peaks without structured sparsity, per GPU. A link's rate is that of one direction. What a training reaches of
a peak is an assumption, and is in `machine.ASSUMED`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from shodh_moe.base.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of eight.

    Attributes:
        flops: peak of matrix products by dtype, FLOP/s. float32 is without TF32, which torch does not use by default.
        bandwidth: of the device's memory, bytes/s.
        memory: bytes.
        link: rate at which a GPU sends to the others of its node, bytes/s.
        source: where the figures are from.
    """

    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    link: float
    source: str


@dataclass(frozen=True)
class Network:
    """A network between nodes of eight GPUs.

    Attributes:
        rate: each GPU's share of its node's adapters, bytes/s.
        source: where the figure is from.
    """

    rate: float
    source: str


_HOPPER = {"bfloat16": 989.4e12, "float32": 66.9e12, "float64": 66.9e12}

GPUS = {
    "h100": Gpu(_HOPPER, 3.35e12, 80e9, 450e9, "NVIDIA H100 data sheet, SXM5; NVLink 900 GB/s in both directions"),
    "h200": Gpu(_HOPPER, 4.8e12, 141e9, 450e9, "NVIDIA H200 data sheet, SXM; NVLink 900 GB/s in both directions"),
    "b200": Gpu(
        {"bfloat16": 2250e12, "float32": 75e12, "float64": 37e12},
        8e12,
        180e9,
        900e9,
        "NVIDIA DGX B200 and HGX B200 data sheets, divided by 8; NVLink 1.8 TB/s in both directions",
    ),
    "mi300x": Gpu(
        {"bfloat16": 1307.4e12, "float32": 163.4e12, "float64": 163.4e12},
        5.3e12,
        192e9,
        448e9,
        "AMD Instinct MI300X data sheet; seven Infinity Fabric links of 128 GB/s in both directions",
    ),
}

NETWORKS = {
    "ib-hdr": Network(25e9, "NVIDIA ConnectX-6 data sheet: 200 Gb/s, an adapter for each GPU"),
    "ib-ndr": Network(50e9, "NVIDIA ConnectX-7 data sheet: 400 Gb/s, an adapter for each GPU"),
    "ib-xdr": Network(100e9, "NVIDIA ConnectX-8 data sheet: 800 Gb/s, an adapter for each GPU"),
    "roce-400": Network(50e9, "NVIDIA ConnectX-7 data sheet: 400 Gb/s Ethernet, an adapter for each GPU"),
    "efa-3200": Network(50e9, "AWS P5 instances: 3,200 Gb/s for eight GPUs"),
    "ethernet-100": Network(12.5e9 / 8, "one adapter of 100 Gb/s for eight GPUs"),
}

_Sheet = TypeVar("_Sheet", Gpu, Network)


def gpu_named(name: str) -> Gpu:
    """Return a GPU of `GPUS`. Raises `UserError` with the nearest name if there is none."""
    return _named("--gpu", name, GPUS)


def network_named(name: str) -> Network:
    """Return a network of `NETWORKS`. Raises `UserError` with the nearest name if there is none."""
    return _named("--network", name, NETWORKS)


def _named(option: str, name: str, known: Mapping[str, _Sheet]) -> _Sheet:
    if found := known.get(name.lower()):
        return found
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"the nearest is {near[0]}; " if near else ""
    raise UserError(f"{option} {name} is not known: {hint}known are {', '.join(sorted(known))}")
