"""Train the tokenizer, in a single process or as one of many ranks, with any launcher.

python launch/train_tokenizer.py --config C                     one process
deepspeed --num_gpus 8 launch/train_tokenizer.py --config C     eight ranks on this host
srun python launch/train_tokenizer.py --config C                and the other launchers in launch/pretrain.py

The data must exist; `shodh data generate --config C` generates them.
"""

from shodh_moe.base.command import end_rank
from shodh_moe.cli import main as shodh
from shodh_moe.runs.rank import script_main
from shodh_moe.runs.tokenizer_rank import main as train

if __name__ == "__main__":
    end_rank(lambda: script_main(lambda arguments: shodh(["tokenizer", "train", *arguments]), train))
