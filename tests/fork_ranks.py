"""Run a script on every rank of a world: ``fork_ranks.py WORLD SCRIPT ARGUMENT...``.

The ranks are forks of one process that has imported what the script imports, which takes longer
than most scripts. They have the environment that torchrun gives.
"""

import ctypes
import os
import runpy
import signal
import sys
import traceback

PR_SET_PDEATHSIG = 1


def fork(script: str, rank: int, world: int) -> int:
    """Start the rank and return its process id; on Linux it dies with this process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(world: int, script: str, *arguments: str) -> int:
    """Return 0 if all ranks do; those that lose a rank end by themselves."""
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script)
    sys.argv = [script, *arguments]
    ranks = [fork(script, rank, world) for rank in range(world)]
    return max(os.waitpid(child, 0)[1] != 0 for child in ranks)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
