"""The command ``shodh doctor``: gather facts, judge them and print a table."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shodh_moe.base.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from shodh_moe.doctor.gather_local import Found, gather
from shodh_moe.doctor.machine import machine_lines
from shodh_moe.doctor.software import software_lines
from shodh_moe.doctor.table import Line, as_json, as_text


def doctor(hostfile: Path | None = None, folders: list[str] | None = None, json: bool = False) -> int:
    """Check the requirements of training and print the results as a table or JSON.

    Args:
        hostfile: also inspect this file's hosts, over ssh.
        folders: folders of runs, data and tokenizers, at the same path on every host; default: the working folder.
        json: print JSON.

    Returns:
        exit code: 0 if no line is an error, otherwise 2.

    Raises:
        UserError: the hostfile or the time limit is wrong.
    """
    # Use absolute paths, so that a folder has the same name in every line.
    folders = list(dict.fromkeys(str(Path(folder).absolute()) for folder in folders or ["."]))
    lines = _inspect(hostfile, folders)
    if json:
        print(as_json(lines))
    else:
        print(as_text(lines, shutil.get_terminal_size((120, 24)).columns, colours=sys.stdout.isatty()))
    return EXIT_USER_ERROR if any(line.status == "error" for line in lines) else EXIT_DONE


def _inspect(hostfile: Path | None, folders: list[str]) -> list[Line]:
    if hostfile is None:
        return _own_lines(gather(folders), False)
    try:
        # These imports load torch, which may be broken.
        from shodh_moe.doctor import cluster, gather_remote
        from shodh_moe.launching.hostfile import read_hostfile
        from shodh_moe.launching.ssh import time_limit
    except Exception as error:  # a broken torch may raise anything
        return [*_own_lines(gather(folders), True), _not_asked(error, "fix the errors above first")]
    hosts = read_hostfile(hostfile)
    time_limit(1.0)  # raises where its variable is wrong
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(gather, folders)
        try:
            facts = gather_remote.ask_facts([host.name for host in hosts])
        except UserError as error:
            return [*_own_lines(gathered.result(), True), _not_asked(error, "install it first")]
        answered = {name: found for name, found in facts.items() if "error" not in found}
        checks = gather_remote.check_between(answered, folders) if answered else {}
        found = gathered.result()
    lines = [*_own_lines(found, True), *cluster.answer_lines(facts)]
    if answered and "error" not in found["facts"]:
        lines += cluster.fact_lines(hosts, answered, found["facts"])
    if line := cluster.size_line(hosts):
        lines.append(line)
    return [*lines, *cluster.between_lines(answered, checks, folders)]


def _own_lines(found: Found, with_hostfile: bool) -> list[Line]:
    return [*software_lines(found), *machine_lines(found, with_hostfile)]


def _not_asked(error: Exception, remedy: str) -> Line:
    return Line("error", "hosts", f"not asked: {error}", remedy)
