"""Continue a prompt: ``python sample.py --model runs/shakespeare --prompt "ROMEO:"``."""

import sys

from gpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]], prog="sample.py"))
