"""Measure section after section in a process of its own; an exception ends one section alone."""

from __future__ import annotations

import gc
import os
import platform
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu import build, without_diffusers
from gpu.run import DeviceRun, RunSection, Skip, last_line
from gpu.state import (
    DONE,
    FAILED,
    RUNNING,
    SKIPPED,
    RunFile,
    clocks,
    commit,
    die_with_parent,
    nvidia_smi,
)
from gpu.supervisor import WorkOrder

# exit status: after such an error nothing on the device works any more in this process
BROKEN_DEVICE = 70


def work(order: WorkOrder) -> int:
    """Run the ordered sections that have no status yet; the processes of a run share the file."""
    die_with_parent(order.parent)
    build.find_package(order.device)
    stand_in = without_diffusers.install()
    without_extension = build.load_operators()
    # what is measured imports the package, which had to be found first
    from gpu.sections import SECTIONS

    file, device = RunFile.load(Path(order.path), Path(order.copy)), torch.device(order.device)
    if order.device == "cpu":
        torch.set_num_threads(1)  # tiny networks, and a machine that may do other things
    else:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    run = DeviceRun(device, order.tiny, file, order.deadline, short=order.short)
    missing = {"diffusers_stand_in": stand_in, "extension": without_extension}
    file.data["environment"] = _environment(device) | missing
    file.save()
    sections = {section.name: section for section in SECTIONS}
    for name in order.sections:
        if file.status(name) is None:
            _run(sections[name], run)
    return 0


def _run(section: RunSection, run: DeviceRun) -> None:
    file, name = run.file, section.name
    run.name = name
    if not run.affords(section.seconds):
        needed = f"about {section.seconds * run.slowness:.0f} s are needed"
        reason = f"budget: {needed}, {max(run.remaining(), 0):.0f} s left"
        file.mark(name, SKIPPED, reason, title=section.title)
        print(f"{name}: skipped, {reason}", flush=True)
        return
    started = time.monotonic()
    earlier = file.data["sections"].pop(name, {})
    if section.resumes and "data" in earlier:
        file.section(name)["data"] = earlier["data"]
    file.mark(name, RUNNING, title=section.title, clocks_before=clocks())
    print(f"--- {name}: {section.title}", flush=True)
    broken = False
    try:
        run.require_right_kernels(section.operators)
        section.run(run)
        reason = file.section(name).get("problem")
        status = FAILED if reason else DONE
        reason = reason or file.section(name).get("note")
    except Skip as skip:
        status, reason = SKIPPED, str(skip)
    except Exception as error:
        traceback.print_exc()
        status, reason, broken = FAILED, last_line(error), _is_broken(run.device)
    seconds = round(time.monotonic() - started, 2)
    file.mark(name, status, reason, seconds=seconds, clocks_after=clocks())
    if broken:
        os._exit(BROKEN_DEVICE)  # the supervisor starts a new process for what is left
    gc.collect()
    torch._dynamo.reset()
    if run.cuda:
        torch.cuda.empty_cache()


def _is_broken(device: torch.device) -> bool:
    """Tell whether an error, such as an illegal access, has taken the device from this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except Exception:
        return True
    return False


def _environment(device: torch.device) -> dict[str, Any]:
    """Describe what is measured, on what; a part that cannot be had is its problem alone."""
    from importlib.metadata import PackageNotFoundError, version

    import anyflow
    from anyflow.models import attention_report
    from anyflow.ops import backend_report

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def backends() -> dict[str, Any]:
        choices = backend_report(device).items()
        return {op: f"{choice.backend}: {choice.reason}" for op, choice in choices}

    def attention() -> dict[str, Any]:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        fields = ("available", "chosen", "reason")
        choices = attention_report(device, dtype=dtype).items()
        return {name: {f: getattr(choice, f) for f in fields} for name, choice in choices}

    gpu: dict[str, Any] = {}
    if device.type == "cuda":
        properties, driver = torch.cuda.get_device_properties(device), nvidia_smi("driver_version")
        gpu = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cudnn": torch.backends.cudnn.version(),
            "driver": None if driver is None else driver["driver_version"],
        }
    packages = ("torch", "triton", "diffusers", "flash-attn", "transformers", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: installed(name) for name in packages},
        "cuda": torch.version.cuda,
        "anyflow": anyflow.__version__,
        "gpu": gpu or None,
        "backends": _attempt(backends),
        "attention": _attempt(attention),
        **commit(),
    }


def _attempt(describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return describe()
    except Exception as error:
        traceback.print_exc()
        return {"problem": last_line(error)}
