"""residual_layer_norm: what it keeps, what its norm reads, and a norm of large or equal numbers."""

import pytest
import torch
from checks import DEVICE
from formulas import expected

from anyflow.ops import layer_norm_modulate, residual_layer_norm, use_backend
from anyflow.ops.examples import RESIDUAL_VARIANTS, Arguments, moved
from anyflow.ops.examples import residual_layer_norm as example

every_variant = pytest.mark.parametrize("variant", RESIDUAL_VARIANTS)


def arguments(variant: str, dtype: torch.dtype = torch.float32, dim: int = 8) -> Arguments:
    return example(variant, 6, dim, 2, batch=2).arguments(DEVICE, dtype)


@every_variant
def test_kernel_saves_no_more_than_it_needs(kernel, variant) -> None:
    """h in place of x, and y only where there is a gate.

    Through the eager reference autograd saves what it likes.
    """
    named = arguments(variant)
    saved: list[int] = []
    with (
        use_backend(kernel),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.data_ptr()) or t, lambda t: t
        ),
    ):
        h, n = residual_layer_norm(**named)
    assert h.data_ptr() in saved
    assert not {n.data_ptr(), named["x"].data_ptr()} & set(saved)
    assert (named["y"].data_ptr() in saved) == ("gate" in RESIDUAL_VARIANTS[variant])


def test_norm_reads_the_rounded_sum(backend) -> None:
    """n is the norm of the h that is returned, so that h can be handed on alone."""
    named = arguments("gate+modulation", torch.bfloat16)
    h, n = residual_layer_norm(**named)
    assert torch.equal(n, layer_norm_modulate(h, named["shift"], named["scale"]))


@pytest.mark.parametrize("variant", ["gate+affine", "modulation"])
def test_large_offset_does_not_cancel(variant, backend, draw) -> None:
    """Expect the accuracy of layer_norm_modulate, with a sum good to one fp32 step at 1e4."""
    named = {k: None if v is None else v.detach() for k, v in arguments(variant, dim=64).items()}
    named["x"] = (1e4 + draw(2, 6, 64, dtype=torch.float64)).float().detach()
    h, n = residual_layer_norm(**named)
    exact = expected("residual_layer_norm", moved(named, DEVICE, torch.float64), (h, n))
    assert (h.double() - exact[0]).abs().max() < 1e-3
    assert (n.double() - exact[1]).abs().max() < 5e-3


@every_variant
def test_constant_tokens_give_the_offset(variant, backend) -> None:
    named = arguments(variant) | {"gate": None}
    x, y = torch.full_like(named["x"], 3.0), torch.zeros_like(named["y"])
    h, n = residual_layer_norm(**named | {"x": x, "y": y})
    offset = torch.zeros_like(n) if named["bias"] is None else named["bias"].expand_as(n)
    if named["shift"] is not None:
        offset = named["shift"].repeat_interleave(3, dim=1)
    assert (h == 3).all()
    torch.testing.assert_close(n, offset)
