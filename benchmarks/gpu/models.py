"""Measure whole networks by their workloads: forwards, samples, training steps, the profile."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import networks
import torch
from methods.bench_methods import on_gpu, on_policy, pretrain
from model.bench_model import attention_choices, forward
from sampling.bench_sampling import DIFFUSERS, loops
from timing import OURS, Step, captured, difference
from workloads import COMPILE, TOLERANCES, Contest

from gpu.run import DeviceRun

STEPS = (1, 4, 8, 50)
RESERVED_S = 150.0  # for the sections that follow: 50 steps are measured only if this is left
SECONDS_PER_STEP = {"1.3B": 0.5, "14B": 2.8}
COMPILE_S = {"1.3B": 60.0, "14B": 80.0}


class ContestRecord:
    """Time a contest's steps beside each other into a section; what raises costs no other step.

    A peak is without what the other steps hold meanwhile, such as networks and gradients of theirs.

    Args:
        run: of the section.
        contest: its weights are shared, or each step's own.
        rounds: beside each other.
        alone: rounds of ours before the peers exist.
        reserve_s: seconds that must be left before each further round.
    """

    def __init__(
        self, run: DeviceRun, contest: Contest, rounds: int, alone: int, reserve_s: float
    ) -> None:
        self.run, self.contest, self.rounds, self.reserve_s = run, contest, rounds, reserve_s
        self.steps: dict[str, Step] = {}
        self.held: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        self.expected = self._make(OURS)
        if OURS not in self.steps:
            self.end()
            raise RuntimeError(self.problems[OURS])
        # before anything of the others can fail; measured again beside them
        self.time(self.steps, alone)

    def add(self, names: list[str]) -> None:
        """Make peers, compare their results with ours, and time them beside ours."""
        for name in names:
            result = self._make(name)
            if name in self.steps:
                distance = difference(self.expected, result)
                self.run.put(f"{name}: relative difference from ours", distance)
                if not distance <= TOLERANCES[self.run.dtype]:  # NaN too
                    self.problems[name] = f"differs from ours by {distance:.1e}"
        if len(self.steps) > 1:
            self.time(self.steps, self.rounds)

    def add_beside_ours(self, name: str) -> None:
        """Do the same for one peer, which is timed with ours alone: a later pair of times."""
        before, self.steps = self.steps, {OURS: self.steps[OURS]}
        self.add([name])
        self.steps = before

    def time(self, steps: Mapping[str, Step], rounds: int) -> None:
        """Time steps and record them; ours beside a compiled peer under a name of its own."""
        timed = self.run.time(steps, rounds, self.problems, reserve_s=self.reserve_s)
        compiled = next((name for name in steps if COMPILE in name), None)
        for name in timed.steps:
            peak = timed.peaks.get(name)
            if peak is not None:
                peak -= sum(held for other, held in self.held.items() if other != name)
            entry = timed.milliseconds(name) | {"peak_bytes": peak}
            beside = name == OURS and compiled is not None
            self.run.put(f"{OURS}, beside {compiled}" if beside else name, entry)

    def end(self) -> None:
        """Record the problems; the section fails for all but a peer that was out of memory."""
        for name, problem in self.problems.items():
            if "ms" not in self.run.get(name, {}):  # else it ran before, which is kept
                self.run.put(name, {"error": problem})
        failed = {
            name: problem
            for name, problem in self.problems.items()
            if name == OURS or not problem.startswith("OutOfMemoryError")
        }
        if failed:
            self.run.fail("; ".join(f"{name}: {problem}" for name, problem in failed.items()))

    def _make(self, name: str) -> object:
        """Make a step and return its result; it is warm afterwards, and its gradients exist."""
        before = self._allocated()
        step = self.run.attempt(self.problems, name, self.contest.makers[name])
        if step is None:
            return None
        result = self.run.attempt(self.problems, name, step)
        if name not in self.problems:
            self.run.attempt(self.problems, name, lambda: [step()].clear())
        if name not in self.problems:
            self.steps[name], self.held[name] = step, self._allocated() - before
        return result

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.run.device) if self.run.cuda else 0


def run_forward(run: DeviceRun, name: str) -> None:
    """Time ours, then diffusers' eager and compiled: with its own attention, with the same as ours.

    The short plan leaves out the compiled one at 14B, which takes longer to compile than all else.
    """
    size = run.sizes[name]
    contest = forward(size, run.place)
    run.put("parameters", size.parameters)
    chosen, default = attention_choices(size, run.device)
    run.put("attention", {"ours": chosen, "torch": default})
    comparison = ContestRecord(
        run, contest, rounds=8 if name == "1.3B" else 4, alone=3, reserve_s=5.0
    )
    peers = [peer for peer in contest.makers if peer != OURS]
    problem = networks.peer_problem()
    if problem is not None:
        run.put("peers", problem)
        peers = [peer for peer in peers if not peer.startswith(DIFFUSERS)]
    comparison.add([peer for peer in peers if COMPILE not in peer])
    for peer in peers:
        if COMPILE not in peer:
            continue
        if run.short and name == "14B":
            run.put(peer, {"skipped": "not in the short plan"})
        elif not run.affords(COMPILE_S[name]):
            run.put(peer, {"skipped": "budget"})
        else:
            comparison.add_beside_ours(peer)
    comparison.end()


def run_training(run: DeviceRun, method: str) -> None:
    """Time a training step of 1.3B, ours and the peers' formulation."""
    plan = on_gpu(run.sizes["1.3B"])
    build: Callable[..., Contest] = (
        pretrain if method == "pretrain" else partial(on_policy, ("generator", "critic"))
    )
    contest = build(plan, run.place)
    comparison = ContestRecord(run, contest, rounds=3, alone=1, reserve_s=25.0)
    peer, problem = next(name for name in contest.makers if name != OURS), networks.peer_problem()
    if problem is None:
        comparison.add([peer])
    else:
        run.put(peer, {"skipped": problem})
    comparison.end()


