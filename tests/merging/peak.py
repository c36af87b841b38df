"""Script of test_merge: a merge under a memory limit; prints the peak resident memory of the process in bytes."""

from __future__ import annotations

import resource
import sys

from shodh_moe.runs.merge_rank import main

code = main(sys.argv[1:])
# Linux starts the count of a child at the peak of the process that started it: VmHWM begins anew with exec.
with open("/proc/self/status") as status:
    lines = dict(line.split(":", 1) for line in status)
peak = (
    int(lines["VmHWM"].split()[0]) * 1024
    if "VmHWM" in lines
    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
)
print(peak)
sys.exit(code)
