"""The ``shodh`` command: the whole main job, one of its stages, or something with a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from shodh_moe.command import (
    OneLineParser,
    add_config_arguments,
    add_debug,
    add_merge_arguments,
    exit_code,
    plain_command,
)
from shodh_moe.config_command import EXAMPLE, config_command, config_of, overrides_of, stage
from shodh_moe.config_io import load_config_of
from shodh_moe.data_command import add_data_commands
from shodh_moe.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from shodh_moe.tokenizer_command import add_tokenizer_commands


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(_as_commands(sys.argv[1:] if arguments is None else arguments))
    # argparse takes the positional arguments only where they stand together.
    overrides = getattr(options, "overrides", None)
    unknown = [argument for argument in rest if argument.startswith("-") or "=" not in argument or overrides is None]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    if overrides is not None:
        overrides += rest
    ended: list[int] = []
    if options.work is _doctor:  # which must work where torch, and so the rest below, does not
        return exit_code(lambda: ended.append(_doctor(options)), options.debug) or ended[0]

    def work() -> None:
        from shodh_moe.launcher import TrainingFailed
        from shodh_moe.memory import keep_freed_memory

        keep_freed_memory()

        try:
            ended.append(options.work(options) or EXIT_DONE)
        except TrainingFailed as error:
            ended.append(error.exit_code)
            if error.exit_code not in (EXIT_USER_ERROR, EXIT_REQUEUE):
                print(f"error: {error}; the ranks' output above says why", file=sys.stderr, flush=True)

    return exit_code(work, options.debug) or ended[0]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="shodh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Multi-physics foundation models: divergence-free tokenizer, mixture-of-experts pretraining.",
        epilog=f"{EXAMPLE.format(command='run')}\n\n"
        "exit codes: 0 done, 2 the input is wrong, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint,\n"
        "130 interrupted, 1 everything else",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    run = config_command(commands, "run", "the main job: every stage that is not up to date, then the report", _run)
    text = "generate a dataset, import your own, check it or look at it"
    kinds = _steps(commands, "data", text, EXAMPLE.format(command="data generate"))
    config_command(kinds, "generate", "generate the dataset", stage("make_data"), "data generate")
    add_data_commands(kinds)
    text = "train the tokenizer, encode a dataset with it, measure it, decode latents"
    steps = _steps(commands, "tokenizer", text, EXAMPLE.format(command="tokenizer train"))
    add_tokenizer_commands(steps)
    pretrain = config_command(
        commands, "pretrain", "pretrain the latent transformer under the DeepSpeed launcher", _pretrain
    )
    for command in (run, pretrain):
        command.add_argument("--hostfile", help="train on these hosts: lines such as `worker-0 slots=8`")
    pretrain.add_argument("--resume", default="auto", help="a checkpoint to go on from; default: the run's newest one")
    evaluate = config_command(
        commands, "evaluate", "measure the newest checkpoint, or another model, on held-out trajectories", _evaluate
    )
    evaluate.add_argument("--checkpoint", type=Path, help=f"{MODEL}, in place of the config's run")
    evaluate.add_argument("--output", type=Path, help="folder for the results; needed with --checkpoint")
    _add_tokenizer(evaluate)
    config_command(commands, "report", "write the report of a run", stage("report"))
    text = "show parameters, memory of a GPU, steps and disk of a config; needs no GPU and starts nothing"
    config_command(commands, "plan", text, _plan).add_argument(
        "--world", type=int, help="ranks; default: those of this host"
    )
    _add_predict(commands)
    _add_checkpoint(commands)
    _add_expert(commands)
    _add_merge(commands)
    _add_bench(commands)
    _add_audit(commands)
    _add_doctor(commands)
    return parser


MODEL = "a run folder (its newest intact checkpoint), a checkpoint, or an exported folder"


def _steps(commands: Any, name: str, text: str, example: str) -> Any:
    """A command that is several, ``shodh <name> <step>``; returns what its steps are added to."""
    parser = commands.add_parser(name, help=text, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser.add_subparsers(required=True, metavar="step")


def _add_predict(commands: Any) -> None:
    example = "example: shodh predict --checkpoint runs/trial --input flow.hdf5 --steps 10 --output prediction.hdf5"
    parser = plain_command(commands, "predict", "continue your own flow with a trained model", example, _predict)
    parser.add_argument("--checkpoint", type=Path, required=True, help=MODEL)
    parser.add_argument("--input", type=Path, required=True, help="HDF5 file in the_well's schema")
    parser.add_argument("--steps", type=int, required=True, help="snapshots to predict")
    parser.add_argument("--output", type=Path, required=True, help="the new file; ParaView's gets the ending .vtkhdf")
    parser.add_argument("--start", type=int, default=0, help="first snapshot that the model sees; default: %(default)s")
    parser.add_argument("--sample", type=int, help="which trajectory of the file, from 0; default: all")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of the stored fields")
    parser.add_argument("--no-paraview", dest="paraview", action="store_false", help="write no .vtkhdf file")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    _add_tokenizer(parser)
    add_debug(parser)


def _add_checkpoint(commands: Any) -> None:
    example = "example: shodh checkpoint export runs/trial --output trial_model"
    steps = _steps(commands, "checkpoint", "show, check or export a checkpoint", example)
    for name, text, work in (
        ("inspect", "show what a checkpoint holds", _inspect),
        ("verify", "check every byte of a checkpoint, of all checkpoints of a run, or of an exported folder", _verify),
        ("export", "write one folder with weights, tokenizer, config and model card", _export),
    ):
        end = " --output trial_model" if name == "export" else ""
        step = plain_command(steps, name, text, f"example: shodh checkpoint {name} runs/trial{end}", work)
        step.add_argument("path", type=Path, metavar="PATH", help="a checkpoint or a run folder")
        if name == "export":
            step.add_argument("--output", type=Path, required=True, help="a new folder")
            _add_tokenizer(step)
        add_debug(step)


def _add_doctor(commands: Any) -> None:
    text = "say whether a training can run here, or on the hosts of a hostfile, and what to do where not"
    example = "example: shodh doctor --hostfile hostfile --shared runs"
    parser = plain_command(commands, "doctor", text, example, _doctor)
    parser.add_argument("--hostfile", type=Path, help="look at these hosts too: lines such as `worker-0 slots=8`")
    parser.add_argument(
        "--shared",
        action="append",
        metavar="FOLDER",
        help="of runs, data or tokenizers, the same on every host; may be repeated; default: the working folder",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    add_debug(parser)


def _add_expert(commands: Any) -> None:
    example = "example: shodh expert {step} --config configs/ccm/reaction_diffusion.yaml"
    text = "train neural operators on regimes of a 2D equation, to be merged"
    steps = _steps(commands, "expert", text, example.format(step="train"))
    for name, text in (
        ("data", "generate the regimes of the config's family"),
        ("train", "train an anchor, or fine-tune an expert from one; makes the data where they are missing"),
    ):
        step = plain_command(steps, name, text, example.format(step=name), _expert)
        add_config_arguments(step)
        step.set_defaults(step=name)
        if name == "train":
            step.add_argument("--hostfile", help="train on these hosts: lines such as `worker-0 slots=8`")
            step.add_argument("--resume", default="auto", help="a checkpoint to go on from; default: the newest one")


READOUTS = ("merge calibrate", "merge prefix")  # commands of two words, beside `merge CONFIG`


def _as_commands(arguments: list[str]) -> list[str]:
    """The arguments with a readout as one word: argparse knows no command whose second word may be missing."""
    first = " ".join(arguments[:2])
    return [first, *arguments[2:]] if first in READOUTS else arguments


def _add_merge(commands: Any) -> None:
    text = "merge models along a physical axis, or by other methods; reads and writes in bounded memory"
    more = "where to merge: shodh merge calibrate --help, shodh merge prefix --help"
    example = "example: shodh merge configs/merge/example.yaml"
    parser = plain_command(commands, "merge", text, f"{example}\n{more}", _merge)
    add_merge_arguments(parser)
    add_debug(parser)
    text = "fit gamma for two experts of a ccm config on validation data alone, and see how far their path is straight"
    example = "example: shodh merge calibrate merge.yaml --output calibration.json"
    parser = plain_command(commands, "merge calibrate", text, example, _merge_calibrate)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a ccm config of two experts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a new JSON file for the result")
    add_debug(parser)
    text = "merge two experts where they predict the first frames of your own trajectories best"
    example = "example: shodh merge prefix merge.yaml --input mine.hdf5 --frames 4 --output merged"
    parser = plain_command(commands, "merge prefix", text, example, _merge_prefix)
    add_merge_arguments(parser)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="trajectories of one regime: as a family, or PDEBench's",
    )
    parser.add_argument("--frames", type=int, default=4, metavar="K", help="that are looked at; default: %(default)s")
    add_debug(parser)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="run a benchmark; what is there already is kept")
    benches = parser.add_subparsers(required=True, metavar="benchmark")
    text = "compare CCM with its baselines: data, experts, measurements, tables and pictures"
    ccm = plain_command(benches, "ccm", text, "example: shodh bench ccm --config configs/ccm/bench.yaml", _bench_ccm)
    add_config_arguments(ccm)
    ccm.add_argument("--output", type=Path, help="a folder that gets a copy of tables, pictures and results")


def _add_audit(commands: Any) -> None:
    text = "does joint training harm a domain, and does the mixture of experts end it: controls, verdict, report"
    audit = plain_command(commands, "audit", text, "example: shodh audit --config configs/audit/cpu.yaml", _audit)
    add_config_arguments(audit)
    audit.add_argument("--output", type=Path, help="a folder that gets a copy of the report")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, help="the model's tokenizer, if it is not where its config says")


def _pretrain(options: argparse.Namespace) -> None:
    from shodh_moe import pipeline

    config = config_of(options)
    pipeline.check(config)
    pipeline.pretrain(config, options.resume)


def _run(options: argparse.Namespace) -> None:
    from shodh_moe import pipeline
    from shodh_moe.evaluation.report import summary_table

    config = config_of(options)
    metrics = pipeline.run_all(config)
    print(summary_table(metrics))
    print(f"report: {pipeline.paths_of(config).run / 'report' / 'index.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    if bool(options.checkpoint) != bool(options.output) or (options.tokenizer and not options.checkpoint):
        raise UserError(
            "--checkpoint and --output belong together (and --tokenizer to them): a run's own results go to its folder"
        )
    if not options.checkpoint:
        stage("evaluate")(options)
        return
    from shodh_moe.evaluation.elsewhere import evaluate_elsewhere
    from shodh_moe.evaluation.report import summary_table

    metrics = evaluate_elsewhere(config_of(options), options.checkpoint, options.output, options.tokenizer)
    print(summary_table(metrics))
    print(f"[evaluate] {options.output / 'metrics.json'}")


def _predict(options: argparse.Namespace) -> None:
    from shodh_moe.evaluation.predict import Request, predict

    names = ("input", "output", "steps", "start", "sample", "dtype", "paraview", "overwrite")
    predict(options.checkpoint, Request(**{name: getattr(options, name) for name in names}), options.tokenizer)


def _inspect(options: argparse.Namespace) -> None:
    from shodh_moe.checkpoint.inspect import inspect

    print(inspect(options.path))


def _verify(options: argparse.Namespace) -> int:
    from shodh_moe.checkpoint.inspect import verify
    from shodh_moe.evaluation.loading import verify_export

    exported = (options.path / "export.json").exists()
    damages = verify_export(options.path) if exported else verify(options.path)
    for damage in damages:
        print(f"error: {damage}", file=sys.stderr)
    if damages:
        return EXIT_USER_ERROR
    print(f"intact: {options.path}")
    return EXIT_DONE


def _export(options: argparse.Namespace) -> None:
    from shodh_moe.evaluation.export import export

    print(f"[export] {export(options.path, options.output, options.tokenizer)}")


def _plan(options: argparse.Namespace) -> None:
    from shodh_moe.checks import processes
    from shodh_moe.training.plan import plan

    config = config_of(options)
    if options.world is not None and options.world < 1:
        raise UserError(f"--world {options.world}: give the number of ranks, at least 1")
    print(plan(config, options.world or processes(config)))


def _doctor(options: argparse.Namespace) -> int:
    from shodh_moe.doctor import doctor

    return doctor(options.hostfile, options.shared, options.json)


def _expert(options: argparse.Namespace) -> None:
    from shodh_moe.ccm import stages
    from shodh_moe.ccm.config import ExpertConfig

    config = load_config_of(ExpertConfig, options.config, overrides_of(options), options.name)
    stages.check(config)
    stages.make_data(config)
    if options.step == "train":
        stages.train(config, options.resume)


def _bench_ccm(options: argparse.Namespace) -> None:
    from shodh_moe.ccm.bench.config import BenchConfig
    from shodh_moe.ccm.bench.run import run

    config = load_config_of(BenchConfig, options.config, options.overrides, options.name)
    run(config, options.output)
    print((config.folder / "report" / "summary.md").read_text())


def _audit(options: argparse.Namespace) -> None:
    from shodh_moe.audit.config import AuditConfig
    from shodh_moe.audit.run import run

    audit = load_config_of(AuditConfig, options.config, options.overrides, options.name)
    run(audit, options.output)
    print((audit.folder / "report" / "summary.md").read_text())
    print(f"report: {audit.folder / 'report' / 'index.html'}")


def _merge(options: argparse.Namespace) -> None:
    from shodh_moe.merging import merge

    merge(options.config, options.output, options.memory_limit, options.out_shard_size)


def _merge_calibrate(options: argparse.Namespace) -> None:
    from shodh_moe.ccm.calibrate import calibrate

    calibrate(options.config, options.output)


def _merge_prefix(options: argparse.Namespace) -> None:
    from shodh_moe.ccm.prefix import merge_by_prefix

    limits = (options.memory_limit, options.out_shard_size)
    merge_by_prefix(options.config, options.input, options.frames, options.output, *limits)


if __name__ == "__main__":
    sys.exit(main())
