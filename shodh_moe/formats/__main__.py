"""The worker process of `shodh_moe.formats.worker`: ``python -m shodh_moe.formats FD``."""

from __future__ import annotations

import sys

from shodh_moe.formats.worker import serve

if __name__ == "__main__":
    serve(int(sys.argv[1]))
