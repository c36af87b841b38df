"""Generate a config's dataset: python launch/generate_data.py --config configs/quickstart.yaml"""

import sys

from shodh_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