# Sampling -----------------------------------------------------------------------------------------


def run_sampling(run: DeviceRun, name: str) -> None:
    """Time whole samples of 1, 4, 8 and 50 steps; 50 from the others if they do not fit."""
    contest, problems = loops(run.sizes[name], run.place), dict[str, str]()
    problem = networks.peer_problem()
    if problem is not None:
        run.put("peers", problem)
    contest(1).makers[OURS]()()  # warm
    for steps in STEPS:
        seconds, key = steps * SECONDS_PER_STEP[name], f"{OURS} NFE {steps}"
        if not run.affords(seconds + (RESERVED_S if steps == 50 else 0.0)):
            run.put(key, extrapolated(run, steps))
            continue
        built, wanted = contest(steps), [OURS]
        if problem is None and steps <= 4 and run.affords(3 * seconds + 2):
            wanted.append(DIFFUSERS)
        for who in wanted:
            made = run.attempt(problems, who, built.makers[who])
            timed = run.time({} if made is None else {who: made}, 1, problems)
            key = f"{who} NFE {steps}"
            if who in timed.steps:
                run.put(key, _sampled(timed.milliseconds(who), timed.peaks.get(who)))
                continue
            run.put(key, {"error": problems[who]})
            if who == OURS or not problems[who].startswith("OutOfMemoryError"):
                run.fail(f"{who}: {problems[who]}")
            problem = problems[who]  # the peer is not asked again


def _sampled(measured: dict[str, object], peak: int | None) -> dict[str, object]:
    return {"ms": measured["ms"], "peak_bytes": peak, "extrapolated": False}


def extrapolated(run: DeviceRun, steps: int) -> dict[str, object]:
    """Compute a sample from the two longest that were measured, and say so."""
    entries = {n: run.get(f"{OURS} NFE {n}", {}) for n in STEPS}
    known = [n for n in STEPS if n < steps and entries[n].get("extrapolated") is False]
    if len(known) < 2:
        return {"skipped": "budget"}
    few, many = known[-2:]
    each = (entries[many]["ms"] - entries[few]["ms"]) / (many - few)
    return {
        "ms": entries[many]["ms"] + (steps - many) * each,
        "peak_bytes": None,
        "extrapolated": True,
        "source": f"extrapolated from the measured samples of {few} and {many} steps",
    }


# Profile ------------------------------------------------------------------------------------------

# Kernels by their names, the first that matches; what nothing matches is "other".
CATEGORIES = (
    ("attention", r"flash|fmha|attention|sdpa|cudnn_generated|bmm|softmax"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|matmul|addmm|aten::mm|linear"),
    ("norms, rotary, residuals", r"layer_norm|rms_norm|gated_residual|residual|dual_timestep"),
    (
        "element-wise, copies",
        r"elementwise|copy|cat|fill|mul|add|gelu|silu|cos|sin|reduce|memcpy|memset",
    ),
)


def run_profile(run: DeviceRun) -> None:
    """Measure every kernel of one forward at 1.3B, by category and name, and it as a CUDA graph."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step = forward(run.sizes["1.3B"], run.place).makers[OURS]()
    step()
    problems: dict[str, str] = {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.cuda else [])]
    with profile(activities=activities) as profiler:
        wall = run.time({"wall": step}, 1, problems).milliseconds("wall")["ms"]
    attribute = "self_device_time_total" if run.cuda else "self_cpu_time_total"
    # an operator's line repeats its kernels' time
    wanted = DeviceType.CUDA if run.cuda else DeviceType.CPU
    averages = [e for e in profiler.key_averages() if e.device_type == wanted]
    kernels = [(e.key, getattr(e, attribute) / 1e3, e.count) for e in averages]
    kernels = sorted((k for k in kernels if k[1] > 0), key=lambda k: -k[1])
    shares: dict[str, float] = {}
    for key, milliseconds, _ in kernels:
        shares[categorize(key)] = shares.get(categorize(key), 0.0) + milliseconds
    listed = [{"name": key[:120], "ms": ms, "count": count} for key, ms, count in kernels[:30]]
    for name, value in (("ms_by_category", shares), ("wall_ms", wall), ("kernels", listed)):
        run.put(name, value)
    if not run.cuda:
        run.put("CUDA graph", {"skipped": "needs a GPU"})
        return
    graph = run.attempt(problems, "CUDA graph", lambda: captured(step))
    steps = {"launched": step} | ({} if graph is None else {"CUDA graph": graph})
    timed = run.time(steps, 8, problems, reserve_s=5.0)
    for name in timed.steps:
        run.put(name, timed.milliseconds(name) | {"peak_bytes": timed.peaks.get(name)})
    for name, problem in problems.items():
        run.put(name, {"error": problem})
        run.fail(f"{name}: {problem}")


def categorize(kernel: str) -> str:
    """Return the category of a kernel's name."""
    found = (name for name, pattern in CATEGORIES if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other")
