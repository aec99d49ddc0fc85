"""flow_map_loss against the target of the central difference, written out sample by sample in
fp64.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import _frames, flow_map_inputs, flow_map_loss, use_backend

B, F, C, H, W = 4, 3, 2, 3, 5
SHAPE = (B, F, C, H, W)
TENSORS = ("pred", "uncond", "u_plus", "u_minus", "latents", "noise")


def formula(a: dict[str, Any]) -> Tensor:
    """The loss of every sample, one after the other; times, weight and width given as [B, F]."""
    samples, frames = a["pred"].shape[:2]
    picked = (
        list(range(samples)) if a.get("picked") is None else [int(i) % samples for i in a["picked"]]
    )
    losses = []
    for b in range(samples):
        g = a["guidance"]
        p = a["pred"][b] if a["uncond"] is None else (a["pred"][b] - (1 - g) * a["uncond"][b]) / g
        target = a["noise"][b] - a["latents"][b]
        frame_losses = []
        for f in range(frames):
            v = target[f]
            for n, row in enumerate(picked if a["u_plus"] is not None else []):
                if row == b:
                    slope = (a["u_plus"][n, f] - a["u_minus"][n, f]) / (a["width"][n, f] * g)
                    v = v - (a["t"][b, f] - a["r"][b, f]) * slope
            frame_losses.append(a["weight"][b, f] * ((p[f] - v) ** 2).mean())
        losses.append(torch.stack(frame_losses).mean())
    return torch.stack(losses)


def inputs(
    draw: Any,
    dtype: torch.dtype = torch.float32,
    *,
    shape: tuple[int, ...] = SHAPE,
    per_frame: bool = False,
    picked: list[int] | None = None,
    guidance: float = 3.0,
    width: str = "number",
    times: torch.dtype = torch.float32,
) -> dict[str, Any]:
    b, f = shape[:2]
    n = b if picked is None else len(picked)
    sizes = {"u_plus": n, "u_minus": n}
    named: dict[str, Any] = {
        name: draw(sizes.get(name, b), *shape[1:], dtype=dtype).detach() for name in TENSORS
    }
    if guidance == 1:
        named["uncond"] = None

    def uniform(*size: int) -> Tensor:
        return draw(*size, dtype=torch.float64).detach().sigmoid().to(times)

    lead = (b, f) if per_frame else (b,)
    t, r = torch.sort(uniform(2, *lead), dim=0, descending=True).values
    device = named["pred"].device
    widths = {
        "number": 0.01,
        "scalar": torch.tensor(0.01, device=device),
        "sample": (n,),
        "frame": (n, f),
    }[width]
    if isinstance(widths, tuple):
        widths = 0.01 + 0.01 * uniform(*widths)
    named |= {"t": t, "r": r, "weight": uniform(*lead), "guidance": guidance, "width": widths}
    return named | {
        "picked": None if picked is None else torch.tensor(picked, dtype=torch.long, device=device)
    }


def widened(named: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for the formula: fp64, with per-frame times, weights and steps."""
    b, f = named["pred"].shape[:2]
    n = b if named["picked"] is None else len(named["picked"])
    out = {
        k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in named.items()
    }
    for key, count in (("t", b), ("r", b), ("weight", b), ("width", n)):
        value = torch.as_tensor(out[key], dtype=torch.float64, device=named["pred"].device)
        value = value.expand(count) if value.ndim == 0 else value
        out[key] = (value.unsqueeze(1) if value.ndim == 1 else value).expand(count, f)
    out["pred"].requires_grad_()
    return out


