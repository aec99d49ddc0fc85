"""residual_layer_norm and gated_residual against the textbook formula in fp64."""

import pytest
import torch
from torch import Tensor

from anyflow.ops import gated_residual, layer_norm_modulate, residual_layer_norm

SHAPES = {"x": "BLD", "y": "BLD", "gate": "BRD", "weight": "D", "bias": "D", "shift": "BRD", "scale": "BRD"}
VARIANTS = {
    "plain": (),
    "gate": ("gate",),
    "affine": ("weight", "bias"),
    "weight-only": ("gate", "weight"),
    "gate-affine": ("gate", "weight", "bias"),
    "modulation": ("shift", "scale"),
    "gate-modulation": ("gate", "shift", "scale"),
}


def per_token(rows: Tensor, length: int) -> Tensor:
    return rows[:, torch.arange(length) // max(length // rows.shape[1], 1)]


def formula(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    rounded_to: torch.dtype = torch.float64,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """h rounded to a dtype (with the gradient of the unrounded one), then the norm of what was rounded."""
    h = x + y * (1 if gate is None else per_token(gate, x.shape[1]))
    h = h + (h.to(rounded_to).double() - h).detach()
    centered = h - h.mean(-1, keepdim=True)
    n = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + eps)
    n = n if weight is None else n * weight
    n = n if bias is None else n + bias
    if shift is not None and scale is not None:
        n = n * (1 + per_token(scale, x.shape[1])) + per_token(shift, x.shape[1])
    return h, n


def inputs(
    g: torch.Generator, names: tuple[str, ...], b: int, length: int, d: int, r: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    sizes = {"B": b, "L": length, "D": d, "R": r}
    return {
        name: torch.randn([sizes[k] for k in SHAPES[name]], generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for name in ("x", "y", *names)
    }


def doubled(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in named.items()}


@pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("b", "length", "d", "r"), [(2, 12, 16, 1), (2, 12, 16, 3), (1, 5, 7, 5)])
def test_values_and_gradients(names, b, length, d, r, dtype, generator, assert_matches, assert_gradients) -> None:
    named = inputs(generator, names, b, length, d, r, dtype)
    named64 = doubled(named)
    out, expected = residual_layer_norm(**named), formula(**named64, rounded_to=dtype)
    for o, e in zip(out, expected, strict=True):
        assert o.dtype == dtype and o.shape == (b, length, d)
        assert_matches(o, e)
    assert_gradients(out, list(named.values()), expected, list(named64.values()))


@pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
def test_tokens_in_bf16_parameters_in_fp32(names, generator, assert_matches, assert_gradients) -> None:
    named = inputs(generator, names, 2, 6, 8, 2, torch.float32)
    for token in ("x", "y"):
        named[token] = named[token].detach().bfloat16().requires_grad_()
    named64 = doubled(named)
    out, expected = residual_layer_norm(**named), formula(**named64, rounded_to=torch.bfloat16)
    for o, e in zip(out, expected, strict=True):
        assert o.dtype == torch.bfloat16
        assert_matches(o, e)
    assert_gradients(out, list(named.values()), expected, list(named64.values()))


def test_norm_reads_the_rounded_sum(generator) -> None:
    """n is the norm of the h that is returned, so that h can be handed on without a second tensor."""
    named = inputs(generator, ("gate", "shift", "scale"), 2, 6, 8, 2, torch.bfloat16)
    h, n = residual_layer_norm(**named)
    assert torch.equal(n, layer_norm_modulate(h, named["shift"], named["scale"]))


def test_eps_is_used(generator, assert_matches) -> None:
    named = inputs(generator, ("weight", "bias"), 1, 4, 8, 1, torch.float64)
    assert_matches(residual_layer_norm(**named, eps=0.5)[1].detach(), formula(**named, eps=0.5)[1].detach())


@pytest.mark.parametrize("names", [("gate", "weight", "bias"), ("gate", "shift", "scale")])
def test_large_offset_does_not_cancel(names, generator) -> None:
    named = inputs(generator, names, 2, 6, 64, 1, torch.float32)
    named["x"] = (named["x"].detach().double() + 1e4).float()
    n = residual_layer_norm(**named)[1]
    expected = formula(**doubled(named), rounded_to=torch.float32)[1]
    # One fp32 step at 1e4 is 1e-3: the rounded sum may differ in its last bit before it is normalized.
    assert (n.double() - expected).abs().max() < 5e-3 and (n.double() - expected).abs().mean() < 5e-4


@pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
def test_empty(names, generator) -> None:
    named = inputs(generator, names, 0, 6, 8, 2, torch.float32)
    h, n = residual_layer_norm(**named)
    assert h.shape == n.shape == (0, 6, 8)
    (h.sum() + n.sum()).backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in named.values() if t is not named.get("scale"))


@pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
def test_non_contiguous(names, generator) -> None:
    named = inputs(generator, names, 2, 6, 8, 3, torch.float32)
    strided = {k: v.transpose(-1, 0).contiguous().transpose(-1, 0) for k, v in named.items()}
    assert not strided["x"].is_contiguous()
    for a, b in zip(residual_layer_norm(**strided), residual_layer_norm(**named), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
def test_gradcheck(names, generator) -> None:
    named = inputs(generator, names, 2, 4, 3, 2, torch.float64)
    keys = list(named)
    assert torch.autograd.gradcheck(
        lambda *values: residual_layer_norm(**dict(zip(keys, values, strict=True))), tuple(named.values())
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("r", [1, 3])
def test_gated_residual_is_the_first_result(gated, r, dtype, generator) -> None:
    named = inputs(generator, ("gate",) if gated else (), 2, 6, 8, r, dtype)
    assert torch.equal(gated_residual(**named), residual_layer_norm(**named)[0])


@pytest.mark.parametrize("gated", [False, True])
def test_wider_branch_is_rounded_once(gated) -> None:
    """x in bf16, y in fp32: 1 + (1/256 + tiny) rounds up; rounding y first would make it a tie, to even, down."""
    x, y = torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.full((1, 1, 2), 2**-8 + 2**-20)
    gate = torch.ones(1, 1, 2) if gated else None
    assert (gated_residual(x, y, gate) == 1 + 2**-7).all()


X, ROW, VECTOR = torch.zeros(2, 6, 4), torch.zeros(2, 1, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"x": X[0], "y": X[0]}, "x must be"),
        ({"x": X, "y": X[:, :3]}, "y must have the shape of x"),
        ({"y": X.to("meta")}, "y is on meta"),
        ({"gate": VECTOR}, "gate must be"),
        ({"gate": torch.zeros(2, 4, 4)}, "must divide the L=6"),
        ({"gate": ROW.to("meta")}, "gate is on meta"),
        ({"weight": torch.zeros(3)}, "weight must be"),
        ({"weight": VECTOR.to("meta")}, "weight is on meta"),
        ({"weight": VECTOR, "bias": torch.zeros(1)}, "bias must be"),
        ({"bias": VECTOR}, "bias needs weight"),
        ({"shift": ROW}, "given together"),
        ({"scale": ROW}, "given together"),
        ({"shift": ROW, "scale": torch.zeros(2, 3, 4)}, "one shape"),
        ({"shift": ROW[..., :2], "scale": ROW}, "shift must be"),
        ({"weight": VECTOR, "shift": ROW, "scale": ROW}, "not both"),
    ],
)
def test_bad_input(named, message) -> None:
    with pytest.raises(ValueError, match=f"residual_layer_norm: .*{message}"):
        residual_layer_norm(**{"x": X, "y": X, **named})
