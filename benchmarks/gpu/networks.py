"""The networks that are measured: ours, and diffusers' on the very same weights; adapters,
checkpointing, inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint

from gpu.context import Context, last_line
from gpu.sizes import Size

# Our names of attention backends in diffusers'.
DIFFUSERS_ATTENTION = {
    "flash_attn_3": "_flash_3",
    "flash_attn_2": "flash",
    "cudnn": "_native_cudnn",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "math": "_native_math",
}
# The published recipe's.
LORA_RANK = 256
LORA_TARGETS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    *(
        "time_embedder.linear_1",
        "time_embedder.linear_2",
        "delta_embedder.linear_1",
        "delta_embedder.linear_2",
    ),
)


def peer_problem() -> str | None:
    """Return why diffusers' model is not measured, or None."""
    from gpu import without_diffusers

    problem = without_diffusers.problem()
    if problem is None:
        try:
            from diffusers import AnyFlowTransformer3DModel  # noqa: F401
        except Exception as error:  # one that is too old, or whose own dependencies are missing
            problem = f"diffusers has no AnyFlowTransformer3DModel that imports: {last_line(error)}"
    return None if problem is None else f"not measured: {problem}"


def build(context: Context, size: Size, dtype: torch.dtype | None = None) -> Any:
    """Our model with random weights, made on the device; what checkpoints keep in fp32 is in
    fp32.
    """
    from anyflow.models import AnyFlowTransformer3DModel

    dtype = context.dtype if dtype is None else dtype
    torch.manual_seed(0)
    with _made_in(dtype, context.device):
        model = AnyFlowTransformer3DModel(**size.config())
    return (
        _keep_in_fp32(model, AnyFlowTransformer3DModel._keep_in_fp32_modules)
        .eval()
        .requires_grad_(False)
    )


def build_peer(context: Context, size: Size, ours: nn.Module) -> Any:
    """Build diffusers' model on the memory of our parameters: the same weights, and never a second
    copy of them.

    All but the few that it does not keep in fp32 as ours does (``delta_embedder``), as
    ``from_pretrained`` has them.
    """
    from diffusers import AnyFlowTransformer3DModel as Peer

    dtype = ours.patch_embedding.weight.dtype  # type: ignore[union-attr]
    with _made_in(dtype, context.device), _without_parameters():  # type: ignore[arg-type]
        peer = Peer(**size.config())
    peer.load_state_dict(ours.state_dict(), assign=True)
    kept = set(Peer._keep_in_fp32_modules)
    for name, parameter in peer.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)  # the same memory where it has that dtype
    return peer.eval().requires_grad_(False)


@contextmanager
def _made_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Make parameters that have no memory, each from the moment that it belongs to a module;
    buffers keep theirs.

    A model on the meta device would lose the buffers that no state dict has.
    """

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


def _keep_in_fp32(model: nn.Module, parts: list[str]) -> nn.Module:
    for name, parameter in model.named_parameters():
        if set(parts) & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model


# Inputs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """One video: latents ``[1, F, C, H, W]``, the times t and r as ``[1]``, the prompt
    ``[1, S, text_dim]``.
    """

    latents: Tensor
    t: Tensor
    r: Tensor
    prompt: Tensor

    def ours(self) -> tuple[Tensor, ...]:
        """Positional arguments of our model: a time for each sample."""
        return self.latents, self.t, self.r, self.prompt

    def peers(self) -> tuple[Tensor, ...]:
        """Of diffusers': a time for each frame."""
        frames = self.latents.shape[1]
        return (
            self.latents,
            self.t[:, None].expand(-1, frames),
            self.r[:, None].expand(-1, frames),
            self.prompt,
        )


def inputs(context: Context, size: Size) -> Inputs:
    """Normal latents and prompt, t = 700, r = 300."""
    generator = torch.Generator(context.device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=context.device).to(context.dtype)

    times = (torch.tensor([value], device=context.device) for value in (700.0, 300.0))
    return Inputs(draw(1, *size.latents), *times, draw(1, size.text_tokens, size.text_dim))


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """|a - e| / |e|."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


# Training -----------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer with an fp32 adapter, alpha = r; B is not zero, so that every gradient
    flows.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.a = nn.Parameter(
            torch.randn(rank, base.in_features, device=device) / math.sqrt(base.in_features)
        )
        self.b = nn.Parameter(
            torch.randn(base.out_features, rank, device=device) * 1e-3 / math.sqrt(rank)
        )

    @property
    def weight(self) -> Tensor:
        """Of the base: the embedders ask for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        dtype = (
            torch.get_autocast_dtype(x.device.type)
            if torch.is_autocast_enabled(x.device.type)
            else self.a.dtype
        )
        wide = x.to(dtype)
        return self.base(x) + F.linear(F.linear(wide, self.a), self.b)


def prepare_training(model: Any, tiny: bool) -> Any:
    """Adapters on what the published recipe names, gradient checkpointing on every block."""
    torch.manual_seed(2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(LORA_TARGETS):
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent), child, LoRALinear(module, 4 if tiny else LORA_RANK)
            )
    model.gradient_checkpointing = True
    model._gradient_checkpointing_func = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False
    )
    return model.train()
