"""Many targets: from several configs, or alphas of one; no two of them may be the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.merging.config import Target, load_targets

LARGEST_SWEEP = 100_000  # alphas; a larger number is a mistake


def load_sweep(configs: list[Path], output: Path | None = None, alphas: list[float] | None = None) -> list[Target]:
    """Read the targets of all configs, in order; they are checked by `require_distinct`.

    Args:
        output: overrides the folders of the outputs. With several configs it gets a folder for each, named after the
            config's file.
        alphas: make each config a sweep over these alphas.

    Raises:
        UserError: as `load_targets`.
    """
    targets = []
    for config in configs:
        folder = output / config.stem if output and len(configs) > 1 else output
        targets += load_targets(config, folder, alphas=alphas)
    return targets


def parse_alphas(text: str) -> list[float]:
    """Parse ``-1.5,0,1.5``, or ``-1.5:1.5:7`` for 7 values at equal distances, to numbers.

    Raises:
        UserError: the text is neither.
    """
    wrong = UserError(
        f"alpha {text[:80]!r} is neither a list such as -1,0,0.5 nor FROM:TO:COUNT such as -1.5:1.5:7, with a count "
        f"from 2 to {LARGEST_SWEEP}"
    )
    try:
        if ":" not in text:
            return [float(one) for one in text.split(",")]
        low, high, count = text.split(":")
        steps = int(count) - 1
        if not 1 <= steps < LARGEST_SWEEP:
            raise wrong
        # Rounded, because names such as alpha=0.30000000000000004 help nobody.
        return [round(float(low) + (float(high) - float(low)) * i / steps, 12) for i in range(steps + 1)]
    except (ValueError, OverflowError):
        raise wrong from None


def require_distinct(targets: list[Target]) -> None:
    """Check that all targets have outputs of their own and differ in more than their names.

    Raises:
        UserError: two outputs are the same folder or contain each other, or two targets are the same merge.
    """
    places = {target.output.resolve(): target for target in reversed(targets)}
    merges: dict[str, Target] = {}
    for target in targets:
        place = target.output.resolve()
        if places[place] is not target:
            raise UserError(f"two targets of the sweep write {target.output}: give each its own output")
        if outer := next((places[parent] for parent in place.parents if parent in places), None):
            raise UserError(f"the output {target.output} is inside of {outer.output}: give each target its own output")
        first = merges.setdefault(_merge_of(target), target)
        if first is not target:
            raise UserError(
                f"{first.output} and {target.output} are the same merge, under two names: the targets of a sweep must "
                "differ, so remove one of them"
            )


def _merge_of(target: Target) -> str:
    """What a target merges, as a text that is equal for equal merges, whatever their names."""
    config = target.config
    own = dict(zip(target.models, target.settings, strict=True))
    # Only where models are ordered, so is `target.models`.
    parts = [config.merge_method, target.base, target.models, config.format, config.out_dtype or config.dtype]
    settings = config.model_dump(include={"parameters"})["parameters"]
    models = {path: {k: _dumped(v) for k, v in one.items()} for path, one in own.items()}
    return json.dumps(_plain([*parts, settings, models]), sort_keys=True)


def _dumped(setting: Any) -> Any:
    return [one.model_dump() for one in setting] if isinstance(setting, list) else setting


def _plain(value: Any) -> Any:
    """The value with numbers as floats, so that 1, 1.0 and true are equal, and 0 and -0."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return float(value) + 0.0 if isinstance(value, (int, float)) else value
