"""``shodh run|pretrain|evaluate|report|track``: the main job or one of its stages."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import path_option, path_or_url, path_text
from shodh_moe.base.errors import EXIT_DONE, UserError
from shodh_moe.cli.common import (
    MODEL,
    add_command,
    add_config_command,
    add_debug,
    add_launch_options,
    add_tokenizer_option,
    config_of,
    stage,
)
from shodh_moe.config.paths import resolve_paths
from shodh_moe.config.trackers import TRACKERS


def add_run(commands: Any) -> None:
    text = "run every stage that is not up to date, then write the report"
    add_launch_options(add_config_command(commands, "run", text, _run))


def add_pretrain(commands: Any) -> None:
    text = "pretrain the latent transformer under the DeepSpeed launcher"
    parser = add_config_command(commands, "pretrain", text, _pretrain)
    add_launch_options(parser)
    parser.add_argument(
        "--resume", type=path_text, default="auto", help="checkpoint to resume from; default: the run's newest one"
    )


def add_evaluate(commands: Any) -> None:
    text = "measure the newest checkpoint, or another model, on held-out trajectories"
    parser = add_config_command(commands, "evaluate", text, _evaluate)
    parser.add_argument("--checkpoint", type=path_or_url, help=f"{MODEL}, instead of the config's run")
    parser.add_argument("--output", type=path_option, help="folder for the results; required with --checkpoint")
    about = "further models that form an ensemble with --checkpoint: measure its mean, spread and coverage too"
    parser.add_argument("--members", type=path_or_url, nargs="+", default=[], metavar="MODEL", help=about)
    add_tokenizer_option(parser)


def add_report(commands: Any) -> None:
    add_config_command(commands, "report", "write the report of a run", stage("report"))


def add_track(commands: Any) -> None:
    text = "send a run's records and report to trackers, during training or afterwards"
    parser = add_command(commands, "track", text, "example: shodh track runs/quickstart --to mlflow", _track)
    parser.set_defaults(needs_torch=False)
    parser.add_argument("run", type=path_option, help="run folder")
    parser.add_argument(
        "--to", nargs="+", choices=sorted(TRACKERS), default=[], metavar="TRACKER",
        help=f"{', '.join(sorted(TRACKERS))}; default: those of the run's config",
    )  # fmt: skip
    add_debug(parser)


def _run(options: argparse.Namespace) -> None:
    from shodh_moe.report import summary_table
    from shodh_moe.runs import pipeline

    config = config_of(options)
    paths = resolve_paths(config)
    metrics = pipeline.run_all(config, paths)
    print(summary_table(metrics))
    print(f"report: {paths.run / 'report' / 'index.html'}")


def _pretrain(options: argparse.Namespace) -> None:
    from shodh_moe.runs import pipeline

    config = config_of(options)
    paths = resolve_paths(config)
    pipeline.check(config, paths)
    pipeline.pretrain(config, paths, options.resume)


def _evaluate(options: argparse.Namespace) -> None:
    more = options.tokenizer or options.members
    if bool(options.checkpoint) != bool(options.output) or (more and not options.checkpoint):
        raise UserError(
            "--checkpoint and --output belong together, and --tokenizer and --members need both: give both, or none to "
            "write "
            "the results to the config's run folder"
        )
    if not options.checkpoint:
        stage("evaluate")(options)
        return
    from shodh_moe.report import summary_table
    from shodh_moe.runs.evaluate_elsewhere import evaluate_elsewhere

    given = (options.checkpoint, options.output, options.tokenizer, tuple(options.members))
    metrics = evaluate_elsewhere(config_of(options), *given)
    print(summary_table(metrics))
    for domain, values in metrics["domains"].items():
        if entry := values.get("ensemble"):
            print(
                f"{domain}, ensemble of {entry['members']}, first and last step: nRMSE of the mean "
                f"{entry['nrmse_mean'][0]:.3g}, {entry['nrmse_mean'][-1]:.3g}; spread {entry['spread'][0]:.3g}, "
                f"{entry['spread'][-1]:.3g}; true velocities within the interval for 90 % "
                f"{entry['coverage_90'][0]:.1%}, {entry['coverage_90'][-1]:.1%}, with the validation split's factors "
                f"{entry['factor_90'][0]:.3g}, {entry['factor_90'][-1]:.3g} on the spread "
                f"{entry['coverage_90_calibrated'][0]:.1%}, {entry['coverage_90_calibrated'][-1]:.1%}"
            )
    print(f"[evaluate] {options.output / 'metrics.json'}")


def _track(options: argparse.Namespace) -> int:
    from shodh_moe.runs.track import track

    track(options.run, options.to)
    return EXIT_DONE
