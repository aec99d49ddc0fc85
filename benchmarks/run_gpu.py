"""Measure the library on a GPU: ``python benchmarks/run_gpu.py [--plan short] [--out DIR]``.

The command runs from a checkout, which need not be installed and where only build/ is written to.
It needs PyTorch >= 2.9 and Triton >= 3.4; what diffusers, pytest, nvcc or FlashAttention would add
is left out, with the reason, where it is missing. What is timed are the workloads of
``pytest benchmarks`` for GPUs, and at 14B the same.

The short plan is for a card that is lent for a quarter of an hour, in two calls on one machine:

    python benchmarks/run_gpu.py --plan short --budget-s 345 --out DIR
    python benchmarks/run_gpu.py --plan short --budget-s 330 --out DIR

The first call does, in order of importance: build the extension, if nvcc is found; check on
the device, by processes side by side, that kernels, attention and a small network are right;
measure what the device reaches in products and copies; 1.3B against diffusers, eager and compiled;
attention; the causal model at 1.3B; sampling at 14B; one forward at 14B. The second call adds
pretrain steps of both models, every operator, a profile of kernels, native kernels against
Triton's, launch options of the row kernels (benchmarks/tune_rows.py), probes of launches and
copies, and the operators' tests last. What did not fit the first call is done in the second. The
full plan adds sampling and on-policy steps at 1.3B, diffusers' compiled transformer at 14B and of
the causal model compiled blocks and diffusers' compiled training.

A kernel with wrong numbers is not timed, and a network that runs it is not either; everything else
is. What the checks find wrong of a network is printed last, is in the results under "warnings", and
stops nothing. A failing test skips no network.

DIR/<device>.json is rewritten after every measurement, with raw samples, versions, clocks and the
commit, and so is a copy in build/gpu-runner (or in $ANYFLOW_GPU_RUNNER). A run that is killed keeps
what it has, and the next one with the same sources, device and torch resumes, from the copy if DIR
was emptied; --only measures again, --fresh starts anew. `make perf-docs` turns committed files into
a page.

On a machine without network: carry the checkout and diffusers' wheel, unpacked into a folder of
PYTHONPATH; set ANYFLOW_COMMIT to `git rev-parse HEAD` if the checkout is a copy without its
repository. An extension that was built for that machine's Python and torch may be carried in
build/gpu-runner/anyflow, and is used if it loads; ANYFLOW_CMAKE_ARGS are arguments for a build.

Exit status: 1 if a section failed or a check found something wrong, 2 without a GPU or for a
mistake. ``--device cpu --tiny`` proves the code without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

SHORT = (
    *("build", "checks", "limits", "forward_1.3b", "attention", "causal_1.3b", "sampling_14b"),
    *("forward_14b", "pretrain_1.3b", "pretrain_causal_1.3b", "ops", "profile_1.3b", "native"),
    *("tune_rows", "probes", "tests"),
)
ORDER = (
    *("build", "checks", "limits", "forward_1.3b", "attention", "ops", "causal_1.3b"),
    *("sampling_1.3b", "sampling_14b", "forward_14b", "pretrain_1.3b", "pretrain_causal_1.3b"),
    *("profile_1.3b", "native", "on_policy_1.3b", "tune_rows", "probes", "tests"),
)
PLANS = {"short": SHORT, "full": ORDER}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; ``names`` are the sections that it asks for, in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--plan", default="full", choices=tuple(PLANS), help="which sections, in which order")
    add("--out", type=Path, help="folder of the results; default benchmarks/results")
    budget = "seconds after which no section is started"
    add("--budget-s", type=float, default=540.0, help=budget)
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="tiny shapes, to prove the code")
    add("--only", default="", help=f"sections whose name contains this; of {', '.join(ORDER)}")
    skip = "leave out a section; repeatable"
    add("--skip", action="append", default=[], metavar="NAME", help=skip)
    fresh = "keep nothing of an earlier run of the same sources"
    add("--fresh", action="store_true", help=fresh)
    # what a run starts itself with
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        return options
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the published sizes take hours there")
    if options.out is None:
        if options.tiny:
            parser.error("--tiny needs --out DIR: its times are no results")
        options.out = Path(__file__).resolve().parent / "results"
    unknown = [name for name in options.skip if name not in ORDER]
    if unknown:
        parser.error(f"--skip {unknown[0]!r} is no section: {', '.join(ORDER)}")
    # what is asked for by name is in any plan
    plan = ORDER if options.only else PLANS[options.plan]
    options.names = [name for name in plan if options.only in name and name not in options.skip]
    if not options.names:
        parser.error(
            f"--only {options.only!r} is in the name of no section that is left: {', '.join(ORDER)}"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure; see the module's docstring for the exit status."""
    options = parse(arguments)
    from gpu.supervisor import Options, WorkOrder, supervise

    if options.worker is not None:
        from gpu.worker import work

        return work(WorkOrder(**json.loads(options.worker)))
    chosen = Options(
        out=options.out.resolve(),
        device=options.device,
        tiny=options.tiny,
        budget_s=options.budget_s,
        only=options.only,
        short=options.plan == "short",
        fresh=options.fresh,
    )
    return supervise(chosen, options.names)


if __name__ == "__main__":
    sys.exit(main())
