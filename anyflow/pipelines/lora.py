"""Adapters of others, merged into a transformer's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PREFIX = "transformer."
_PEFT_PREFIX = "base_model.model."
_ADAPTER = "loaded"


def merge_lora(transformer: AnyFlowTransformer3DModel, path: str | Path, scale: float = 1.0) -> None:
    """Add ``scale alpha / rank B A`` to the weights of every layer that a LoRA has; sampling then costs nothing more.

    Args:
        transformer: changed in place; several may be merged one after the other.
        path: a ``.safetensors`` file or a folder with one: diffusers' (``pytorch_lora_weights``; the names of the
            original Wan code too) or PEFT's (``adapter_model`` beside ``adapter_config.json``).
        scale: of what is added.

    Raises:
        ValueError: no such file, or it holds anything but complete pairs for linear layers of this transformer.
        ImportError: PEFT is missing.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'anyflow[train]'") from error
    file = _find(Path(path))
    state, metadata = _read(file)
    _check(transformer, state, file)
    try:
        transformer.load_lora_adapter(state, prefix=None, adapter_name=_ADAPTER, metadata=metadata)
        transformer.fuse_lora(lora_scale=scale, safe_fusing=True)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{file} does not fit the transformer: {error}") from error
    finally:
        if _ADAPTER in getattr(transformer, "peft_config", {}):
            transformer.unload_lora()


def _find(path: Path) -> Path:
    found = [path / name for name in _FILES if (path / name).is_file()] if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file() or found[0].suffix != ".safetensors":
        raise ValueError(f"LoRA: {path} is no .safetensors file and no folder with {' or '.join(_FILES)}")
    return found[0]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors as ``<module>.lora_A.weight``, and the arguments of PEFT's ``LoraConfig`` if the file has them."""
    from diffusers.loaders import WanLoraLoaderMixin
    from safetensors.torch import load_file

    if file.name == "adapter_model.safetensors":
        config = file.with_name("adapter_config.json")
        if not config.is_file():
            raise ValueError(f"LoRA: there is no {config.name} beside {file}, which has its rank and alpha")
        state = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in load_file(file).items()}
        return state, json.loads(config.read_text(encoding="utf-8"))
    state, metadata = WanLoraLoaderMixin.lora_state_dict(
        str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True, return_lora_metadata=True
    )
    if metadata is not None:
        metadata = {name.removeprefix(_PREFIX): value for name, value in metadata.items()}
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}, metadata


def _check(transformer: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """What diffusers leaves out with a warning, or not even that, is an error."""
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    lines = []
    for name in sorted(state):
        module, _, side = name.rpartition(".lora_")
        other = f"{module}.lora_{'B' if side.startswith('A') else 'A'}.weight"
        if side not in ("A.weight", "B.weight"):
            lines.append(f"not understood: {name}")
        elif module not in linear:
            lines.append(f"no linear layer of this transformer: {module}")
        elif other not in state:
            lines.append(f"missing: {other}")
        elif side == "A.weight":
            a, b, weight = (tuple(t.shape) for t in (state[name], state[other], linear[module].weight))
            if (*b[:1], *a[1:]) != weight or b[1:] != a[:1]:
                lines.append(f"{module}: A {a} and B {b} do not make {weight}")
    if not state:
        lines.append("it is empty")
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(f"LoRA {file} does not fit the transformer:\n  {listed}")
