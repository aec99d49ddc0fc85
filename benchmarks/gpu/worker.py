"""The process that measures: section after section, each isolated from the others' exceptions."""

from __future__ import annotations

import gc
import os
import platform
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from gpu import build, without_diffusers
from gpu.context import Context, Section, Skip, last_line
from gpu.state import DONE, FAILED, RUNNING, SKIPPED, RunFile, clocks, commit, die_with_parent, nvidia_smi

BROKEN_DEVICE = 70  # exit status: after such an error nothing on the device works any more in this process


def work(path: Path, device: str, tiny: bool, deadline: float, names: list[str], parent: int) -> int:
    """Run the named sections that have no status yet; the file is what the processes of a run share."""
    die_with_parent(parent)
    stand_in = without_diffusers.install()
    build.find_package(device)
    without_extension = build.load_operators()
    from gpu.sections import SECTIONS  # what is measured imports the package, which had to be found first

    context = Context(torch.device(device), tiny, RunFile.load(path), deadline)
    if device == "cpu":
        torch.set_num_threads(1)  # tiny networks, and a machine that may do other things
    else:
        torch.cuda.set_device(0)
        context.device = torch.device("cuda", 0)
    environment = _environment(context.device) | {"diffusers_stand_in": stand_in, "extension": without_extension}
    context.file.data["environment"] = environment
    context.file.save()
    for section in SECTIONS:
        if section.name in names and context.file.status(section.name) is None:
            _run(section, context)
    return 0


def _run(section: Section, context: Context) -> None:
    file, context.name = context.file, section.name
    run = len(file.data["runs"]) - 1
    file.data["sections"].pop(section.name, None)
    if not context.affords(section.seconds):
        left = f"about {section.seconds * context.slowness:.0f} s are needed, {max(context.remaining(), 0):.0f} s left"
        file.mark(section.name, SKIPPED, f"budget: {left}", title=section.title, run=run)
        print(f"{section.name}: skipped, {left}", flush=True)
        return
    started = time.monotonic()
    file.mark(section.name, RUNNING, title=section.title, run=run, clocks_before=clocks())
    print(f"--- {section.name}: {section.title}", flush=True)
    broken = False
    try:
        section.run(context)
        reason = file.section(section.name).get("problem")
        status = FAILED if reason else DONE
    except Skip as skip:
        status, reason = SKIPPED, str(skip)
    except Exception as error:
        traceback.print_exc()
        status, reason, broken = FAILED, last_line(error), _is_broken(context.device)
    file.mark(section.name, status, reason, seconds=round(time.monotonic() - started, 2), clocks_after=clocks())
    if broken:
        os._exit(BROKEN_DEVICE)  # the supervisor starts a new process for what is left
    gc.collect()
    torch._dynamo.reset()
    if context.cuda:
        torch.cuda.empty_cache()


def _is_broken(device: torch.device) -> bool:
    """Whether an error such as an illegal memory access has taken the device away from this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except Exception:
        return True
    return False


def _environment(device: torch.device) -> dict[str, Any]:
    """What is measured, on what."""
    from importlib.metadata import PackageNotFoundError, version

    import anyflow
    from anyflow.models import attention_report
    from anyflow.ops import backend_report

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            "driver": (nvidia_smi("driver_version") or {}).get("driver_version"),
        }
    packages = ("torch", "triton", "diffusers", "flash-attn", "transformers", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: installed(name) for name in packages},
        "cuda": torch.version.cuda,
        "anyflow": anyflow.__version__,
        "gpu": gpu or None,
        "backends": {op: f"{choice.backend}: {choice.reason}" for op, choice in backend_report(device).items()},
        "attention": {
            name: {"available": choice.available, "chosen": choice.chosen, "reason": choice.reason}
            for name, choice in attention_report(
                device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
            ).items()
        },
        **commit(),
    }
