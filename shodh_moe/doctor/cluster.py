"""Lines about the hosts of a hostfile: pure functions of the results of gather_remote.py.

A line names only the hosts that differ, and of many only the first few, so the table stays short for a thousand hosts.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.doctor.table import Line
from shodh_moe.launching.devices import VARIABLE, names_in, require_choice_fits
from shodh_moe.launching.hostfile import Host, require_startable
from shodh_moe.launching.ssh import TIME_VARIABLE, group_failures, shown_ssh, some

Found = dict[str, Any]
HERE = "this host"
GIB = 2**30
SSH_REMEDIES = (
    ("Permission denied", "ssh-copy-id {host}: ssh must log in without a password"),
    ("Host key verification", "{ssh} once and accept its key, or put it into ~/.ssh/known_hosts"),
    ("not known", "correct the name in the hostfile, or add it to /etc/hosts or ~/.ssh/config"),
    ("not resolve", "correct the name in the hostfile, or add it to /etc/hosts or ~/.ssh/config"),
    ("No such file", "make the same environment there at {python}, or put it on a shared file system"),
    ("not found", "make the same environment there at {python}, or put it on a shared file system"),
    ("not asked", f"allow more time, as in: export {TIME_VARIABLE}=60"),
    ("", "check that it is up, that sshd runs and that no firewall blocks its port; try: {ssh} true"),
)  # text in ssh's error message, and the remedy; the last entry matches every error
SHOWN_HOSTS = 3  # hosts with a line of their own among those that fail alike
SHOWN_KINDS = 6


def failure_lines(errors: dict[str, str], before: str = "") -> list[Line]:
    """Return lines for the hosts with an error: the first few of each kind, and how many more there are.

    Args:
        errors: by host.
        before: text before each error.
    """
    kinds = group_failures(errors)
    lines = []
    for _, names in kinds[:SHOWN_KINDS]:
        shown = names if len(names) == SHOWN_HOSTS + 1 else names[:SHOWN_HOSTS]
        for name in shown:
            remedy = next(remedy for text, remedy in SSH_REMEDIES if text in errors[name])
            remedy = remedy.format(host=name, python=sys.executable, ssh=shown_ssh(name))
            lines.append(Line("error", f"host {name}", before + errors[name], remedy))
        if more := names[len(shown) :]:
            value = f"{len(more)} more like host {shown[-1]}: {some(more)}"
            lines.append(Line("error", "more hosts", value, "see the remedy above"))
    if rest := [name for _, names in kinds[SHOWN_KINDS:] for name in names]:
        value = f"{len(rest)} more with other errors: {some(rest)}"
        lines.append(Line("error", "more hosts", value, "first repair the hosts above"))
    return lines


def answer_lines(facts: dict[str, Found]) -> list[Line]:
    """Return the lines of `failure_lines` for the silent hosts, and one line for all hosts that answered."""
    lines = failure_lines({name: found["error"] for name, found in facts.items() if "error" in found})
    times = {name: found["seconds"] for name, found in facts.items() if "error" not in found}
    if times:
        slowest = max(times, key=lambda name: times[name])
        value = f"{len(times)} of {len(facts)} answer without a password, the slowest ({slowest})"
        value += f" after {times[slowest]:.1f} s"
        if times[slowest] > 4:
            remedy = f"{shown_ssh(slowest)} -v shows where the time goes; often UseDNS or a slow home folder"
            lines.append(Line("warning", "hosts", value, remedy))
        else:
            lines.append(Line("ok", "hosts", value))
    return lines


def size_line(hosts: list[Host]) -> Line | None:
    """Return an error if DeepSpeed's launcher cannot start so many hosts."""
    try:
        require_startable(hosts)
    except UserError as error:
        reason, _, remedy = str(error).partition(": ")
        return Line("error", "hostfile", reason, remedy)
    return None


