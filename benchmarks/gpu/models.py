"""Measure whole networks by their workloads: forwards, samples, steps, the profile, probes."""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import replace
from functools import partial

import networks
import torch
from methods.bench_methods import FORMULATION, on_gpu, on_policy, pretrain
from model.bench_model import attention_choices, forward
from sampling.bench_sampling import COMPILED, DIFFUSERS, loops
from timing import OURS, Step, captured, difference
from workloads import COMPILE, TOLERANCES, Contest

from gpu import kernels
from gpu.run import DeviceRun, Skip
from gpu.sections import FORWARD

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
        self._time([OURS], alone)

    def add(self, name: str) -> None:
        """Make a peer, compare its result with ours, and time it beside ours."""
        result = self._make(name)
        if name not in self.steps:
            return
        distance = difference(self.expected, result)
        self.run.put(f"{name}: relative difference from ours", distance)
        if not distance <= TOLERANCES[self.run.dtype]:  # NaN too
            self.problems[name] = f"differs from ours by {distance:.1e}"
        self._time([OURS, name], self.rounds)

    def _time(self, names: list[str], rounds: int) -> None:
        """Time steps and record them; ours beside a compiled peer under a name of its own."""
        steps = {name: self.steps[name] for name in names}
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
        failed = []
        for name, problem in self.problems.items():
            if "ms" not in self.run.get(name, {}):  # else it ran before, which is kept
                self.run.put(name, {"error": problem})
            if name == OURS or not problem.startswith("OutOfMemoryError"):
                failed.append(f"{name}: {problem}")
        if failed:
            self.run.fail("; ".join(failed))

    def _make(self, name: str) -> object:
        """Make a step and return its result; it is warm afterwards, and its gradients exist."""

        def make() -> object:
            step = self.contest.makers[name]()
            result = step()
            step()
            self.steps[name] = step
            return result

        before = self._allocated()
        result = self.run.attempt(self.problems, name, make)
        self.held[name] = self._allocated() - before
        return result

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.run.device) if self.run.cuda else 0


def run_forward(run: DeviceRun, name: str) -> None:
    """Time ours, then diffusers' eager and compiled.

    The short plan leaves out the compiled one at 14B, which takes longer to compile than all else.
    """
    size, problem = run.sizes[name], networks.peer_problem()
    run.put("parameters", size.parameters)
    chosen, default = attention_choices(size, run.device)
    run.put("attention", {"ours": chosen, "torch": default})
    rounds = 8 if name == "1.3B" else 4
    record = ContestRecord(run, forward(size, run.place), rounds, alone=3, reserve_s=5.0)
    if problem is not None:
        run.put("peers", problem)
    else:
        record.add(DIFFUSERS)
        if run.short and name == "14B":
            run.put(COMPILED, {"skipped": "not in the short plan"})
        elif not run.affords(COMPILE_S[name]):
            run.put(COMPILED, {"skipped": "budget"})
        else:
            record.add(COMPILED)
    record.end()


def run_training(run: DeviceRun, method: str) -> None:
    """Time a training step of 1.3B, ours and the peers' formulation."""
    build = pretrain if method == "pretrain" else partial(on_policy, ("generator", "critic"))
    contest = build(on_gpu(run.sizes["1.3B"]), run.place)
    record = ContestRecord(run, contest, rounds=3, alone=1, reserve_s=25.0)
    problem = networks.peer_problem()
    if problem is None:
        record.add(FORMULATION)
    else:
        run.put(FORMULATION, {"skipped": problem})
    record.end()


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
    _time_graph(run, step, {"launched": step}, "CUDA graph", rounds=8)


def _time_graph(
    run: DeviceRun, step: Step, steps: dict[str, Step], graph: str, rounds: int, **known: object
) -> None:
    """Time steps beside a CUDA graph of one, with what is known of it in its entry."""
    if not run.cuda:
        run.put(graph, {"skipped": "needs a GPU"})
    problems: dict[str, str] = {}
    replayed = run.attempt(problems, graph, lambda: captured(step)) if run.cuda else None
    steps = steps | ({} if replayed is None else {graph: replayed})
    timed = run.time(steps, rounds, problems, reserve_s=5.0)
    for name in timed.steps:
        peak = {"peak_bytes": timed.peaks.get(name)}
        run.put(name, (known if name == graph else {}) | timed.milliseconds(name) | peak)
    for name, problem in problems.items():
        run.put(name, {"error": problem})
        run.fail(f"{name}: {problem}")


def categorize(kernel: str) -> str:
    """Return the category of a kernel's name."""
    found = (name for name, pattern in CATEGORIES if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other")


# Probes -------------------------------------------------------------------------------------------

COPIES = tuple(mebibytes * 2**20 for mebibytes in (32, 96, 2048))  # and those of the limits
HOST = "host 1.3B, one frame"


def run_probes(run: DeviceRun) -> None:
    """Measure what decides whether caches and launches matter: copies by size, and a short forward.

    The forward is of one latent frame: few tokens leave the device waiting for the host, which a
    video of full length hides. It is launched, replayed as a graph, and timed until the host has
    enqueued it. Layouts of attention, padded tokens, epilogues and joined products were probed on
    an H200 and are answered: ``benchmarks/results`` has them.
    """
    kernels.put_copies(run, COPIES)
    if not run.affords(8.0):
        raise Skip("budget: copies alone")
    run.require_right_kernels(FORWARD)
    size = run.sizes["1.3B"]
    step = forward(replace(size, latents=(1, *size.latents[1:])), run.place).makers[OURS]()
    step()
    put_step_and_graph(run, step, HOST)


def put_step_and_graph(run: DeviceRun, step: Step, name: str) -> None:
    """Time a warm step as it is launched, until the host has enqueued it, and as a CUDA graph."""
    launched, samples = f"{name}: launched", []
    for _ in range(5):
        if run.cuda:
            torch.cuda.synchronize()  # nothing is left to do on the device
        started = time.perf_counter()
        step()
        samples.append((time.perf_counter() - started) * 1e3)
    enqueued = {"against": launched, "ms": statistics.median(samples), "samples_ms": samples}
    run.put(f"{name}: until enqueued", enqueued)
    _time_graph(run, step, {launched: step}, f"{name}: CUDA graph", rounds=5, against=launched)
