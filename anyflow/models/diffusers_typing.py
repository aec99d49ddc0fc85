"""Provide decorators of diffusers with types.

diffusers' own have none: a type checker would see the constructor, or the whole class, as ``Any``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])

    def register_to_config(init: F) -> F: ...

    def apply_lora_scale(kwargs_name: str) -> Callable[[F], F]: ...
else:
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils import apply_lora_scale

__all__ = ["apply_lora_scale", "register_to_config"]
