"""Lines on this machine and its folders: pure functions of the results of gather_local.py."""

from __future__ import annotations

import re
import time
from typing import Any

from shodh_moe.doctor.table import Line

Found = dict[str, Any]
GIB = 2**30
# Types of network file systems.
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse.sshfs", "ceph", "9p", "panfs", "wekafs")


def machine_lines(found: Found, with_hostfile: bool) -> list[Line]:
    return [
        ssh_line(found, with_hostfile),
        pdsh_line(found, with_hostfile),
        slurm_line(found),
        memory_line(found),
        shm_line(found),
        open_files_line(found),
        clock_line(found, with_hostfile),
        port_line(found),
        *(folder_line(name, folder) for name, folder in found["folders"].items()),
    ]


def ssh_line(found: Found, needed: bool) -> Line:
    if found["ssh"]:
        return Line("ok", "ssh", found["ssh"].splitlines()[0].split(",")[0])
    if needed:
        return Line("error", "ssh", "not on the PATH", "apt-get install openssh-client, or similar")
    return Line("ok", "ssh", "not on the PATH: only needed with a hostfile")


def pdsh_line(found: Found, needed: bool) -> Line:
    output = found["pdsh"]
    if not output:
        if needed:
            return Line(
                "error", "pdsh", "not on the PATH", "apt-get install pdsh, or similar; or deepspeed --launcher openmpi"
            )
        return Line("ok", "pdsh", "not on the PATH: only needed with a hostfile")
    modules = re.search(r"rcmd modules: ([\w,]+)", output)
    if modules and "ssh" not in modules[1].split(","):
        return Line(
            "error" if needed else "warning",
            "pdsh",
            f"{output.splitlines()[0]}, built without ssh",
            "install one that is configured --with-ssh; or deepspeed --launcher openmpi",
        )
    return Line("ok", "pdsh", output.splitlines()[0])


def slurm_line(found: Found) -> Line:
    output = found["slurm"]
    if output is None:
        return Line("ok", "slurm", "no client: only needed for sbatch and srun")
    if re.search(r"is UP", output):
        return Line("ok", "slurm", output.splitlines()[0])
    return Line(
        "warning",
        "slurm",
        f"client, but no controller: {output.splitlines()[0] if output else 'no answer'}",
        "on a cluster, ask its administrator; elsewhere this does not matter",
    )


def memory_line(found: Found) -> Line:
    total, free, cores = found["memory"], found["available"], found["facts"].get("cores", "unknown")
    value = f"{total / GIB:.1f} GiB, {cores} cores"
    if free is not None:
        free = min(free, total)
        value = f"{total / GIB:.1f} GiB, {free / GIB:.1f} of it free, {cores} cores"
        # Two ranks of the quickstart with torch and DeepSpeed loaded take about 2 GiB.
        if free < 4 * GIB:
            remedy = "end other programs, or use a larger machine or job (sbatch --mem)"
            return Line("error" if free < GIB else "warning", "memory", value, remedy)
    return Line("ok", "memory", value)


def shm_line(found: Found) -> Line:
    size = found["shm"]
    if size is None:
        return Line("warning", "/dev/shm", "does not exist", "mount it: ranks of one host exchange tokens through it")
    value = f"{size / GIB:.1f} GiB"
    if size < GIB:
        return Line(
            "warning", "/dev/shm", f"{value}: ranks of one host exchange tokens through it", "docker run --ipc=host"
        )
    return Line("ok", "/dev/shm", value)


def open_files_line(found: Found) -> Line:
    limit = found["open_files"]
    if 0 <= limit < 1024:
        status, remedy = ("error" if limit < 128 else "warning"), "ulimit -n 4096"
        return Line(status, "open files", f"at most {limit}", remedy)  # type: ignore[arg-type]
    return Line("ok", "open files", "no limit" if limit < 0 else f"at most {limit}")


def clock_line(found: Found, with_hostfile: bool) -> Line:
    value = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found["time"]))
    if found["clock"] == "no":
        value += ", not synchronised"
        if with_hostfile:
            return Line("warning", "clock", value, "start an NTP service (chrony, systemd-timesyncd) on every host")
    return Line("ok", "clock", value + (", synchronised" if found["clock"] == "yes" else ""))


def port_line(found: Found) -> Line:
    port = found["port"]
    name = f"MASTER_PORT {port['number']}" if port["chosen"] else f"{port['number']}, the launchers' default"
    if port.get("error"):
        return Line(
            "error",
            "port",
            f"MASTER_PORT {port['number']!r} {port['error']}",
            "unset MASTER_PORT, or export MASTER_PORT=29501",
        )
    if port["free"]:
        return Line("ok", "port", f"{name}, is free")
    holder = port["holder"] or "an unknown process"
    remedy = "export MASTER_PORT=29501" if port["chosen"] else "with deepspeed or torchrun by hand: --master_port 29501"
    return Line("error" if port["chosen"] else "warning", "port", f"{name}, is held by {holder}", remedy)


def folder_line(name: str, folder: Found) -> Line:
    what = f"folder {name}"
    if "error" in folder:
        remedy = "check with `mount` and `df` that its file system is mounted and its server is up"
        return Line("error", what, folder["error"], remedy)
    if "refused" in folder:
        return Line(
            "error",
            what,
            f"cannot be written: {folder['refused']}",
            "choose another folder, free some space, or get write permission",
        )
    value = f"{'' if folder['exists'] else 'will be created; '}{folder['type']}, {folder['free'] / GIB:.0f} GiB free"
    if folder["type"] in NETWORK:
        value += ", a network file system, which other hosts can see"
    if folder["free"] < 10 * GIB:
        value = value.replace(f"{folder['free'] / GIB:.0f} GiB", f"{folder['free'] / GIB:.1f} GiB")
        remedy = "free some space, or choose another folder: a checkpoint takes 12 to 16 bytes per parameter"
        return Line("error" if folder["free"] < GIB / 4 else "warning", what, value, remedy)
    if folder["type"] in ("tmpfs", "ramfs", "overlay"):
        gone = "the container" if folder["type"] == "overlay" else "a restart"
        return Line("warning", what, f"{value}: lost with {gone}", "use a folder on a disk or a mounted volume")
    return Line("ok", what, value)
