"""Run a module or a script as the runner does: with this checkout's package, under a parent.

``python -m gpu.child gpu.check_part --device cpu`` or
``python -m gpu.child benchmarks/tune_rows.py --seconds 60``, with ``benchmarks`` on Python's path.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Prepare the process, then run what the first argument names with the others."""
    from gpu import build, without_diffusers
    from gpu.state import die_with_parent

    die_with_parent()
    what, arguments = sys.argv[1], sys.argv[2:]
    device = arguments[arguments.index("--device") + 1] if "--device" in arguments else "cuda"
    build.find_package(device)
    without_diffusers.install()
    build.load_operators()
    sys.argv = [what, *arguments]
    if what.endswith(".py"):
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
