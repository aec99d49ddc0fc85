"""Pin a module's weights in main memory, so that a device copies them without the host."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

# torch rounds pinned memory up to powers of two: the largest weights of the 14B model, 142 MB,
# would take 268 MB each.
CHUNK = 2**30
RESERVE = 4 * 2**30  # of main memory, left to others
_ALIGNMENT = 256


def chunked(sizes: Sequence[int], chunk: int = CHUNK) -> list[list[tuple[int, int]]]:
    """Place tensors one behind another in chunks of memory.

    Args:
        sizes: bytes of each tensor.
        chunk: bytes of a chunk; a tensor that is larger has one of its own.

    Returns:
        For each chunk, ``(index, offset)`` of the tensors in it, in the order given; offsets are
        multiples of 256.
    """
    chunks: list[list[tuple[int, int]]] = []
    end = chunk
    for index, size in enumerate(sizes):
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        if not chunks or start + size > chunk:
            chunks.append([])
            start = 0
        chunks[-1].append((index, start))
        end = start + size
    return chunks


def pin_weights(module: nn.Module) -> int:
    """Move a module's parameters from pageable to pinned main memory, one chunk at a time.

    The pageable memory of a chunk is free as soon as it has been copied: the most that is needed
    beside the weights is one chunk. Where memory runs short, or the system refuses to pin it, the
    rest stays as it is, and a warning says so.

    Returns:
        Bytes that could not be pinned.
    """
    parameters = [p for p in module.parameters() if _can_be_pinned(p)]
    sizes = [p.nbytes for p in parameters]
    left = sum(sizes)
    for places in chunked(sizes):
        last, offset = places[-1]
        problem = _pin(
            [parameters[i] for i, _ in places], [start for _, start in places], offset + sizes[last]
        )
        if problem is not None:
            warnings.warn(
                f"{left / 1e9:.1f} GB of the weights stay in pageable memory, which is slower to "
                f"copy: {problem}",
                stacklevel=2,
            )
            return left
        left -= sum(sizes[i] for i, _ in places)
    return 0


def _can_be_pinned(parameter: Tensor) -> bool:
    data = parameter.data
    plain = type(data) is Tensor and data.layout == torch.strided  # neither quantized nor sharded
    return plain and data.device.type == "cpu" and data.nbytes > 0 and not data.is_pinned()


def _pin(parameters: Sequence[nn.Parameter], offsets: Sequence[int], size: int) -> str | None:
    """Move parameters into one chunk; return why that failed, with nothing moved, or None."""
    available = available_memory()
    if available is not None and available < size + RESERVE:
        return f"{available / 1e9:.1f} GB of main memory are free"
    try:
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    for parameter, offset in zip(parameters, offsets, strict=True):
        home = (
            memory[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        )
        parameter.data = home.copy_(parameter.data)
    return None


def available_memory() -> int | None:
    """Return the bytes that can be allocated without swapping; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )
