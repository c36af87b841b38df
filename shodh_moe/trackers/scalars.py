"""The numbers of a record, by the name under which trackers show them."""

from __future__ import annotations

from typing import Any

MOST_EXPERTS = 16  # up to this many get a scalar each; for more, only the smallest and the largest value are shown


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers as ``<kind>/<key>``, and those of its routing as ``routing_.../layer_<number>...``."""
    scalars: dict[str, float] = {}
    for key, value in record.items():
        if key not in ("kind", "step", "routing"):
            _flatten(f"{record['kind']}/{key}", value, scalars)
    for layer in record.get("routing") or []:
        for key, value in layer.items():
            name = {"dropped_fraction": "dropped"}.get(key, key)
            _flatten(f"routing_{name}/layer_{layer['layer']}", value, scalars)
    return scalars


def results_of(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numbers by domain of an evaluation, the content of ``metrics.json``, as ``evaluation/<domain>/<key>``.

    Lists, such as the errors of a rollout over time, are left out.
    """
    found: dict[str, float] = {}
    for domain, values in metrics.get("domains", {}).items():
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        _flatten(f"evaluation/{domain}", numbers, found)
    return found


def _flatten(tag: str, value: Any, scalars: dict[str, float]) -> None:
    """Collect the numbers inside ``value``. A list has one entry per expert."""
    if isinstance(value, float):
        scalars[tag] = value
    elif isinstance(value, dict):
        for key, below in value.items():
            _flatten(f"{tag}/{key}", below, scalars)
    elif isinstance(value, list) and len(value) <= MOST_EXPERTS:
        for expert, below in enumerate(value):
            _flatten(f"{tag}/expert_{expert}", below, scalars)
    elif isinstance(value, list):
        known = [number for number in value if number is not None]
        _flatten(tag, {"smallest": min(known, default=None), "largest": max(known, default=None)}, scalars)
