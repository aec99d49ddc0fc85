"""State every operator's equation in fp64, written for reading: what the references are held to.

A formula takes the arguments of the registered operator by name, and ``returned``, the results
under test: where one result is read for another one, as the sum is for its norm, the formula reads
it as it was returned, rounded, and keeps the gradient of the unrounded one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


def per_token(rows: Tensor, length: int) -> Tensor:
    """Give token l its row, l // (L // R)."""
    return rows[:, torch.arange(length, device=rows.device) // max(length // rows.shape[1], 1)]


def rounded(exact: Tensor, returned: Results | None) -> Tensor:
    """Return the first result with its value as returned and its gradient as computed here."""
    if returned is None:
        return exact
    return exact + (returned[0].detach().to(exact) - exact).detach()


def normed(x: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + eps)


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, returned: Results | None = None
) -> Results:
    length = x.shape[1]
    return (normed(x, eps) * (1 + per_token(scale, length)) + per_token(shift, length),)


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float = 1e-6,
    returned: Results | None = None,
) -> Results:
    length = x.shape[1]
    h = x + y if gate is None else x + y * per_token(gate, length)
    n = normed(rounded(h, returned), eps)
    n = n if weight is None else n * weight
    n = n if bias is None else n + bias
    if shift is not None and scale is not None:
        n = n * (1 + per_token(scale, length)) + per_token(shift, length)
    return h, n


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor | None, returned: Results | None = None
) -> Results:
    return (x + y if gate is None else x + y * per_token(gate, x.shape[1]),)


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    returned: Results | None = None,
) -> Results:
    n = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight
    heads = n.unflatten(-1, (num_heads, x.shape[-1] // num_heads))
    if cos is None or sin is None:
        return (heads,)
    even, odd = heads[..., 0::2], heads[..., 1::2]
    c, s = cos[None, :, None], sin[None, :, None]
    return (torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2),)


def dual_timestep_embedding(
    t_emb: Tensor, r_emb: Tensor, gate: Tensor, fusion: str, returned: Results | None = None
) -> Results:
    emb = (1 - gate) * t_emb + gate * r_emb if fusion == "gated" else t_emb + gate * r_emb
    read = rounded(emb, returned)
    return emb, read / (1 + torch.exp(-read))


def frames(times: Tensor, samples: int, count: int) -> Tensor:
    """Return times ``[B]`` or ``[B, F]``, or one number, as ``[B, F]``."""
    times = times.expand(samples) if times.ndim == 0 else times
    return (times[:, None] if times.ndim == 1 else times).expand(samples, count)


def flow_map_inputs(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: Tensor,
    epsilon_minus: Tensor,
    picked: Tensor | None,
    dtype: torch.dtype,
    with_x_t: bool,
    returned: Results | None = None,
) -> Results:
    """Interpolate one frame at a time."""
    b, f = latents.shape[:2]
    t, plus, minus = (frames(times, b, f) for times in (t, epsilon_plus, epsilon_minus))
    at, above, below = (0 * (latents + noise) for _ in range(3))
    for i in range(b):
        for j in range(f):
            v = noise[i, j] - latents[i, j]
            at[i, j] = (1 - t[i, j]) * latents[i, j] + t[i, j] * noise[i, j]
            above[i, j] = at[i, j] + plus[i, j] * v
            below[i, j] = at[i, j] - minus[i, j] * v
    sides = [above, below] if picked is None else [above[picked], below[picked]]
    return at, torch.cat([*sides, at] if with_x_t else sides)


def flow_map_loss(
    pred: Tensor,
    uncond: Tensor | None,
    u_plus: Tensor | None,
    u_minus: Tensor | None,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    weight: Tensor,
    width: Tensor,
    picked: Tensor | None,
    guidance: float,
    need_grad: bool,
    returned: Results | None = None,
) -> Results:
    """Compute the loss of one sample and one frame after the other."""
    b, f = pred.shape[:2]
    indices = list(range(b)) if picked is None else [int(i) % b for i in picked]
    t, r, weight = (frames(times, b, f) for times in (t, r, weight))
    width = frames(width, len(indices), f)
    losses = []
    for i in range(b):
        p = pred[i] if uncond is None else (pred[i] - (1 - guidance) * uncond[i]) / guidance
        of_frames = []
        for j in range(f):
            v = noise[i, j] - latents[i, j]
            for n, index in enumerate(indices):
                if index == i and u_plus is not None and u_minus is not None:
                    slope = (u_plus[n, j] - u_minus[n, j]) / (width[n, j] * guidance)
                    v = v - (t[i, j] - r[i, j]) * slope
            of_frames.append(weight[i, j] * ((p[j] - v) ** 2).mean())
        losses.append(torch.stack(of_frames).mean() if of_frames else p.sum() * math.nan)
    return (torch.stack(losses) if losses else pred.flatten(1).sum(1),)


def gelu(x: Tensor, returned: Results | None = None) -> Results:
    """Compute ``x sigmoid(2 u)``, where ``0.5 x (1 + tanh(u))`` would cancel."""
    return (x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, returned: Results | None = None
) -> Results:
    return (x @ weight.T if bias is None else x @ weight.T + bias,)


def attention(q: Tensor, k: Tensor, v: Tensor, returned: Results | None = None) -> Results:
    weights = (torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return (torch.einsum("bhls,bshd->blhd", weights, v),)


FORMULAS: dict[str, Callable[..., Results]] = {
    function.__name__: function
    for function in (
        attention,
        dual_timestep_embedding,
        flow_map_inputs,
        flow_map_loss,
        gated_residual,
        gelu,
        layer_norm_modulate,
        linear,
        residual_layer_norm,
        rms_norm_rope,
    )
}


def expected(op: str, arguments: dict[str, Any], returned: Results | None = None) -> Results:
    """Evaluate an operator's formula on arguments in fp64."""
    return FORMULAS[op](**arguments, returned=returned)
