"""``shodh plan``: what a config needs, how long its steps take on a machine, and which layout is the fastest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from shodh_moe.base.command import add_config_arguments, path_option
from shodh_moe.base.errors import UserError
from shodh_moe.cli.common import add_command, config_of

if TYPE_CHECKING:
    from shodh_moe.config import Config

EXAMPLE = "example: shodh plan --config configs/cluster_8x8.yaml --world 1024 --gpu h100 --network ib-ndr"
# Options that need a machine.
_TIME_OPTIONS = ("network", "simulate", "load")


def add_plan(commands: Any) -> None:
    text = "show a config's parameters, GPU memory, disk space and time per step, and the fastest layout"
    parser = add_command(commands, "plan", text, EXAMPLE, _plan)
    add_config_arguments(parser, required=False)
    add_world(parser)
    parser.add_argument(
        "--global-batch", type=int, metavar="N", help="samples per step of all ranks; default: config's"
    )
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument("--gpu", help="predict times for nodes of 8 of these: h100, h200, b200, mi300x")
    machine.add_argument("--machine", type=path_option, metavar="FILE", help="predict times from what --measure wrote")
    about = "what connects the nodes: ib-hdr, ib-ndr, ib-xdr, roce-400, efa-3200, ethernet-100"
    parser.add_argument("--network", help=about)
    parser.add_argument("--simulate", action="store_true", help="simulate steps with stragglers and uneven experts")
    about = "with --simulate, a run folder whose experts' last loads are used; default: all experts are equally likely"
    parser.add_argument("--load", type=path_option, metavar="RUN", help=about)
    parser.add_argument("--steps", type=int, default=50, help="steps to simulate; default: %(default)s")
    parser.add_argument("--measure", action="store_true", help="measure this machine, at most two minutes; no config")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks to measure; default: 1 2 4, or the GPUs")
    parser.add_argument("--dtypes", nargs="+", help="dtypes of products to measure; default: float32, on GPUs bfloat16")
    about = "file that --measure writes; default: machine.json"
    parser.add_argument("--output", type=path_option, metavar="FILE", help=about)
    about = "also run one rank on fake GPUs, and report memory, waits for the device and collectives"
    parser.add_argument("--rehearse", action="store_true", help=about)
    parser.add_argument("--rank", type=int, default=0, help="the rank to rehearse; default: 0")


def add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, help="number of ranks; default: those of this host")


def world_of(options: argparse.Namespace) -> int | None:
    """The value of ``--world``; None if it is not given. Raises `UserError` if it is below 1."""
    world: int | None = options.world
    if world is not None and world < 1:
        raise UserError(f"--world {world}: give the number of ranks, at least 1")
    return world


def _plan(options: argparse.Namespace) -> None:
    if options.measure:
        _measure(options)
        return
    if options.config is None:
        raise UserError("--config is missing: name a config, or measure this machine with --measure")
    given = [f"--{name}" for name in _TIME_OPTIONS if getattr(options, name)]
    if given and not (options.gpu or options.machine):
        raise UserError(f"{given[0]} needs a machine: name it with --gpu or --machine")
    from shodh_moe.launching.hostfile import count_ranks
    from shodh_moe.plan.layouts import with_global_batch
    from shodh_moe.runs.plan import plan
    from shodh_moe.runs.traffic import traffic_table

    config = config_of(options)
    world = world_of(options) or count_ranks(config)
    if not 0 <= options.rank < world:
        raise UserError(f"--rank {options.rank}: with {world} ranks, give one from 0 to {world - 1}")
    config = with_global_batch(config, world, options.global_batch)
    tables = [plan(config, world), traffic_table(config, world)]
    if options.gpu or options.machine:
        tables += _time_tables(options, config, world)
    print("\n".join(tables))
    if options.rehearse:
        from shodh_moe.rehearsal.findings import problems
        from shodh_moe.rehearsal.rehearse import rehearse, table

        found = rehearse(config, world, options.rank)
        print(table(found, config))
        if wrong := problems(found, config):
            raise UserError(f"the rehearsal found {len(wrong)} problem{'s' * (len(wrong) > 1)}, listed above")


def _time_tables(options: argparse.Namespace, config: Config, world: int) -> list[str]:
    """Return the prediction, the layouts and, if asked for, the simulation."""
    from shodh_moe.plan.layouts import compare
    from shodh_moe.plan.loads import load_of_run
    from shodh_moe.plan.machine import from_data_sheets, read_machine, with_network
    from shodh_moe.plan.table import layout_table, spread_table, time_table

    machine = from_data_sheets(options.gpu) if options.gpu else read_machine(options.machine)
    machine = with_network(machine, options.network)
    load_E = load_of_run(options.load) if options.load else None
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: give the number of steps to simulate, at least 1")
    found = compare(config, world, machine)
    tables = [time_table(config, world, machine, found.configured.prediction), layout_table(found, machine, world)]
    if options.simulate:
        tables.append(spread_table(config, world, machine, load_E, options.steps, config.seed))
    return tables


def _measure(options: argparse.Namespace) -> None:
    from pathlib import Path

    from shodh_moe.base.files import require_writable
    from shodh_moe.plan.machine import write_machine
    from shodh_moe.plan.measure import measure

    output = options.output or Path("machine.json")
    require_writable(output.absolute().parent)
    write_machine(output, measure(options.ranks, options.dtypes))
    print(f"[plan] {output}: use it with `shodh plan --config ... --machine {output}`")
