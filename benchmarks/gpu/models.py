"""Measures one forward of a network, sampling, and where its time goes; ours and diffusers' on the
same weights.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from itertools import pairwise
from typing import Any

import timing
import torch
from torch.nn.attention import SDPBackend

from anyflow.models import attention_report, use_attention_backend
from anyflow.models.attention import ATTENTION_BACKENDS
from gpu import networks
from gpu.context import Context, last_line
from gpu.networks import Inputs
from gpu.sizes import Size

# relative difference of two forwards' outputs
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}


def run_forward(context: Context, name: str) -> None:
    """Time ours, then diffusers' eager and compiled: with its own attention, with the best it can
    use, with the same.

    The short plan leaves out the compiled one at 14B, which takes longer to compile than all else.
    """
    size = context.sizes[name]
    ours = networks.build(context, size)
    data = networks.inputs(context, size)
    context.put("parameters", sum(p.numel() for p in ours.parameters()))
    chosen, default = _attention_choices(context, size)
    context.put("attention", {"ours": chosen, "torch": default})
    steps: dict[str, timing.Step] = {"ours": _forward(ours, data.ours())}
    expected = steps["ours"]()
    timing.once(steps["ours"], context.device)
    rounds = 2 if context.tiny else (8 if name == "1.3B" else 4)
    # before anything of the others can go wrong; measured again beside them
    _record(context, steps, min(rounds, 3))
    if chosen != default and default in ATTENTION_BACKENDS:
        steps["ours, torch's attention"] = _forward(ours, data.ours(), attention=default)
    problem, problems = networks.peer_problem(), dict[str, str]()
    if problem is None:
        problems = _add_peers(
            context, size, ours, data, steps, chosen if chosen != default else None
        )
    else:
        context.put("peers", problem)
    compiling = {n: s for n, s in steps.items() if "compile" in n}
    measured = {n: s for n, s in steps.items() if n not in compiling}
    problems |= _warm_all(context, measured, expected)
    problems |= _record(context, measured, rounds)
    for variant in compiling:  # each beside ours again: what is interleaved can be compared
        if context.short and name == "14B":
            context.put(variant, {"skipped": "not in the short plan"})
            continue
        if not context.affords(60.0 if name == "1.3B" else 80.0):
            context.put(variant, {"skipped": "budget"})
            continue
        beside = {variant: compiling[variant]}
        problems |= _warm_all(context, beside, expected)
        if beside:  # else it failed
            problems |= _record(context, {"ours": steps["ours"], **beside}, rounds, beside=variant)
    own = {n: p for n, p in problems.items() if not p.startswith("OutOfMemoryError")}
    if own:
        context.fail("; ".join(f"{n}: {p}" for n, p in own.items()))


def _attention_choices(context: Context, size: Size) -> tuple[str, str]:
    """Return the backend that our model runs, and the one that torch's own attention takes by
    itself.
    """
    report = attention_report(context.device, dtype=context.dtype, head_dim=size.head_dim)
    chosen = next((name for name, choice in report.items() if choice.chosen), "none")
    probe = torch.zeros(
        1, size.heads, 64, size.head_dim, device=context.device, dtype=context.dtype
    )
    default = SDPBackend(torch._fused_sdp_choice(probe, probe, probe))
    return chosen, default.name.removesuffix("_ATTENTION").lower()


def _forward(model: Any, arguments: tuple[Any, ...], attention: str | None = None) -> timing.Step:
    def step() -> Any:
        with torch.no_grad(), use_attention_backend(attention):
            return model(*arguments, return_dict=False)[0]

    return step


def _add_peers(
    context: Context,
    size: Size,
    ours: Any,
    data: Inputs,
    steps: dict[str, timing.Step],
    other: str | None,
) -> dict[str, str]:
    """Add diffusers' model with torch's own choice of attention, and with ``other`` where ours runs
    on another one.

    Returns:
        The problems of those that cannot be made, which are recorded.
    """
    try:
        peer = networks.build_peer(context, size, ours)
    except Exception as error:
        context.put("peers", last_line(error))
        _free(context)
        return {"diffusers": last_line(error)}
    shared = {id(tensor): tensor for tensor in (*peer.parameters(), *peer.buffers())}

    def variant(attention: str | None, compiled: bool) -> timing.Step:
        model = copy.deepcopy(peer, dict(shared))  # modules of its own, the same weights
        model.set_attention_backend(
            "native" if attention is None else networks.DIFFUSERS_ATTENTION[attention]
        )
        if compiled:  # the blocks are all of the time; one graph serves them all
            model.compile_repeated_blocks(backend="aot_eager" if context.tiny else "inductor")
        return _forward(model, data.peers())

    wanted: dict[str, tuple[str | None, bool]] = {
        "diffusers": (None, False),
        "diffusers + compile": (None, True),
    }
    if other in networks.DIFFUSERS_ATTENTION:
        wanted["diffusers, our attention"] = (other, False)
        wanted["diffusers + compile, our attention"] = (other, True)
    problems = {}
    for name, (attention, compiled) in wanted.items():
        try:
            steps[name] = variant(attention, compiled)
        except Exception as error:
            problems[name] = last_line(error)
            context.put(name, {"error": problems[name]})
    return problems


def _free(context: Context) -> None:
    """Give memory back after an error; raise if the error has broken the device."""
    if context.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _warm_all(
    context: Context, steps: dict[str, timing.Step], expected: torch.Tensor
) -> dict[str, str]:
    """Run each twice and compare with ours; what fails is taken out and recorded."""
    problems = {}
    for name, step in list(steps.items()):
        if name == "ours":
            continue
        try:
            difference = networks.relative_difference(step(), expected)  # type: ignore[arg-type]
            context.put(f"{name}: relative difference from ours", difference)
            if not difference <= TOLERANCE[context.dtype]:
                problems[name] = f"differs from ours by {difference:.1e}"
            timing.once(step, context.device)
        except Exception as error:
            problems[name] = last_line(error)
            del steps[name]
            context.put(name, {"error": problems[name]})
            _free(context)
    return problems


def _record(
    context: Context, steps: dict[str, timing.Step], rounds: int, beside: str | None = None
) -> dict[str, str]:
    """Time steps beside each other; one that raises is recorded as its error, and returned."""
    problems: dict[str, str] = {}

    def failed(name: str, error: Exception) -> None:
        problems[name] = last_line(error)
        context.put(name, {"error": problems[name]})
        _free(context)

    samples, peaks = timing.calls(
        steps, context.device, rounds, lambda: context.affords(5.0), failed
    )
    for name, values in samples.items():
        key = name if beside is None or name == beside else f"{name}, beside {beside}"
        context.put(
            key,
            {"ms": statistics.median(values), "peak_bytes": peaks.get(name), "samples_ms": values},
        )
    return problems


RESERVED_S = 150.0  # for the sections that follow: 50 steps are measured only with so much to spare


# Sampling -----------------------------------------------------------------------------------------


def run_sampling(context: Context, name: str) -> None:
    """Time the transformer in whole samples at 1, 4, 8 and 50 steps; 50 from the steps measured if
    they do not fit.
    """
    size = context.sizes[name]
    ours, data = networks.build(context, size), networks.inputs(context, size)
    problem, peer = networks.peer_problem(), None
    if problem is None:
        try:
            peer = networks.build_peer(context, size, ours)
        except Exception as error:
            problem = _peer_failed(context, error)
    if problem is not None:
        context.put("peers", problem)
    _sample(context, ours, data, 1)  # warm
    for steps in (1, 4, 8, 50):
        seconds = steps * (0.5 if name == "1.3B" else 2.8)
        if not context.affords(seconds + (RESERVED_S if steps == 50 else 0.0)):
            _extrapolate(context, steps)
            continue
        _record_sample(context, f"ours NFE {steps}", *_sample(context, ours, data, steps))
        if peer is not None and steps <= 4 and context.affords(2 * seconds + 2):
            try:
                _record_sample(
                    context, f"diffusers NFE {steps}", *_peer_sample(context, peer, data, steps)
                )
            except Exception as error:
                context.put(f"diffusers NFE {steps}", {"error": _peer_failed(context, error)})
                peer = None


def _peer_failed(context: Context, error: Exception) -> str:
    """Let the section fail unless the peer was out of memory, which is a result; return the error's
    text.
    """
    problem = last_line(error)
    if not isinstance(error, torch.OutOfMemoryError):
        context.fail(f"diffusers: {problem}")
    _free(context)
    return problem


def _sample(
    context: Context, model: Any, data: Inputs, steps: int
) -> tuple[list[float], int | None]:
    """Return the milliseconds at which each step ended, the last one that of the whole call, and
    the peak memory.
    """
    from anyflow.sampling import sample
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler

    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)

    def run(mark: Any) -> None:
        sample(
            model,
            scheduler,
            data.latents,
            data.prompt,
            num_inference_steps=steps,
            callback=lambda *_: mark(),
        )

    return _marked(context, run)


def _peer_sample(
    context: Context, model: Any, data: Inputs, steps: int
) -> tuple[list[float], int | None]:
    """Run the loop of diffusers' pipeline without guidance: a whole forward each step, text
    included.
    """
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler

    sigmas = FlowMapEulerDiscreteScheduler(shift=5.0).schedule(steps).tolist()
    frames = data.latents.shape[1]

    @torch.no_grad()
    def run(mark: Any) -> None:
        x = data.latents.float()
        for t, r in pairwise(sigmas):
            times = [torch.full((1, frames), 1000 * s, device=context.device) for s in (t, r)]
            velocity = model(x.to(context.dtype), *times, data.prompt, return_dict=False)[0]
            x = x - (t - r) * velocity.float()
            mark()

    return _marked(context, run)


def _marked(context: Context, run: Any) -> tuple[list[float], int | None]:
    """Run with a mark after each step; marks are events on a GPU, so that nothing waits for
    them.
    """
    if not context.cuda:
        moments = [time.perf_counter()]
        run(lambda: moments.append(time.perf_counter()))
        moments.append(time.perf_counter())
        return [(m - moments[0]) * 1e3 for m in moments[1:]], None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = []

    def mark() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)

    mark()
    run(mark)
    mark()
    torch.cuda.synchronize()
    return [
        events[0].elapsed_time(event) for event in events[1:]
    ], torch.cuda.max_memory_allocated()


def _record_sample(context: Context, key: str, marks: list[float], peak: int | None) -> None:
    context.put(
        key, {"ms": marks[-1], "peak_bytes": peak, "extrapolated": False, "marks_ms": marks}
    )


def _extrapolate(context: Context, steps: int) -> None:
    """Take first step and overhead as measured, the others at the median of the measured steps;
    label it so.
    """
    measured = [
        n
        for n in (50, 8, 4)
        if (context.file.get(context.name, f"ours NFE {n}") or {}).get("marks_ms")
    ]
    if not measured or context.file.get(context.name, f"ours NFE {measured[0]}")["extrapolated"]:
        context.put(f"ours NFE {steps}", {"skipped": "budget"})
        return
    marks = context.file.get(context.name, f"ours NFE {measured[0]}")["marks_ms"]
    each = [b - a for a, b in pairwise(marks[:-1])]
    total = marks[0] + (steps - 1) * statistics.median(each) + (marks[-1] - marks[-2])
    source = f"extrapolated from the {measured[0]} measured steps of NFE {measured[0]}"
    context.put(
        f"ours NFE {steps}",
        {"ms": total, "peak_bytes": None, "extrapolated": True, "source": source},
    )


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


def run_profile(context: Context) -> None:
    """Measure the time of every kernel of one forward at 1.3B, by category and by name; the same as
    a CUDA graph.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    size = context.sizes["1.3B"]
    ours, data = networks.build(context, size), networks.inputs(context, size)
    step = _forward(ours, data.ours())
    timing.once(step, context.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.cuda else [])]
    with profile(activities=activities) as profiler:
        wall, _ = timing.once(step, context.device)
    attribute = "self_device_time_total" if context.cuda else "self_cpu_time_total"
    # an operator's line repeats its kernels' time
    wanted = DeviceType.CUDA if context.cuda else DeviceType.CPU
    averages = [e for e in profiler.key_averages() if e.device_type == wanted]
    kernels = [(e.key, getattr(e, attribute) / 1e3, e.count) for e in averages]
    kernels = sorted((k for k in kernels if k[1] > 0), key=lambda k: -k[1])
    shares: dict[str, float] = {}
    for key, milliseconds, _ in kernels:
        shares[categorize(key)] = shares.get(categorize(key), 0.0) + milliseconds
    context.put("ms_by_category", shares)
    context.put("wall_ms", wall)
    context.put(
        "kernels",
        [{"name": key[:120], "ms": ms, "count": count} for key, ms, count in kernels[:30]],
    )
    if not context.cuda:
        context.put("CUDA graph", {"skipped": "needs a GPU"})
        return
    steps = {"launched": step}
    try:
        steps["CUDA graph"] = timing.captured(step)
    except Exception as error:
        context.put("CUDA graph", {"error": last_line(error)})
        context.fail(f"CUDA graph: {last_line(error)}")
        _free(context)
    for name, problem in _record(context, steps, rounds=8).items():
        context.fail(f"{name}: {problem}")


def categorize(kernel: str) -> str:
    """Return the category of a kernel's name."""
    return next(
        (name for name, pattern in CATEGORIES if re.search(pattern, kernel, re.IGNORECASE)), "other"
    )