def fact_lines(hosts: list[Host], facts: dict[str, Found], own: Found) -> list[Line]:
    """Compare the hosts that answered, at least one, with each other and with this host."""
    all_hosts = {**facts, HERE: own}
    packages = own["versions"]
    lines = [
        equal_line(
            "same python",
            {name: found["python"] for name, found in all_hosts.items()},
            "make the same environment on every host",
        ),
        *(
            line
            for package in packages
            if (
                line := equal_line(
                    f"same {package}",
                    {name: found["versions"][package] for name, found in all_hosts.items()},
                    f"pip install the same {package} on every host, preferably the version in constraints.txt",
                )
            ).status
            != "ok"
        ),
    ]
    if len(lines) == 1:
        versions = ", ".join(f"{package} {version}" for package, version in packages.items() if version != "none")
        lines.append(Line("ok", "same packages", f"{versions} on every host"))
    return [
        *lines,
        equal_line(
            "same code",
            {name: found["code"] for name, found in all_hosts.items()},
            "check out the same commit of shodh_moe on every host (git status shows changes), or use a shared folder",
        ),
        slots_line(hosts, facts),
        compiler_line(facts),
        clocks_line(facts),
        keepalive_line(facts),
    ]


def equal_line(what: str, values: dict[str, str], remedy: str) -> Line:
    """Check that all hosts have the same value, given by host."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, value in values.items():
        groups[value].append(name)
    if len(groups) == 1:
        return Line("ok", what, f"{next(iter(groups))} on every host")
    parts = (f"{value} on {some(names)}" for value, names in sorted(groups.items(), key=lambda group: len(group[1])))
    return Line("error", what, "; ".join(parts), remedy)


def slots_line(hosts: list[Host], facts: dict[str, Found]) -> Line:
    try:
        require_choice_fits({host.name: host.slots for host in hosts})
    except UserError as error:
        value, _, remedy = str(error).rpartition(": ")
        return Line("error", "slots", value, remedy)
    answered = [(host, _with_visible_gpus(facts[host.name])) for host in hosts if host.name in facts]
    with_gpus = any(found["gpus"] for _, found in answered)
    unit, key = ("GPUs", "gpus") if with_gpus else ("cores", "cores")
    over = [
        f"{host.name} has {found[key]} {unit} for slots={host.slots}"
        for host, found in answered
        if host.slots > found[key]
    ]
    under = [
        f"{host.name} has {found[key]} {unit} for slots={host.slots}"
        for host, found in answered
        if host.slots < found[key]
    ]
    if over:
        # Ranks can share a core, though slowly, but not a GPU.
        return Line("error" if with_gpus else "warning", "slots", some(over), "lower these slots in the hostfile")
    if under and with_gpus:
        return Line("warning", "slots", some(under), "raise these slots in the hostfile, or GPUs stay idle")
    ranks = sum(host.slots for host, _ in answered)
    return Line("ok", "slots", f"{ranks} ranks, with a {unit[:-1].removesuffix('s')} or more for each")


def _with_visible_gpus(found: Found) -> Found:
    """Return a host's facts with the number of GPUs that its ranks will see: those listed here, or else on the host."""
    visible = os.environ.get(VARIABLE, found["visible"])
    return found if visible is None else found | {"gpus": min(found["gpus"], len(names_in(visible)))}


def compiler_line(facts: dict[str, Found]) -> Line:
    """Check the compilers in the environment of an ssh session, which the ranks share."""
    lacking = {name: [tool for tool, has in found["tools"].items() if not has] for name, found in facts.items()}
    missing = [f"no {' and no '.join(tools)} on {name}" for name, tools in lacking.items() if tools]
    if not missing:
        return Line("ok", "compilers", "a C++ compiler and ninja on every host")
    only_ninja_on_gpus = all(
        tools in ([], ["ninja"]) and (not tools or facts[name]["gpus"]) for name, tools in lacking.items()
    )
    return Line(
        "warning" if only_ninja_on_gpus else "error",
        "compilers",
        f"{some(missing)}, on the PATH of an ssh session",
        "install them there (apt-get install g++ ninja-build): DeepSpeed and Triton compile at the first start",
    )


def clocks_line(facts: dict[str, Found]) -> Line:
    worst = max(facts, key=lambda name: abs(facts[name]["clock"]))
    if (off := abs(facts[worst]["clock"])) <= 2:
        return Line("ok", "clocks", "within 2 s of this host's")
    off_by = [
        f"{name} is {abs(found['clock']):.0f} s {'ahead' if found['clock'] > 0 else 'behind'}"
        for name, found in facts.items()
        if abs(found["clock"]) > 2
    ]
    # munge, on which SLURM depends, refuses clocks that are five minutes off.
    return Line(
        "error" if off > 300 else "warning",
        "clocks",
        some(off_by),
        "start an NTP service (chrony, systemd-timesyncd) there",
    )


def keepalive_line(facts: dict[str, Found]) -> Line:
    never = [name for name, found in facts.items() if found["keepalive"] == 0]
    if never:
        return Line(
            "warning",
            "ssh keepalive",
            f"off for {some(never)}: a job would wait forever for a host that disappears",
            "put `ServerAliveInterval 15` under `Host *` in ~/.ssh/config",
        )
    if any(found["keepalive"] is None for found in facts.values()):
        return Line("ok", "ssh keepalive", "unknown: this ssh does not show its options")
    longest = max(found["keepalive"] for found in facts.values())
    return Line("ok", "ssh keepalive", f"ServerAliveInterval {longest}")


def between_lines(facts: dict[str, Found], checks: dict[str, Found], folders: list[str]) -> list[Line]:
    """Return the lines of the second round: hosts that fell silent, ports, shared folders."""
    silent = failure_lines(
        {name: found["error"] for name, found in checks.items() if "error" in found}, "in the second round: "
    )
    checks = {name: found for name, found in checks.items() if "error" not in found}
    return [
        *silent,
        *([port_line(facts, checks)] if len(facts) > 1 else []),
        *(
            shared_line(folder, checks)
            for folder in folders
            if any(folder in found["folders"] for found in checks.values())
        ),
    ]


def port_line(facts: dict[str, Found], checks: dict[str, Found]) -> Line:
    first = next(iter(facts))
    port, addresses = facts[first]["port"], facts[first]["addresses"][:4]
    if not addresses:
        return Line("error", "ports", f"{first} has no IPv4 address except loopback", "run `ip addr` there")
    others = [name for name in checks if name != first]
    if first not in checks or not others:
        return Line("error", "ports", "not tested: too few hosts answer", "see the lines above")
    if checks[first]["listened"]:
        remedy = "run shodh doctor again: another program may have taken the port"
        return Line("warning", "ports", f"{first} could not listen on port {port}: {checks[first]['listened']}", remedy)
    failed = {address: [name for name in others if checks[name]["reached"][address]] for address in addresses}
    open_to_all = [address for address, names in failed.items() if not names]
    if not open_to_all:
        best = min(failed, key=lambda address: len(failed[address]))
        why = checks[failed[best][0]]["reached"][best]
        return Line(
            "error",
            "ports",
            f"{some(failed[best])} cannot connect to {first} ({best}, port {port}): {why}",
            "let the hosts reach each other on all TCP ports above 1023 (firewall, security group, wrong network?)",
        )
    value = f"every other host connects to {first} at {open_to_all[0]}, port {port}"
    if open_to_all[0] != addresses[0]:
        return Line(
            "warning",
            "ports",
            f"{value}, but not at {addresses[0]}, which deepspeed uses",
            f"export MASTER_ADDR={open_to_all[0]}; with deepspeed by hand: --master_addr {open_to_all[0]}",
        )
    return Line("ok", "ports", value)


def shared_line(folder: str, checks: dict[str, Found]) -> Line:
    results = {name: found["folders"][folder] for name, found in checks.items()}
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, found in results.items():
        if found["error"]:
            wrong[found["error"]].append(name)
    what = f"shared {folder}"
    if wrong:
        value = "; ".join(f"on {some(names)} it {error}" for error, names in wrong.items())
        return Line(
            "error", what, value, "mount it at the same path, writable, on every host, or choose another: --shared"
        )
    least = min(results, key=lambda name: results[name]["free"])
    value = f"visible and writable on every host, {results[least]['free'] / GIB:.0f} GiB free"
    if results[least]["free"] < 10 * GIB:
        return Line("warning", what, f"{value} on {least}", "free space there, or choose another folder")
    return Line("ok", what, value)
