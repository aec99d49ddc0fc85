"""Measure section after section in a process of its own; an exception ends one section alone."""

from __future__ import annotations

import gc
import os
import platform
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu import build
from gpu.run import DeviceRun, RunSection, Skip, last_line
from gpu.state import DONE, FAILED, RUNNING, SKIPPED, RunFile, clocks, commit, nvidia_smi
from gpu.supervisor import WorkOrder

# exit status: after such an error nothing on the device works any more in this process
BROKEN_DEVICE = 70


def work(order: WorkOrder) -> int:
    """Run the ordered sections that have no status yet; the processes of a run share the file."""
    device, missing = build.prepare_process(order.device, order.parent)
    # what is measured imports the package, which had to be found first
    from gpu.sections import SECTIONS

    file = RunFile.load(Path(order.path), Path(order.copy))
    run = DeviceRun(device, order.tiny, file, order.deadline, short=order.short)
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
        left = f"{max(run.remaining(), 0):.0f} s left"
        reason = f"budget: about {section.seconds:.0f} s are needed, {left}"
        file.mark(name, SKIPPED, reason, title=section.title)
        print(f"{name}: skipped, {reason}", flush=True)
        return
    started, broken = time.monotonic(), False
    earlier = file.data["sections"].pop(name, {})
    if section.resumes and "data" in earlier:
        file.section(name)["data"] = earlier["data"]
    file.mark(name, RUNNING, title=section.title, clocks_before=clocks())
    print(f"--- {name}: {section.title}", flush=True)
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
    """Describe what is measured, on what."""
    import anyflow
    from anyflow.ops import backend_report

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    gpu: dict[str, Any] | None = None
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
    backends = {op: f"{c.backend}: {c.reason}" for op, c in backend_report(device).items()}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: installed(name) for name in packages},
        "cuda": torch.version.cuda,
        "anyflow": anyflow.__version__,
        "gpu": gpu,
        "backends": backends,
        **commit(),
    }
