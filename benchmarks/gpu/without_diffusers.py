"""Stand in for the little that the model takes from diffusers, on a machine without it.

Names and attributes alone, without loading, saving or adapters: the model runs, peers do not.
Nothing of this is used where diffusers is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

# The modules of diffusers that anyflow.models imports from.
_NEEDED = (
    "diffusers.configuration_utils",
    "diffusers.loaders",
    "diffusers.models.modeling_outputs",
    "diffusers.models.modeling_utils",
    "diffusers.utils",
)


class ConfigDict(dict[str, Any]):
    """Read entries as attributes too, as the configs of diffusers do."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class ConfigMixin:
    """Keep the arguments of the constructor."""

    _config: ConfigDict

    @property
    def config(self) -> ConfigDict:
        return self._config


class ModelMixin(nn.Module):
    """Tell a module's device and dtype."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class PeftAdapterMixin:
    """Stand in for adapters, which this module has none of."""


@dataclass
class Transformer2DModelOutput:
    """Hold the result of a transformer."""

    sample: torch.Tensor


def register_to_config(constructor: Callable[..., None]) -> Callable[..., None]:
    """Note the arguments, defaults included, as ``config``."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        nn.Module.__init__(self)
        self._config = ConfigDict({k: v for k, v in bound.arguments.items() if k != "self"})
        config = self._config
        constructor(self, *args, **kwargs)  # which calls Module.__init__ again
        self._config = config

    return construct


def apply_lora_scale(_: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the forward as it is: it has no adapters to scale."""
    return lambda forward: forward


def problem() -> str | None:
    """Return why ``import diffusers`` does not give what the model needs, or None where it does."""
    module = sys.modules.get("diffusers")
    if module is not None and hasattr(module, "_ANYFLOW_STAND_IN"):
        return str(module._ANYFLOW_STAND_IN)
    try:
        if importlib.util.find_spec("diffusers") is None:
            return "diffusers is not installed"
        for name in _NEEDED:
            importlib.import_module(name)
    except Exception as error:  # a package of its own that is missing or of another version
        text = (str(error).strip() or "?").splitlines()[0]
        return f"diffusers does not import: {type(error).__name__}: {text}"
    return None


def install() -> str | None:
    """Put the stand-in where ``import diffusers`` finds it if needed, and return why it was."""
    reason = problem()
    if reason is None:
        return None
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        del sys.modules[name]
    config = {"ConfigMixin": ConfigMixin, "register_to_config": register_to_config}
    names: dict[str, dict[str, Any]] = {
        "diffusers": {"_ANYFLOW_STAND_IN": reason},
        "diffusers.configuration_utils": config,
        "diffusers.loaders": {"PeftAdapterMixin": PeftAdapterMixin},
        "diffusers.models": {},
        "diffusers.models.modeling_outputs": {"Transformer2DModelOutput": Transformer2DModelOutput},
        "diffusers.models.modeling_utils": {"ModelMixin": ModelMixin},
        "diffusers.utils": {"apply_lora_scale": apply_lora_scale},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__path__ = []  # a package, so that those below it are found
        # who looks for one finds something
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__dict__.update(content)
        sys.modules[name] = module
    return reason
