"""The little that the model takes from diffusers, for a machine without it: the model runs, peers do not.

No loading, no saving, no adapters: names and attributes alone. Nothing of it is used where diffusers is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn


class ConfigMixin:
    """Keeps the arguments of the constructor."""

    _config: SimpleNamespace

    @property
    def config(self) -> SimpleNamespace:
        return self._config


class ModelMixin(nn.Module):
    """A module that knows its device and dtype."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class PeftAdapterMixin:
    """No adapters."""


@dataclass
class Transformer2DModelOutput:
    """The result of a transformer."""

    sample: torch.Tensor


def register_to_config(constructor: Callable[..., None]) -> Callable[..., None]:
    """Note the arguments, defaults included, as ``config``."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        nn.Module.__init__(self)
        self._config = SimpleNamespace(**{k: v for k, v in bound.arguments.items() if k != "self"})
        config = self._config
        constructor(self, *args, **kwargs)  # which calls Module.__init__ again
        self._config = config

    return construct


def apply_lora_scale(_: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """There are no adapters to scale."""
    return lambda forward: forward


def is_installed() -> bool:
    """Whether ``import diffusers`` gives diffusers, and not what is here."""
    module = sys.modules.get("diffusers")
    if module is not None:
        return not hasattr(module, "_ANYFLOW_STAND_IN")
    return importlib.util.find_spec("diffusers") is not None


def install() -> bool:
    """Put the stand-in where ``import diffusers`` finds it, unless diffusers is installed; whether it was needed."""
    if is_installed():
        return False
    names: dict[str, dict[str, Any]] = {
        "diffusers": {"_ANYFLOW_STAND_IN": True},
        "diffusers.configuration_utils": {"ConfigMixin": ConfigMixin, "register_to_config": register_to_config},
        "diffusers.loaders": {"PeftAdapterMixin": PeftAdapterMixin},
        "diffusers.models": {},
        "diffusers.models.modeling_outputs": {"Transformer2DModelOutput": Transformer2DModelOutput},
        "diffusers.models.modeling_utils": {"ModelMixin": ModelMixin},
        "diffusers.utils": {"apply_lora_scale": apply_lora_scale},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__path__ = []  # a package, so that those below it are found
        module.__spec__ = ModuleSpec(name, None, is_package=True)  # who looks for one finds something
        module.__dict__.update(content)
        sys.modules[name] = module
    return True