@pytest.fixture
def check(assert_matches, assert_gradients):
    """Values in fp32 at least, and the gradient of pred, against the formula."""

    def run(named: dict[str, Any]) -> Tensor:
        named["pred"].requires_grad_()
        named64 = widened(named)
        out, expected = flow_map_loss(**named), formula(named64)
        accumulated = torch.promote_types(named["pred"].dtype, torch.float32)
        assert out.shape == named["pred"].shape[:1] and out.dtype == accumulated
        assert_matches(out, expected)
        assert_gradients([out], [named["pred"]], [expected], [named64["pred"]])
        return out

    return run


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("width", ["number", "scalar", "sample", "frame"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("picked", [None, [3, 1], []])
def test_values_and_gradient(per_frame, width, guidance, picked, backend, draw, check) -> None:
    check(inputs(draw, per_frame=per_frame, picked=picked, guidance=guidance, width=width))


@pytest.mark.parametrize("picked", [[0, 2], [-1, 0, 3, -1], [3, 2, 1, 0]])
def test_dtypes(picked, backend, dtype, draw, check) -> None:
    """Accumulated, and returned, in fp32 at least: a bf16 loss would have two digits. Any order,
    duplicates add.
    """
    check(inputs(draw, dtype, picked=picked, width="frame"))


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (1, 5, 7), (2, 3, 1023), (1, 2, 4, 16, 33), (1, 1, 8, 2, 64)]
)
@pytest.mark.parametrize("picked", [None, [0]])
def test_sizes(shape, picked, backend, draw, check) -> None:
    """Frames of one element and of any number of chunks."""
    check(inputs(draw, torch.bfloat16, shape=shape, picked=picked))


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    shape = tuple(
        data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 3), (1, 3), (1, 700))
    )
    picked = data.draw(st.none() | st.lists(st.integers(-shape[0], shape[0] - 1), max_size=6))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=g, dtype=dtype).to(device)

    kind = data.draw(st.sampled_from(["number", "scalar", "sample", "frame"]))
    guidance, per_frame = data.draw(st.sampled_from([1.0, 2.5])), data.draw(st.booleans())
    named = inputs(
        draw, shape=shape, picked=picked, guidance=guidance, width=kind, per_frame=per_frame
    )
    with use_backend(kernel):
        out = flow_map_loss(**named)
    torch.testing.assert_close(out.double(), formula(widened(named)).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("times", [torch.float32, torch.float64])
def test_velocities_and_times_keep_their_precision(times, backend, draw, check) -> None:
    """bf16 data beside fp32 velocities and fp64 times, whose difference is formed before it is
    rounded.
    """
    named = inputs(draw, torch.bfloat16, picked=[1], times=times, width="sample")
    named |= {key: draw(1, F, C, H, W).detach() for key in ("u_plus", "u_minus")}
    check(named)
    named["r"] = named["t"] - 1e-9  # t and r are one number in fp32
    if times == torch.float64:
        named["width"] = named["width"] * 1e-9
        check(named)


def test_scaled_gradient_in_fp16_does_not_underflow(backend, draw) -> None:
    """Loss scaling works: the mean over a video, a factor of 1e-5, is applied together with the
    scale, not before.
    """
    named = inputs(draw, torch.float16, shape=(1, 2, 30, 50, 33), guidance=1.0)
    named["pred"].requires_grad_()
    named64 = widened(named)
    (actual,) = torch.autograd.grad(flow_map_loss(**named).sum() * 2**14, named["pred"])
    (expected,) = torch.autograd.grad(formula(named64).sum() * 2**14, named64["pred"])
    assert ((actual.double() - expected).abs() <= 2**-9 * expected.abs() + 2**-24).all()


@pytest.mark.parametrize(
    ("picked", "guidance", "need_grad"), [(None, 1.0, True), ([3, 0], 3.0, True), ([1], 3.0, False)]
)
def test_registered_operator(
    picked, guidance, need_grad, backend, draw, assert_matches, assert_gradients
) -> None:
    """``torch.ops.anyflow.flow_map_loss``: on the eager backend too it has a backward formula of
    its own.
    """
    operator, gradient = torch.ops.anyflow.flow_map_loss, torch.ops.anyflow.flow_map_loss_backward
    named = inputs(draw, picked=picked, guidance=guidance, width="sample", per_frame=True)
    named["pred"].requires_grad_(need_grad)
    named64 = widened(named)
    keys = (*TENSORS, "t", "r", "weight", "width", "picked", "guidance")
    args = (*(named[key] for key in keys), need_grad)
    out, residual = operator(*args)
    expected = formula(named64)
    assert_matches(out, expected)
    assert (
        residual.shape == (named["pred"].shape if need_grad else (0,))
        and not residual.requires_grad
    )
    torch.library.opcheck(operator.default, args)
    if need_grad:
        assert_gradients([out], [named["pred"]], [expected], [named64["pred"]])
        torch.library.opcheck(gradient.default, (out.detach(), residual, named["weight"], guidance))


def test_operator_without_need_grad_has_no_gradient(backend, draw) -> None:
    named = inputs(draw)
    named["pred"].requires_grad_()
    args = [named[key] for key in (*TENSORS, "t", "r", "weight")]
    width = torch.tensor(0.01, device=named["pred"].device)
    out, _ = torch.ops.anyflow.flow_map_loss(*args, width, None, 3.0, False)
    with pytest.raises(RuntimeError, match="ran without need_grad"):
        out.sum().backward()


@pytest.mark.parametrize("picked", [None, [3, 0]])
def test_compiles_in_one_graph(picked, backend, draw) -> None:
    named = inputs(draw, picked=picked, width="sample")
    named["pred"].requires_grad_()
    compiled = torch.compile(flow_map_loss, fullgraph=True, backend="aot_eager")
    outputs = compiled(**named), flow_map_loss(**named)
    gradients = [torch.autograd.grad(o.square().sum(), named["pred"]) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradient_flows_to_pred_only(backend, draw) -> None:
    named = inputs(draw, width="sample")
    constants = [named[key].requires_grad_() for key in (*TENSORS[1:], "t", "r", "weight", "width")]
    assert not flow_map_loss(**named).requires_grad
    named["pred"].requires_grad_()
    flow_map_loss(**named).sum().backward()
    assert named["pred"].grad is not None and named["pred"].grad.any()
    assert all(c.grad is None for c in constants)
    with torch.no_grad():
        assert not flow_map_loss(**named).requires_grad


def test_without_neighbors_it_is_flow_matching(backend, draw) -> None:
    named = inputs(draw, guidance=1.0) | {"u_plus": None, "u_minus": None}
    v = named["noise"] - named["latents"]
    expected = named["weight"] * (named["pred"] - v).square().flatten(1).mean(1)
    torch.testing.assert_close(flow_map_loss(**named), expected)
    ignored = {
        "picked": torch.tensor([9], device=v.device),
        "width": torch.zeros(9, device=v.device),
    }
    torch.testing.assert_close(flow_map_loss(**(named | ignored)), expected)


def test_t_equals_r_needs_no_neighbors(backend, draw) -> None:
    """What the methods rely on when they skip the r = t samples: their slope has the factor 0."""
    named = inputs(draw)
    named["r"] = named["t"].clone()
    without = flow_map_loss(**(named | {"u_plus": None, "u_minus": None}))
    assert torch.equal(flow_map_loss(**named), without)


def test_exact_flow_map_of_a_linear_field_has_zero_loss(backend, draw, device) -> None:
    """One data point: u(x, t, r) = (x - x0) / t solves the flow-map equation, so its residual is 0
    at any t, r.
    """
    wide, zero = (torch.float64, 1e-24) if backend == "eager" else (torch.float32, 1e-8)
    x0, eps = (draw(B, F, C, H, W, dtype=torch.float64).detach() for _ in range(2))
    t = torch.tensor([0.9, 0.6, 0.4, 1.0], dtype=torch.float64, device=device)
    r = torch.tensor([0.1, 0.6, 0.0, 0.5], dtype=torch.float64, device=device)
    e, weight = 0.01, torch.ones(B, device=device)
    with use_backend("eager"):  # the kernels take no fp64
        x_t, plus, minus = flow_map_inputs(x0, eps, t, e)

    def u(x: Tensor, at: Tensor) -> Tensor:
        return (x - x0) / at.reshape(B, 1, 1, 1, 1)

    pred, *others = (x.to(wide) for x in (u(x_t, t), u(plus, t + e), u(minus, t - e), x0, eps))
    loss = flow_map_loss(pred, None, *others, t, r, weight, 1.0, 2 * e)
    wrong = flow_map_loss(pred + 0.1, None, *others, t, r, weight, 1.0, 2 * e)
    assert loss.max() < zero
    torch.testing.assert_close(wrong, torch.full_like(wrong, 0.01), rtol=10 * zero**0.5, atol=0.0)


def test_non_contiguous(backend, draw, check) -> None:
    named = inputs(draw, per_frame=True, width="frame", picked=[2, 0, 2])
    plain = flow_map_loss(**named)

    def changed(names: tuple[str, ...], change: Any) -> dict[str, Any]:
        return {k: change(v) if k in names else v for k, v in named.items()}

    for one in (0, 1):  # strides that the kernel takes, and strides that it does not
        strided = changed(
            TENSORS, lambda x, d=one: x.transpose(d, d + 1).contiguous().transpose(d, d + 1)
        )
        assert not strided["pred"].is_contiguous()
        torch.testing.assert_close(check(strided), plain)
    sliced = changed(TENSORS, lambda x: torch.cat([x, x], dim=1)[:, :F])
    torch.testing.assert_close(check(sliced), plain)
    times = changed(("t", "r", "weight", "width"), lambda x: x.t().contiguous().t())
    torch.testing.assert_close(
        check(times | {"picked": named["picked"].repeat_interleave(2)[::2]}), plain
    )
    # slices of one batch, as the methods'
    triple = torch.cat([named["u_plus"], named["u_minus"], named["uncond"]])
    views = dict(zip(("u_plus", "u_minus", "uncond"), triple.split([3, 3, B]), strict=True))
    torch.testing.assert_close(check(named | views), plain)


@pytest.mark.parametrize("shape", [(0, F, C), (B, 0, C), (B, F, 0, 2)])
@pytest.mark.parametrize("picked", [None, []])
def test_empty(shape, picked, backend, draw) -> None:
    """No samples, no losses; the mean of nothing is NaN."""
    named = inputs(draw, shape=shape, picked=picked)
    named["pred"].requires_grad_()
    loss = flow_map_loss(**named)
    assert loss.shape == shape[:1] and loss.isnan().all()
    loss.sum().backward()
    assert named["pred"].grad is not None and named["pred"].grad.shape == shape


def test_index_of_no_sample(backend, draw, device, monkeypatch) -> None:
    """Found on the CPU, where reading is free; else it makes the nearest sample's loss NaN, and
    nothing is raised.
    """
    named = inputs(draw, picked=[1, 2, 0], width="sample")
    named["pred"].requires_grad_()
    expected = flow_map_loss(**named)
    bad = {"picked": torch.tensor([1, 2, B], device=device)}
    if device.type == "cpu":
        for picked in (bad["picked"], torch.tensor([-B - 1, 0, 0])):
            with pytest.raises(ValueError, match=r"picked must be in \[-4, 4\)"):
                flow_map_loss(**(named | {"picked": picked}))
    if backend == "native" and device.type == "cpu":
        return  # its C++ looks at every index itself
    monkeypatch.setattr(_frames, "on_host", lambda picked: False)  # as on a GPU
    torch.testing.assert_close(flow_map_loss(**named), expected)
    loss = flow_map_loss(**(named | bad))
    assert loss[3].isnan() and torch.equal(loss[1:3], expected[1:3]) and loss[0].isfinite()
    loss.sum().backward()
    assert named["pred"].grad[3].isnan().all() and named["pred"].grad[:3].isfinite().all()
    loss = flow_map_loss(**(named | {"picked": torch.tensor([1, 2, -(10**12)], device=device)}))
    assert loss.isnan().tolist() == [True, False, False, False]


def test_fp64_runs_eagerly(kernel, draw) -> None:
    named = inputs(draw)
    with use_backend(kernel):
        for key in TENSORS:
            with pytest.raises(ValueError, match=f"flow_map_loss: backend '{kernel}' .* float64"):
                flow_map_loss(**(named | {key: named[key].double()}))


@pytest.mark.parametrize("per_frame", [False, True])
def test_gradcheck(per_frame, draw) -> None:
    named = inputs(draw, torch.float64, per_frame=per_frame, picked=[2, 0, 2], width="sample")
    named = {k: v[..., :2, :1] if k in TENSORS else v for k, v in named.items()}
    pred = named.pop("pred").requires_grad_()
    assert torch.autograd.gradcheck(lambda p: flow_map_loss(p, **named), pred)


X, T = torch.zeros(B, F, C, H, W), torch.zeros(B)
GOOD: dict[str, Any] = dict.fromkeys(TENSORS, X) | {
    "t": T, "r": T, "weight": T, "guidance": 3.0, "width": 0.01, "picked": None
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pred": T}, "pred must be"),
        ({"pred": X.long()}, "pred must be"),
        ({"uncond": X[:2]}, "uncond must have the shape of pred"),
        ({"uncond": X.long()}, "uncond must have the shape of pred"),
        ({"latents": X[:, :1]}, "latents must have the shape of pred"),
        ({"noise": X[..., :1]}, "noise must have the shape of pred"),
        ({"noise": X.to("meta")}, "noise is on meta"),
        ({"t": T[:2]}, "t must be"),
        ({"t": T.long()}, "t must be"),
        ({"r": T[:2]}, "r must be"),
        ({"weight": torch.zeros(B, F + 1)}, "weight must be"),
        ({"weight": T.bool()}, "weight must be"),
        ({"weight": T.to("meta")}, "weight is on meta"),
        ({"r": torch.zeros(B, F)}, "one shape"),
        ({"guidance": 0.0}, "guidance must be a finite number > 0"),
        ({"guidance": -1.0}, "guidance must be a finite number > 0"),
        ({"guidance": float("nan")}, "guidance must be a finite number > 0"),
        ({"uncond": None}, "needs the unconditional prediction"),
        ({"u_minus": None}, "given together"),
        ({"u_plus": None}, "given together"),
        ({"u_plus": X[:2]}, "u_plus must be"),
        ({"u_plus": X.long()}, "u_plus must be"),
        ({"u_minus": X[:, :1]}, "u_minus must be"),
        ({"u_minus": X.to("meta")}, "u_minus is on meta"),
        ({"picked": torch.tensor([0])}, "u_plus must be"),
        ({"picked": torch.ones(B, dtype=torch.bool)}, "picked must be"),
        ({"picked": torch.arange(B, device="meta")}, "picked is on meta"),
        ({"picked": torch.arange(1, B + 1)}, "picked must be in"),
        ({"width": T[:2]}, "width must be"),
        ({"width": T.long()}, "width must be"),
        ({"width": torch.zeros(B, F + 1)}, "width must be"),
        ({"width": T.to("meta")}, "width is on meta"),
        ({"width": T[0].to("meta")}, "width is on meta"),
    ],
)
def test_bad_input(changes, message) -> None:
    with pytest.raises(ValueError, match=f"flow_map_loss: .*{message}"):
        flow_map_loss(**(GOOD | changes))
