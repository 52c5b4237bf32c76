"""``python -m gpt``: the command line, as ``gpt`` runs it."""

import sys

from gpt.cli import main

sys.exit(main())
