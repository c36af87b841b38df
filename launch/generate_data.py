"""Generate a config's dataset: python launch/generate_data.py --config configs/quickstart.yaml

For many cores or hosts: mpirun -n 64 python launch/generate_data.py ..., or in separate jobs, each with a part of the
trajectories: --part 0 --of 16
"""

import sys

from shodh_moe.runs.generate_data import main

if __name__ == "__main__":
    sys.exit(main())
