"""Make the targets of merge configs in several processes, like `shodh merge sweep`.

mpirun -n 4 python launch/ccm_merge.py configs/merge/example.yaml
srun -n 4 python launch/ccm_merge.py a.yaml b.yaml --output swept         see launch/slurm/ccm_merge.sbatch
"""

import sys

from shodh_moe.runs.merge_rank import main

if __name__ == "__main__":
    sys.exit(main())
