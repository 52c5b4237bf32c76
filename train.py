"""Train a GPT: ``python train.py [CONFIG.toml] [--group.field VALUE ...]``. The default is
configs/shakespeare.toml.
"""

import sys

from gpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], prog="train.py"))
