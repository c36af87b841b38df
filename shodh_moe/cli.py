"""The ``shodh`` command: the whole main job, one of its stages, or something with a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shodh_moe.command import OneLineParser, add_config_arguments, add_merge_arguments, exit_code
from shodh_moe.config import Config
from shodh_moe.config_io import load_config
from shodh_moe.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR, UserError

EXAMPLE = "example: shodh {command} --config configs/quickstart.yaml --name trial training.steps=200"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
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
        from shodh_moe.memory import keep_freed_memory
        from shodh_moe.pipeline import PretrainFailed

        keep_freed_memory()

        try:
            ended.append(options.work(options) or EXIT_DONE)
        except PretrainFailed as error:
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
    run = _command(commands, "run", "the main job: every stage that is not up to date, then the report", _run)
    _command(commands, "data", "generate the dataset", _stage("make_data"))
    tokenizer = commands.add_parser(
        "tokenizer",
        help="train the tokenizer or encode a dataset with it",
        epilog=EXAMPLE.format(command="tokenizer train"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = tokenizer.add_subparsers(required=True, metavar="step")
    _command(steps, "train", "train the tokenizer", _stage("make_tokenizer"), "tokenizer train")
    _command(steps, "encode", "cache the latents of the dataset", _stage("make_latents"), "tokenizer encode")
    pretrain = _command(commands, "pretrain", "pretrain the latent transformer under the DeepSpeed launcher", _pretrain)
    for command in (run, pretrain):
        command.add_argument("--hostfile", help="train on these hosts: lines such as `worker-0 slots=8`")
    pretrain.add_argument("--resume", default="auto", help="a checkpoint to go on from; default: the run's newest one")
    evaluate = _command(
        commands, "evaluate", "measure the newest checkpoint, or another model, on held-out trajectories", _evaluate
    )
    evaluate.add_argument("--checkpoint", type=Path, help=f"{MODEL}, in place of the config's run")
    evaluate.add_argument("--output", type=Path, help="folder for the results; needed with --checkpoint")
    _add_tokenizer(evaluate)
    _command(commands, "report", "write the report of a run", _stage("report"))
    text = "show parameters, memory of a GPU, steps and disk of a config; needs no GPU and starts nothing"
    _command(commands, "plan", text, _plan).add_argument("--world", type=int, help="ranks; default: those of this host")
    _add_predict(commands)
    _add_checkpoint(commands)
    _add_merge(commands)
    _add_doctor(commands)
    return parser


MODEL = "a run folder (its newest intact checkpoint), a checkpoint, or an exported folder"


def _command(
    commands: Any, name: str, text: str, work: Callable[[argparse.Namespace], object], full_name: str = ""
) -> argparse.ArgumentParser:
    parser = _plain_command(commands, name, text, EXAMPLE.format(command=full_name or name), work)
    add_config_arguments(parser)
    return parser


def _plain_command(
    commands: Any, name: str, text: str, example: str, work: Callable[[argparse.Namespace], object]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=example,
        # As it is: an example broken over two lines could not be copied.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(work=work)
    return parser


def _add_predict(commands: Any) -> None:
    example = "example: shodh predict --checkpoint runs/trial --input flow.hdf5 --steps 10 --output prediction.hdf5"
    parser = _plain_command(commands, "predict", "continue your own flow with a trained model", example, _predict)
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
    _add_debug(parser)


def _add_checkpoint(commands: Any) -> None:
    example = "example: shodh checkpoint export runs/trial --output trial_model"
    parser = commands.add_parser(
        "checkpoint",
        help="show, check or export a checkpoint",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(required=True, metavar="step")
    for name, text, work in (
        ("inspect", "show what a checkpoint holds", _inspect),
        ("verify", "check every byte of a checkpoint, of all checkpoints of a run, or of an exported folder", _verify),
        ("export", "write one folder with weights, tokenizer, config and model card", _export),
    ):
        end = " --output trial_model" if name == "export" else ""
        step = _plain_command(steps, name, text, f"example: shodh checkpoint {name} runs/trial{end}", work)
        step.add_argument("path", type=Path, metavar="PATH", help="a checkpoint or a run folder")
        if name == "export":
            step.add_argument("--output", type=Path, required=True, help="a new folder")
            _add_tokenizer(step)
        _add_debug(step)


def _add_doctor(commands: Any) -> None:
    text = "say whether a training can run here, or on the hosts of a hostfile, and what to do where not"
    example = "example: shodh doctor --hostfile hostfile --shared runs"
    parser = _plain_command(commands, "doctor", text, example, _doctor)
    parser.add_argument("--hostfile", type=Path, help="look at these hosts too: lines such as `worker-0 slots=8`")
    parser.add_argument(
        "--shared",
        action="append",
        metavar="FOLDER",
        help="of runs, data or tokenizers, the same on every host; may be repeated; default: the working folder",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    _add_debug(parser)


def _add_merge(commands: Any) -> None:
    text = "merge models along a physical axis, or by other methods; reads and writes in bounded memory"
    parser = _plain_command(commands, "merge", text, "example: shodh merge configs/merge/example.yaml", _merge)
    add_merge_arguments(parser)
    _add_debug(parser)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, help="the model's tokenizer, if it is not where its config says")


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show a traceback for wrong input too")


def _config(options: argparse.Namespace) -> Config:
    hostfile = [f"parallel.hostfile={options.hostfile}"] if getattr(options, "hostfile", None) else []
    return load_config(options.config, options.overrides + hostfile, options.name)


def _stage(name: str) -> Callable[[argparse.Namespace], None]:
    def work(options: argparse.Namespace) -> None:
        from shodh_moe import pipeline

        config = _config(options)
        pipeline.check(config)
        getattr(pipeline, name)(config)

    return work


def _pretrain(options: argparse.Namespace) -> None:
    from shodh_moe import pipeline

    config = _config(options)
    pipeline.check(config)
    pipeline.pretrain(config, options.resume)


def _run(options: argparse.Namespace) -> None:
    from shodh_moe import pipeline
    from shodh_moe.evaluation.report import summary_table

    config = _config(options)
    metrics = pipeline.run_all(config)
    print(summary_table(metrics))
    print(f"report: {pipeline.paths_of(config).run / 'report' / 'index.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    if bool(options.checkpoint) != bool(options.output) or (options.tokenizer and not options.checkpoint):
        raise UserError(
            "--checkpoint and --output belong together (and --tokenizer to them): a run's own results go to its folder"
        )
    if not options.checkpoint:
        _stage("evaluate")(options)
        return
    from shodh_moe.evaluation.elsewhere import evaluate_elsewhere
    from shodh_moe.evaluation.report import summary_table

    metrics = evaluate_elsewhere(_config(options), options.checkpoint, options.output, options.tokenizer)
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

    config = _config(options)
    if options.world is not None and options.world < 1:
        raise UserError(f"--world {options.world}: give the number of ranks, at least 1")
    print(plan(config, options.world or processes(config)))


def _doctor(options: argparse.Namespace) -> int:
    from shodh_moe.doctor import doctor

    return doctor(options.hostfile, options.shared, options.json)


def _merge(options: argparse.Namespace) -> None:
    from shodh_moe.merging import merge

    merge(options.config, options.output, options.memory_limit, options.out_shard_size)


if __name__ == "__main__":
    sys.exit(main())
