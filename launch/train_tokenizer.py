"""Train a config's tokenizer: python launch/train_tokenizer.py --config configs/quickstart.yaml"""

import sys

from shodh_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", "train", *sys.argv[1:]]))
