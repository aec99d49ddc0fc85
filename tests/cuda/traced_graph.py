"""Trace what a CUDA graph records: evaluations as ``anyflow.models.cuda_graph`` makes them."""

from typing import Any

import pytest
import torch

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.network import evaluate

CUDA = torch.device("cuda", 0)
LAYERS = 2


@pytest.mark.parametrize("per_frame", [False, True])
@torch.no_grad()
def test_an_evaluation_that_is_recorded_asks_nothing_of_the_host(
    per_frame: bool, device: Any
) -> None:
    """Allow an evaluation no wait, no copy from the host and no random number.

    The rotary tables are those of the first evaluation, not new ones.
    """
    with torch.device("meta"), device.fakes:
        model = AnyFlowTransformer3DModel(
            num_attention_heads=2, text_dim=32, ffn_dim=64, num_layers=LAYERS
        )
    device.parameters(model, torch.bfloat16)
    x = torch.empty(1, 3, 16, 4, 4, dtype=torch.bfloat16, device=CUDA)
    t = torch.empty((1, 3) if per_frame else (1,), device=CUDA)
    text = torch.empty(1, 5, 32, dtype=torch.bfloat16, device=CUDA)

    runs = []
    for _ in range(2):
        device.clear()
        evaluate(model, x, timestep=t, r_timestep=t, encoder_hidden_states=text)
        runs.append([call.operator for call in device.calls])
        assert device.waits == []
    first, recorded = runs
    assert sum(name == "anyflow.gated_residual.default" for name in recorded) == LAYERS
    # the rotary tables are made once; the sinusoids of both times are of every evaluation
    assert first.count("aten.cos.default") > recorded.count("aten.cos.default") == 2
    assert not [
        name for name in recorded if "rand" in name or "normal" in name or "dropout" in name
    ]
    assert all(
        t.device == CUDA
        for call in device.calls
        for t in call.arguments
        if isinstance(t, torch.Tensor)
    )
    assert len(model.rope._cache) == 1  # what the recording keeps alive
