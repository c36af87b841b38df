"""Merge models in several processes: mpirun -n 4 python launch/ccm_merge.py configs/merge/example.yaml"""

import sys

from shodh_moe.runs.merge_rank import main

if __name__ == "__main__":
    sys.exit(main())
