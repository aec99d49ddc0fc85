"""flow_map_loss against the target of SPEC B3-B6 written out sample by sample in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.ops import flow_map_inputs, flow_map_loss

B, F, C, H, W = 4, 3, 2, 3, 5
TENSORS = ("pred", "uncond", "u_plus", "u_minus", "latents", "noise")


def formula(a: dict[str, Any]) -> Tensor:
    """The loss of every sample, one after the other; times, weight and step given as [B, F]."""
    rows = list(range(B)) if a.get("rows") is None else a["rows"].tolist()
    losses = []
    for b in range(B):
        g = a["guidance"]
        p = a["pred"][b] if a["uncond"] is None else (a["pred"][b] - (1 - g) * a["uncond"][b]) / g
        target = a["noise"][b] - a["latents"][b]
        frame_losses = []
        for f in range(F):
            v = target[f]
            if a["u_plus"] is not None and b in rows:
                n = rows.index(b)
                slope = (a["u_plus"][n, f] - a["u_minus"][n, f]) / (a["step"][n, f] * g)
                v = v - (a["t"][b, f] - a["r"][b, f]) * slope
            frame_losses.append(a["weight"][b, f] * ((p[f] - v) ** 2).mean())
        losses.append(torch.stack(frame_losses).mean())
    return torch.stack(losses)


def inputs(
    g: torch.Generator,
    dtype: torch.dtype = torch.float32,
    *,
    per_frame: bool = False,
    rows: list[int] | None = None,
    guidance: float = 3.0,
    step: str = "number",
) -> dict[str, Any]:
    n = B if rows is None else len(rows)
    sizes = {"u_plus": n, "u_minus": n}
    shape = (B, F) if per_frame else (B,)
    named: dict[str, Any] = {
        name: torch.randn(sizes.get(name, B), F, C, H, W, generator=g, dtype=torch.float64).to(dtype)
        for name in TENSORS
    }
    if guidance == 1:
        named["uncond"] = None
    t, r = torch.sort(torch.rand(2, *shape, generator=g), dim=0, descending=True).values
    widths = {"number": 0.01, "scalar": torch.tensor(0.01), "sample": (n,), "frame": (n, F)}[step]
    if isinstance(widths, tuple):
        widths = 0.01 + 0.01 * torch.rand(widths, generator=g)
    named |= {"t": t, "r": r, "weight": torch.rand(shape, generator=g), "guidance": guidance, "step": widths}
    return named | {"rows": None if rows is None else torch.tensor(rows, dtype=torch.long)}


def widened(named: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for the formula: fp64, with per-frame times, weights and steps."""
    n = B if named["rows"] is None else len(named["rows"])
    out = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in named.items()}
    for key, count in (("t", B), ("r", B), ("weight", B), ("step", n)):
        value = torch.as_tensor(out[key], dtype=torch.float64)
        value = value.expand(count) if value.ndim == 0 else value
        out[key] = (value.unsqueeze(1) if value.ndim == 1 else value).expand(count, F)
    out["pred"].requires_grad_()
    return out


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("step", ["number", "scalar", "sample", "frame"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("rows", [None, [3, 1], []])
def test_values_and_gradient(per_frame, step, guidance, rows, generator, assert_matches, assert_gradients) -> None:
    named = inputs(generator, per_frame=per_frame, rows=rows, guidance=guidance, step=step)
    named["pred"].requires_grad_()
    named64 = widened(named)
    out, expected = flow_map_loss(**named), formula(named64)
    assert out.shape == (B,)
    assert_matches(out, expected, tolerance=torch.float32)
    assert_gradients([out], [named["pred"]], [expected], [named64["pred"]])


def test_dtypes(dtype, generator, assert_matches, assert_gradients) -> None:
    """Accumulated, and returned, in fp32 at least: a bf16 loss would have two digits."""
    named = inputs(generator, dtype, rows=[0, 2])
    named["pred"].requires_grad_()
    named64 = widened(named)
    out, expected = flow_map_loss(**named), formula(named64)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert_matches(out, expected, tolerance=torch.promote_types(dtype, torch.float32))
    assert_gradients([out], [named["pred"]], [expected], [named64["pred"]])


def test_fp32_velocities_of_a_bf16_model(generator, assert_matches) -> None:
    """u_plus and u_minus arrive in fp32 beside bf16 data; they must not be rounded to it."""
    named = inputs(generator, torch.bfloat16, rows=[1])
    for key in ("u_plus", "u_minus"):
        named[key] = torch.randn(1, F, C, H, W, generator=generator)
    assert_matches(flow_map_loss(**named), formula(widened(named)).detach(), tolerance=torch.float32)


def test_gradient_flows_to_pred_only(generator) -> None:
    named = inputs(generator)
    for key in TENSORS:
        named[key].requires_grad_()
    named["t"].requires_grad_()
    flow_map_loss(**named).sum().backward()
    assert named["pred"].grad is not None and named["pred"].grad.any()
    assert all(named[key].grad is None for key in (*TENSORS[1:], "t"))


def test_without_neighbors_it_is_flow_matching(generator) -> None:
    named = inputs(generator, guidance=1.0) | {"u_plus": None, "u_minus": None}
    v = named["noise"] - named["latents"]
    expected = named["weight"] * (named["pred"] - v).square().flatten(1).mean(1)
    torch.testing.assert_close(flow_map_loss(**named), expected)


def test_t_equals_r_needs_no_neighbors(generator) -> None:
    """What the methods rely on when they skip the r = t samples: their slope has the factor 0."""
    named = inputs(generator)
    named["r"] = named["t"].clone()
    without = flow_map_loss(**(named | {"u_plus": None, "u_minus": None}))
    assert torch.equal(flow_map_loss(**named), without)


def test_exact_flow_map_of_a_linear_field_has_zero_loss(generator) -> None:
    """One data point: u(x, t, r) = (x - x0) / t solves the flow-map equation, so its residual is 0 at any t, r."""
    x0, eps = (torch.randn(B, F, C, H, W, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.9, 0.6, 0.4, 1.0], dtype=torch.float64)
    r = torch.tensor([0.1, 0.6, 0.0, 0.5], dtype=torch.float64)
    e = 0.01
    x_t, plus, minus = flow_map_inputs(x0, eps, t, e)

    def u(x: Tensor, at: Tensor) -> Tensor:
        return (x - x0) / at.reshape(B, 1, 1, 1, 1)

    loss = flow_map_loss(u(x_t, t), None, u(plus, t + e), u(minus, t - e), x0, eps, t, r, torch.ones(B), 1.0, 2 * e)
    assert loss.max() < 1e-24
    wrong = u(x_t, t) + 0.1
    loss = flow_map_loss(wrong, None, u(plus, t + e), u(minus, t - e), x0, eps, t, r, torch.ones(B), 1.0, 2 * e)
    torch.testing.assert_close(loss, torch.full((B,), 0.01, dtype=torch.float64))


def test_non_contiguous(generator) -> None:
    named = inputs(generator)
    strided = {k: v.transpose(1, 2).contiguous().transpose(1, 2) if k in TENSORS else v for k, v in named.items()}
    torch.testing.assert_close(flow_map_loss(**strided), flow_map_loss(**named))


def test_empty_batch() -> None:
    empty = torch.empty(0, F, C, H, W, requires_grad=True)
    zero = torch.empty(0)
    loss = flow_map_loss(empty, None, empty, empty, empty, empty, zero, zero, zero, 1.0, 0.01)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape


@pytest.mark.parametrize("per_frame", [False, True])
def test_gradcheck(per_frame, generator) -> None:
    named = inputs(generator, torch.float64, per_frame=per_frame, rows=[2, 0], step="sample")
    named = {k: v[..., :2, :1] if k in TENSORS else v for k, v in named.items()}
    pred = named.pop("pred").requires_grad_()
    assert torch.autograd.gradcheck(lambda p: flow_map_loss(p, **named), pred)


X, T = torch.zeros(B, F, C, H, W), torch.zeros(B)
GOOD: dict[str, Any] = dict.fromkeys(TENSORS, X) | {
    "t": T, "r": T, "weight": T, "guidance": 3.0, "step": 0.01, "rows": None
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred": T}, "pred must be"),
        ({"uncond": X[:2]}, "uncond must have the shape of pred"),
        ({"latents": X[:, :1]}, "latents must have the shape of pred"),
        ({"noise": X[..., :1]}, "noise must have the shape of pred"),
        ({"noise": X.to("meta")}, "noise is on meta"),
        ({"t": T[:2]}, "t must be"),
        ({"r": T[:2]}, "r must be"),
        ({"weight": torch.zeros(B, F + 1)}, "weight must be"),
        ({"weight": T.to("meta")}, "weight is on meta"),
        ({"r": torch.zeros(B, F)}, "one shape"),
        ({"guidance": 0.0}, "guidance must be > 0"),
        ({"guidance": -1.0}, "guidance must be > 0"),
        ({"guidance": float("nan")}, "guidance must be > 0"),
        ({"uncond": None}, "needs the unconditional prediction"),
        ({"u_minus": None}, "given together"),
        ({"u_plus": None}, "given together"),
        ({"u_plus": X[:2]}, "u_plus must be"),
        ({"u_minus": X[:, :1]}, "u_minus must be"),
        ({"u_minus": X.to("meta")}, "u_minus is on meta"),
        ({"rows": torch.tensor([0])}, "u_plus must be"),
        ({"rows": torch.ones(B, dtype=torch.bool)}, "rows must be"),
        ({"rows": torch.arange(B, device="meta")}, "rows is on meta"),
        ({"step": T[:2]}, "step must be"),
        ({"step": torch.zeros(B, F + 1)}, "step must be"),
        ({"step": T.to("meta")}, "step is on meta"),
    ],
)
def test_bad_input(changes, message) -> None:
    with pytest.raises(ValueError, match=f"flow_map_loss: .*{message}"):
        flow_map_loss(**(GOOD | changes))
