"""Made-up result files of the benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np

from shodh_moe.ccm.bench.aims import ROWS

REGIMES = {
    "interpolation": (-0.75, -0.25, 0.25, 0.75),
    "ood_low": (-1.5, -1.35),
    "ood_high": (1.35, 1.5),
}
# Alpha of each row's weights; the error grows with the distance from the regime.
PLACES = {"anchor": 0.1, "low": -1.0, "high": 1.0, "average": 0.0, "task_arithmetic": 0.05, "ties": 0.2, "dare": -0.1}


def alpha(row: str, s: float) -> float:
    readouts = {"ccm_coordinate": s, "ccm_scale": 0.9 * s, "ccm_prefix": 0.8 * s, "wrong_sign": -s}
    return readouts.get(row, 0.95 * s)


def result(family: str, seed: int, trajectories: int = 5) -> dict[str, Any]:
    """Make a result with all rows and errors of about 0.05 + 0.25 * distance."""
    rng = np.random.default_rng(seed)
    regimes = []
    for split, coordinates in REGIMES.items():
        for s in coordinates:
            difficulty = np.random.default_rng(round(100 * abs(s))).lognormal(0, 0.3, trajectories)
            rows: dict[str, Any] = {}
            for row in ROWS:
                known = {**PLACES, "best_endpoint": np.sign(s), "conditioned": 0.8 * s, "fine_tuned": 0.5 * s}
                place = known.get(row, alpha(row, s))
                errors = (0.05 + 0.25 * abs(place - 0.95 * s)) * difficulty * rng.lognormal(0, 0.05, trajectories)
                rows[row] = {"errors": errors.tolist()} | ({} if row in known else {"alpha": place})
            regimes.append({"split": split, "coordinate": s, "value": 0.004 * 3 ** (s / 2), "rows": rows})
    steps = np.arange(-2, 2.01, 0.25)
    noise = rng.lognormal(0, 0.1)
    return {
        "family": family,
        "seed": seed,
        "parameter": "diffusivity",
        "frames": 4,
        "regimes": regimes,
        "chosen": {
            "gamma": 0.9 + 0.05 * (seed == 2),
            "task_arithmetic": {"lambda": 0.5, "validation_error": 0.2},
            "best_endpoint": {"low": "low", "high": "high"},
        },
        "curves": [
            {
                "coordinate": s,
                "errors": {f"{a:+.2f}": float(noise * (0.06 + 0.3 * abs(a - s) ** 1.5)) for a in steps},
            }
            for s in (-1.2, -0.6, 0.6, 1.2)
        ],
        "straightness": {
            "bend": {str(a): noise * 0.12 * abs(a * a - 1) for a in (-2.0, -1.5, -0.5, 0.0, 0.5, 1.5, 2.0)},
            "straight_to": 1.5,
        },
        "prefix": [
            {"coordinate": s, "alpha": 0.8 * s, "sharpness": 0.1 + 0.1 * abs(s)} for ss in REGIMES.values() for s in ss
        ],
        "cpu_seconds": {"anchor": 100.0, "low": 50.0, "high": 50.0, "conditioned": 200.0, "measure": 200.0},
    }
