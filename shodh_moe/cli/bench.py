"""``shodh bench ccm``, ``shodh bench ccm3d`` and ``shodh bench forecast``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import add_config_arguments, path_option
from shodh_moe.cli.common import add_command
from shodh_moe.config.load import load_config_of


def add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="run a benchmark; finished work is skipped")
    benches = parser.add_subparsers(required=True, metavar="benchmark")
    text = "compare CCM with baselines: generate data, train experts, measure them, and write tables and figures"
    ccm = add_command(benches, "ccm", text, "example: shodh bench ccm --config configs/ccm/bench.yaml", _ccm)
    text = "the same for the path mixture of the main job: porous media and open channels in three dimensions"
    ccm3d = add_command(benches, "ccm3d", text, "example: shodh bench ccm3d --config configs/ccm/latent.yaml", _ccm3d)
    text = "compare our forecasts with those of other networks that were trained for the same time, and of baselines"
    example = "example: shodh bench forecast --config configs/forecast/grid32.yaml"
    forecast = add_command(benches, "forecast", text, example, _forecast)
    for one in (ccm, ccm3d, forecast):
        add_config_arguments(one)
        one.add_argument(
            "--output", type=path_option, metavar="FOLDER", help="folder for a copy of tables, figures and results"
        )


def _ccm(options: argparse.Namespace) -> None:
    from shodh_moe.ccm.bench.config import BenchConfig
    from shodh_moe.ccm.bench.run import run

    config = load_config_of(BenchConfig, options.config, options.overrides, options.name)
    run(config, options.output)
    print((config.folder / "report" / "summary.md").read_text())


def _ccm3d(options: argparse.Namespace) -> None:
    from shodh_moe.ccm.bench3d.config import Bench3dConfig
    from shodh_moe.ccm.bench3d.run import run

    bench = load_config_of(Bench3dConfig, options.config, options.overrides, options.name)
    run(bench, options.output)
    print((bench.folder / "report" / "summary.md").read_text())


def _forecast(options: argparse.Namespace) -> None:
    from shodh_moe.forecast.config import ForecastConfig
    from shodh_moe.forecast.run import run

    bench = load_config_of(ForecastConfig, options.config, options.overrides, options.name)
    run(bench, options.output)
    print((bench.folder / "report" / "summary.md").read_text())
    print(f"report: {bench.folder / 'report' / 'index.html'}")
