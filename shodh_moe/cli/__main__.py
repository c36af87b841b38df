"""Run ``shodh`` as ``python -m shodh_moe.cli``."""

import sys

from shodh_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
