"""Build the networks that are measured, ours and diffusers' on the same weights, with inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sizes import CausalSize, NetworkSize
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.checkpoint import checkpoint

TIMESTEPS = 1000
T, R = 700.0, 300.0  # of a single evaluation
# The published recipe's.
LORA_RANK = 256
LORA_TARGETS = (
    *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    *("time_embedder.linear_1", "time_embedder.linear_2"),
    *("delta_embedder.linear_1", "delta_embedder.linear_2"),
)


def peer_problem() -> str | None:
    """Return why diffusers' model is not measured, or None."""
    from gpu import without_diffusers
    from gpu.run import last_line

    problem = without_diffusers.problem()
    if problem is None:
        try:
            from diffusers import AnyFlowTransformer3DModel  # noqa: F401
        except Exception as error:  # one that is too old, or whose own dependencies are missing
            problem = f"diffusers has no AnyFlowTransformer3DModel that imports: {last_line(error)}"
    return None if problem is None else f"not measured: {problem}"


def ours(size: NetworkSize, device: torch.device, seed: int = 0) -> Any:
    """Build our model with random weights on the device, in fp32 what checkpoints keep in fp32.

    A :class:`sizes.CausalSize` gives the causal model.
    """
    from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel

    causal = isinstance(size, CausalSize)
    torch.manual_seed(seed)
    with _made_in(size.dtype, device):
        cls = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
        model = cls(**size.config())
    for name, parameter in model.named_parameters():
        if set(model._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.eval()


def peer(size: NetworkSize, model: nn.Module) -> Any:
    """Build diffusers' model on the memory of our parameters, without a second copy of the weights.

    Copied are the few that diffusers does not keep in fp32 as ours does (``delta_embedder``), as
    its ``from_pretrained`` has them.
    """
    import diffusers

    causal = isinstance(size, CausalSize)
    name = "AnyFlowFARTransformer3DModel" if causal else "AnyFlowTransformer3DModel"
    cls = getattr(diffusers, name)
    with _made_in(size.dtype, next(model.parameters()).device), _without_parameters():
        built = cls(**size.config())
    built.load_state_dict(model.state_dict(), assign=True)
    kept = set(cls._keep_in_fp32_modules)
    for name, parameter in built.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(size.dtype)
    return built.eval()


def variant(model: Any, compiler: str | None = None) -> Any:
    """Return diffusers' model on the same weights, with blocks compiled by a backend or as it is.

    One graph serves all blocks, which are nearly all of the time.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, tensors)
    if compiler is not None:
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend=compiler)
    return model


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
    """Give parameters no memory from the moment that they belong to a module; buffers keep theirs.

    A model on the meta device would lose the buffers that no state dict has.
    """

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


# Inputs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Videos:
    """Hold a batch on a device: latents and noise in fp32, prompts in the network's dtype."""

    latents: Tensor
    noise: Tensor
    prompt: Tensor
    negative: Tensor


def videos(size: NetworkSize, device: torch.device) -> Videos:
    """Draw the batch of a size, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    latents, text = (size.batch, *size.latents), (size.batch, size.text_tokens, size.text_dim)
    x, noise, prompt, negative = (
        torch.randn(shape, generator=generator).to(device)
        for shape in (latents, latents, text, text)
    )
    negative = negative[:1].to(size.dtype).expand(size.batch, -1, -1)
    return Videos(x, noise, prompt.to(size.dtype), negative)


def evaluation(
    model: Any, size: NetworkSize, data: Videos, per_frame: bool
) -> Callable[[], Tensor]:
    """Return a forward of a batch at t = 0.7 and r = 0.3.

    Args:
        model: ours or diffusers'.
        size: of the network.
        data: the noise is the latents.
        per_frame: pass a time for each frame, as diffusers' model asks for; else one for a sample.
    """
    shape = (size.batch, size.frames) if per_frame else (size.batch,)
    times = [torch.full(shape, value, device=data.noise.device) for value in (T, R)]
    latents = data.noise.to(size.dtype)

    def step() -> Tensor:
        result: Tensor = model(latents, *times, data.prompt, return_dict=False)[0]
        return result

    return step


def without_gradient(step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a step of inference."""

    def quiet() -> Any:
        with torch.no_grad():
            return step()

    return quiet


# Training -----------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """Add an fp32 adapter, alpha = r, to a frozen linear layer.

    B is not zero, so that every gradient flows.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        down, up, device = base.in_features, base.out_features, base.weight.device
        self.a = nn.Parameter(torch.randn(rank, down, device=device) / math.sqrt(down))
        self.b = nn.Parameter(torch.randn(up, rank, device=device) * 1e-3 / math.sqrt(rank))

    @property
    def weight(self) -> Tensor:
        """Return the base's, whose dtype the embedders ask for."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Add the adapter's result, in the dtype of autocast where that is on."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        wide = x.to(torch.get_autocast_dtype(kind) if autocast else self.a.dtype)
        return self.base(x) + F.linear(F.linear(wide, self.a), self.b)


def add_adapters(model: Any, size: NetworkSize) -> Any:
    """Put adapters on what the published recipe names, and checkpointing on every block.

    The causal recipe trains the compressed patch embedding, too.
    """
    torch.manual_seed(2)
    rank = LORA_RANK if size.dim > LORA_RANK else 4
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(LORA_TARGETS):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank))
    if isinstance(size, CausalSize):
        model.far_patch_embedding.requires_grad_(True)
    model.gradient_checkpointing = True
    model._gradient_checkpointing_func = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False
    )
    return model.train()
