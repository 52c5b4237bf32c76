"""``make soak``: twenty runs killed at random instants, and every fault that a disk can have in one
run; exits with 1 if one of them ended otherwise.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.soak import runs


def serve(folder: Path, what: str, **options: int) -> list[str]:
    """One kind of work in a process of its own."""
    return runs.serve(folder, {what: options})[what]


def main() -> int:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if runs.build(Path(folder)) is None:
            print("needs Linux and a C compiler")
            return 1
        hits, whole, *killed = serve(Path(folder), "kill", n_runs=20, kills=4)
        same = sum(digest == whole for digest in killed)
        print(f"{hits} kills at random instants: {same} of {len(killed)} runs ended as one without")
        print(f"  {whole}: weights, optimizers, progress, metrics, pointers", flush=True)
        shutil.rmtree(folder)
        Path(folder).mkdir()
        told, *problems = serve(Path(folder), "inject")
        print(told)
        n = int(told.split()[0])
        print(
            f"{n - len(problems)} of {n} left every checkpoint whole, and the run went on as ever"
        )
        told, *sharded = serve(Path(folder), "inject_sharded")
        n = int(told.split()[0])
        print(f"of a sharded checkpoint, {told}")
        print(f"{n - len(sharded)} of {n} left it whole or not there, and the one before it whole")
        for problem in (*problems, *sharded):
            print(f"  {problem}")
        print(f"{time.monotonic() - start:.0f} s")
    return int(bool(problems or sharded) or same < len(killed))


if __name__ == "__main__":
    sys.exit(main())
