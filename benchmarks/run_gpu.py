"""The GPU evidence in one command: ``python benchmarks/run_gpu.py [--out DIR]`` from a checkout.

Needs PyTorch >= 2.9 and Triton >= 3.4; what diffusers, pytest, nvcc or FlashAttention would add is left out, and said
so, where they are not installed. In order of importance, each section isolated from the others and only started while
it fits the budget:

1. builds the extension, where there is an nvcc, and runs the operator tests on the device: a wrong kernel is not timed;
2. the limits of the device: bf16 matrix products, a copy;
3. one forward at 480x832, 81 frames: 1.3B, every attention backend, every operator, 14B; against diffusers, eager and
   compiled, with the attention that each would take and with the same one;
4. sampling at 1, 4, 8 and 50 steps; pretrain and on-policy steps at 1.3B, against the peers' formulation;
5. where the time of a forward goes, native CUDA kernels against Triton's.

``DIR/<device>.json`` is rewritten after every measurement, with raw samples, versions, clocks and the commit: a run
that is killed keeps what it has, and the next one with the same sources goes on (``--only`` measures again, ``--fresh``
starts anew). ``make perf-docs`` turns it into a page. Exit status: 1 if a section failed, 2 without a GPU. ``--device
cpu --tiny`` proves the code without one; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

ORDER = (
    "build",
    "tests",
    "limits",
    "forward_1.3b",
    "attention",
    "ops",
    "forward_14b",
    "sampling_1.3b",
    "sampling_14b",
    "pretrain_1.3b",
    "on_policy_1.3b",
    "profile_1.3b",
    "native",
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; default benchmarks/results")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds after which no section is started")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to prove the code")
    parser.add_argument("--only", default="", help=f"sections whose name contains this; of {', '.join(ORDER)}")
    parser.add_argument("--skip-tests", action="store_true", help="leave out the operator tests")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an earlier run of the same sources")
    for internal in ("--worker", "--deadline", "--sections", "--parent"):  # what a run starts itself with
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the published sizes take hours there")
    if options.out is None:
        if options.tiny and options.worker is None:
            parser.error("--tiny needs --out DIR: its times are no results")
        options.out = Path(__file__).resolve().parent / "results"
    if not any(options.only in name for name in ORDER):
        parser.error(f"--only {options.only!r} is in the name of no section: {', '.join(ORDER)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure; see the module's docstring for the exit status."""
    options = parse(arguments)
    if options.worker is not None:
        from gpu.worker import work

        names = options.sections.split(",")
        deadline, parent = float(options.deadline), int(options.parent)
        return work(Path(options.worker), options.device, options.tiny, deadline, names, parent)
    from gpu.supervisor import Options, supervise

    names = [name for name in ORDER if options.only in name and not (options.skip_tests and name == "tests")]
    chosen = Options(
        out=options.out,
        device=options.device,
        tiny=options.tiny,
        budget_s=options.budget_s,
        only=options.only,
        skip_tests=options.skip_tests,
        fresh=options.fresh,
    )
    return supervise(chosen, names)


if __name__ == "__main__":
    sys.exit(main())
