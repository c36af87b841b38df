"""``shodh merge CONFIG`` (short for ``shodh merge run CONFIG``) and ``shodh merge calibrate|prefix``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import add_merge_arguments, add_sweep_arguments, path_option
from shodh_moe.cli.common import MODEL, add_command, add_debug, add_group, add_tokenizer_option


def add_merge(commands: Any) -> None:
    text = "merge models along a physical axis or by other methods, in bounded memory"
    more = "for many outputs: shodh merge sweep --help\n"
    more += "to choose where to merge: shodh merge calibrate --help, shodh merge prefix --help"
    example = "example: shodh merge configs/merge/example.yaml"
    steps = add_group(commands, "merge", text, f"{example}\n{more}", default="run")
    run = add_command(steps, "run", text, f"{example}\n{more}", _merge)
    add_merge_arguments(run)
    add_debug(run)
    text = "make the outputs of several merge configs, or at many alphas, shared by processes and job arrays"
    example = "example: shodh merge sweep configs/merge/example.yaml --part 0 --of 4\n"
    example += "at 61 alphas: shodh merge sweep line.yaml --alpha=-1.5:1.5:61\n"
    example += "in 4 processes: mpirun -n 4 shodh merge sweep porous.yaml channel.yaml --output swept"
    sweep = add_command(steps, "sweep", text, example, _sweep)
    add_sweep_arguments(sweep)
    add_debug(sweep)
    text = "make one mixture of experts, with a path for each domain, from models that were trained for one domain each"
    example = "example: shodh merge mixture configs/merge/mixture.yaml"
    mixture = add_command(steps, "mixture", text, example, _mixture)
    add_merge_arguments(mixture)
    add_debug(mixture)
    text = "make a mixture of experts that starts with the outputs of a dense model"
    example = "example: shodh merge upcycle dense_model --experts 4 --output mixture_model"
    up = add_command(steps, "upcycle", text, example, _upcycle)
    up.add_argument("model", type=path_option, metavar="MODEL", help=f"{MODEL}, of a dense model")
    up.add_argument("--experts", type=int, required=True, metavar="N", help="number of paths")
    up.add_argument("--output", type=path_option, required=True, metavar="FOLDER", help="new folder")
    about = "whether each path adds its own part to the attention's projections; default: %(default)s"
    up.add_argument("--attention", choices=["shared", "low_rank", "own"], default="shared", help=about)
    add_tokenizer_option(up)
    add_debug(up)
    text = "fit gamma for two experts of a ccm config on validation data, and measure how straight their path is"
    example = "example: shodh merge calibrate merge.yaml --output calibration.json"
    calibrate = add_command(steps, "calibrate", text, example, _calibrate)
    calibrate.add_argument("config", type=path_option, metavar="CONFIG", help="ccm config of two experts")
    calibrate.add_argument("--output", type=path_option, metavar="FILE", help="new JSON file for the result")
    add_debug(calibrate)
    text = "merge two experts at the point that best predicts the first frames of your own trajectories"
    example = "example: shodh merge prefix merge.yaml --input mine.hdf5 --frames 4 --output merged"
    prefix = add_command(steps, "prefix", text, example, _prefix)
    add_merge_arguments(prefix)
    about = "HDF5 file with trajectories of one regime, in the format of `shodh expert data`, The Well or PDEBench"
    prefix.add_argument("--input", type=path_option, required=True, metavar="FILE", help=about)
    prefix.add_argument("--frames", type=int, default=4, metavar="K", help="frames to use; default: %(default)s")
    about = "find one alpha each for the input, the blocks and the output of the network, instead of one for all"
    prefix.add_argument("--by-group", action="store_true", help=about)
    add_debug(prefix)


def _merge(options: argparse.Namespace) -> None:
    from shodh_moe.merging import merge

    merge(options.config, options.output, options.memory_limit, options.out_shard_size)


def _sweep(options: argparse.Namespace) -> int:
    from shodh_moe.runs.merge_rank import share_sweep

    return share_sweep(options)


def _mixture(options: argparse.Namespace) -> None:
    from shodh_moe.merging.mixture import merge_mixture

    merge_mixture(options.config, options.output, options.memory_limit, options.out_shard_size)


def _upcycle(options: argparse.Namespace) -> None:
    from shodh_moe.inference.upcycle import upcycle

    made = upcycle(options.model, options.experts, options.output, options.attention, options.tokenizer)
    print(f"[merge] {made}: {options.experts} paths with the outputs of {options.model}")


def _calibrate(options: argparse.Namespace) -> None:
    from shodh_moe.ccm.calibrate import calibrate

    calibrate(options.config, options.output)


def _prefix(options: argparse.Namespace) -> None:
    from shodh_moe.ccm.prefix import merge_by_prefix

    limits = (options.memory_limit, options.out_shard_size)
    merge_by_prefix(options.config, options.input, options.frames, options.output, *limits, options.by_group)
