"""Check that every setting of a transformer is checked before anything is built."""

from typing import Any

import numpy as np
import pytest

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.configuration import LIMITS
from anyflow.models.wan import WanTransformer3DModel

TINY: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 2, "out_channels": 2,
    "text_dim": 8,
    "freq_dim": 8, "ffn_dim": 16, "num_layers": 1,
}  # fmt: skip
SIZES = [10**9, 10**400, 0, -1, 2.0, True, "2", float("nan"), [2], None]


@pytest.mark.parametrize("kind", [AnyFlowTransformer3DModel, WanTransformer3DModel])
@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size)[:12])
def test_a_size_that_cannot_be_is_refused(kind: type, name: str, size: Any) -> None:
    if size is None and name in ("out_channels", "image_dim"):
        return
    with pytest.raises(ValueError, match=name):
        kind(**(TINY | {name: size}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patch_size", (1, 2)), ("patch_size", "122"), ("patch_size", (1, 2, 10**9)),
        ("patch_size", (1, 2, True)),
        ("patch_size", None), ("eps", float("nan")), ("eps", 0), ("eps", 10**400), ("eps", "1"),
        ("eps", 1e300),
        ("gate_value", 1e300), ("gate_value", 10**400), ("gate_value", float("nan")),
        ("gate_value", True),
        ("gate_value", "0.25"), ("deltatime_type", []), ("r_embedder_fusion", 3),
        ("r_embedder", "false"),
        ("cross_attn_norm", 1), ("attention_head_dim", 13),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as raised:
        AnyFlowTransformer3DModel(**(TINY | {name: value}))
    assert len(str(raised.value)) < 300


def test_the_width_is_bounded_and_numpys_integers_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match="num_attention_heads \\* attention_head_dim"):
        AnyFlowTransformer3DModel(
            **(TINY | {"num_attention_heads": 1024, "attention_head_dim": 1024})
        )
    assert len(AnyFlowTransformer3DModel(**(TINY | {"num_layers": np.int64(2)})).blocks) == 2
    with pytest.raises(ValueError, match="qk_norm"):
        WanTransformer3DModel(**TINY, qk_norm="layer_norm")
