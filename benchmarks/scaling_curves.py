"""Draw what `shodh plan` predicts for configs/cluster_8x8.yaml on 8 to 4,096 GPUs. Nothing is measured.

    python benchmarks/scaling_curves.py [--output docs/images/scaling.png] [--json FILE]

Left: tokens per second and GPU with the same samples per GPU (4), relative to 8 GPUs of the same kind. Middle: the same
with one global batch (8,192 samples). Right: share of the step in exchanges, same samples per GPU. Each point is the
fastest layout that fits. The dashed line adds stragglers and unevenly drawn experts (`shodh plan --simulate`), H100.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.config.load import load_config
from shodh_moe.plan.hardware import GPUS
from shodh_moe.plan.layouts import compare, with_global_batch
from shodh_moe.plan.machine import from_data_sheets, with_network
from shodh_moe.plan.simulate import simulate

ROOT = Path(__file__).resolve().parents[1]
WORLDS = [2**power for power in range(3, 13)]
BATCH = 8192
SIMULATED = ("h100", "same samples per GPU")


def curves(config: Any, network: str, worlds: list[int], steps: int) -> list[dict[str, Any]]:
    """One row for each GPU, kind of scaling and number of ranks."""
    rows = []
    for gpu in GPUS:
        machine = with_network(from_data_sheets(gpu), network)
        for scaling, batch in (("same samples per GPU", None), ("one global batch", BATCH)):
            for world in worlds:
                try:
                    best = compare(with_global_batch(config, world, batch), world, machine).choices[0]
                except UserError as error:
                    print(f"{gpu}, {world}: {error}")
                    continue
                found = best.prediction
                row = {
                    "gpu": gpu,
                    "network": network,
                    "scaling": scaling,
                    "world": world,
                    "layout": best.layout.settings,
                    "step_seconds": found.step,
                    "tokens_per_second_per_gpu": found.tokens / found.step / world,
                    "exchanges": found.exchanges / found.step,
                    "limits": found.limits[:3],
                }
                if (gpu, scaling) == SIMULATED:
                    applied = best.layout.applied_to(config)
                    even = [1.0] * config.model.moe.num_experts
                    spread = simulate(applied, world, machine, None, even, steps, config.seed)
                    row["simulated_step_seconds"] = spread.mean
                rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (weak, strong, share) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for gpu in GPUS:
        for axes, scaling in ((weak, "same samples per GPU"), (strong, "one global batch")):
            found = [row for row in rows if (row["gpu"], row["scaling"]) == (gpu, scaling)]
            worlds = [row["world"] for row in found]
            rates = [row["tokens_per_second_per_gpu"] for row in found]
            (line,) = axes.plot(worlds, [rate / rates[0] for rate in rates], marker=".", label=gpu)
            if axes is weak:
                share.plot(worlds, [row["exchanges"] for row in found], marker=".", color=line.get_color(), label=gpu)
            if (gpu, scaling) == SIMULATED:
                slow = [row["step_seconds"] / row["simulated_step_seconds"] for row in found]
                values = [rate / rates[0] * factor for rate, factor in zip(rates, slow, strict=True)]
                axes.plot(worlds, values, "--", color=line.get_color(), label=f"{gpu}, simulated")
    weak.set_title("tokens/s and GPU, 4 samples per GPU")
    strong.set_title(f"tokens/s and GPU, {BATCH:,} samples in all")
    share.set_title("share of exchanges, 4 samples per GPU")
    for axes in (weak, strong, share):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("GPUs")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(output, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "scaling.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--network", default="ib-ndr", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="simulated steps; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="8 and 16 GPUs only, to test the script")
    options: argparse.Namespace = parser.parse_args(arguments)

    def work() -> None:
        require_writable(options.output.absolute().parent)
        config = load_config(ROOT / "configs" / "cluster_8x8.yaml", [])
        rows = curves(config, options.network, WORLDS[:2] if options.quick else WORLDS, options.steps)
        draw(rows, options.output)
        if options.json:
            write_text(options.json, json.dumps({"benchmark": "scaling_curves", "rows": rows}, indent=1) + "\n")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
