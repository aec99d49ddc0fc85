"""The gates of the native CPU kernels: ``python benchmarks/cpu_gates.py``, exit status 1 if one is missed.

Every figure is a ratio of two minima over many rounds of one process, in which the two alternate: what else the machine
does then hits both. Absolute times off a shared machine mean nothing and are not printed.

1. The model, a small DiT in fp32, against diffusers' ``AnyFlowTransformer3DModel`` with the same weights.
2. Every operator, native against its eager reference, at [1, 1280, 384] and [1, 8192, 1536].
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import op_cases
import torch
from torch import nn

from anyflow import _C
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.ops import use_backend

CPU = torch.device("cpu")
MODEL_GATES = {"forward": 1.35, "forward + backward": 1.35}
OPERATOR_GATES = {"forward": 2.5, "backward": 1.8}
SHAPES = ((1280, 384), (8192, 1536))
# One addition and one multiplication per element, which torch's addcmul does in one pass too: nothing to win forward.
WITHOUT_FORWARD_GATE = ("gated_residual",)

Step = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """How many times faster than the baseline, and how many times it has to be (None: not gated)."""

    name: str
    direction: str
    ratio: float
    gate: float | None

    @property
    def passed(self) -> bool:
        return self.gate is None or self.ratio >= self.gate


def ratio(baseline: Step, ours: Step, seconds: float) -> float:
    """Minimum of the baseline's times over minimum of ours, the two alternating for about so many seconds."""
    for step in (baseline, ours):  # allocations, caches
        step()
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for i, step in enumerate((baseline, ours)):
            start = time.perf_counter()
            step()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best[0] / best[1]


def model_results(seconds: float) -> list[Result]:
    """6 heads x 64, 4 layers, 1280 tokens (5 frames of 16 x 16), feed-forward of 4 D, 32 text tokens, t and r."""
    from diffusers import AnyFlowTransformer3DModel as Peer

    sizes = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 4, "ffn_dim": 1536, "text_dim": 128}
    torch.manual_seed(0)
    peer, ours = Peer(**sizes), AnyFlowTransformer3DModel(**sizes)
    ours.load_state_dict(peer.state_dict())
    inputs = (
        torch.randn(1, 5, 16, 32, 32),
        torch.full((1, 5), 700.0),
        torch.full((1, 5), 300.0),
        torch.randn(1, 32, 128),
    )

    def forward(model: nn.Module) -> Step:
        def step() -> None:
            with torch.no_grad():
                model(*inputs)

        return step

    def both(model: nn.Module) -> Step:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            model(*inputs).sample.square().mean().backward()

        return step

    name = "model against diffusers"
    return [
        Result(name, direction, ratio(step(peer), step(ours), seconds), MODEL_GATES[direction])
        for direction, step in (("forward", forward), ("forward + backward", both))
    ]


def operator_results(case: op_cases.Case, seconds: float) -> list[Result]:
    """One operator in fp32, native against eager."""
    call = case.build(CPU, torch.float32)

    def forward(backend: str) -> Step:
        def step() -> None:
            with use_backend(backend), torch.set_grad_enabled(call.training):
                call.outputs()

        return step

    def backward(backend: str) -> Step:
        with use_backend(backend):
            outputs = call.outputs()
        cotangents = [torch.randn_like(o) for o in outputs]

        def step() -> None:
            with use_backend(backend):
                torch.autograd.grad(outputs, call.wanted, cotangents, retain_graph=True)

        return step

    results = []
    for direction, step in (("forward", forward), ("backward", backward)):
        gate = None if direction == "forward" and case.op in WITHOUT_FORWARD_GATE else OPERATOR_GATES[direction]
        results.append(Result(case.name, direction, ratio(step("eager"), step("native"), seconds), gate))
    return results


def cases() -> list[op_cases.Case]:
    """Every operator at both shapes; the flow-map operators with latents of as many elements."""
    result = []
    for tokens, dim in SHAPES:
        result += op_cases.row_cases(tokens, dim, 1)
        result += [op_cases.embedding_case(tokens, dim), op_cases.gelu_case(tokens, dim)]
        result += op_cases.flow_map_cases(2, (tokens // 256, 16, dim // 12, 96))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per figure")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    threads, isa = torch.get_num_threads(), _C.cpu_instruction_set()
    print(f"torch {torch.__version__}, {threads} threads, native kernels for {isa}, Python {platform.python_version()}")

    results: list[Result] = []
    suites = [("model", lambda: model_results(5 * arguments.seconds))]
    suites += [(case.name, lambda case=case: operator_results(case, arguments.seconds)) for case in cases()]
    for name, suite in suites:
        if arguments.only not in name:
            continue
        for result in suite():
            verdict = "" if result.gate is None else f"gate {result.gate:.2f}  {'ok' if result.passed else 'MISSED'}"
            print(f"{result.name:58s} {result.direction:20s} {result.ratio:6.2f}x  {verdict}", flush=True)
            results.append(result)
    if arguments.output is not None:
        environment = {"torch": torch.__version__, "threads": threads, "instruction_set": isa}
        data = {"environment": environment, "results": [asdict(r) for r in results]}
        arguments.output.write_text(json.dumps(data, indent=1) + "\n")
    missed = [r for r in results if not r.passed]
    print(
        f"{len(results) - len(missed)} of {len(results)} hold"
        + "".join(f"\nmissed: {r.name}, {r.direction}" for r in missed)
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
