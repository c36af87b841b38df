"""Script of test_merge: merge under a memory limit and print the process's peak resident memory in bytes."""

from __future__ import annotations

import resource
import sys

from shodh_moe.runs.merge_rank import main

code = main(sys.argv[1:])
# On Linux, ru_maxrss of a child starts at its parent's peak, while exec resets VmHWM.
with open("/proc/self/status") as status:
    lines = dict(line.split(":", 1) for line in status)
peak = (
    int(lines["VmHWM"].split()[0]) * 1024
    if "VmHWM" in lines
    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
)
print(peak)
sys.exit(code)
