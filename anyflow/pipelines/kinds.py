"""Tell causal models from bidirectional ones, and refuse those of the other pipeline."""

from __future__ import annotations

from torch import nn

from anyflow.models.configuration import CausalSettings
from anyflow.models.network import unwrapped
from anyflow.pipelines.layout import causal_settings


def settings_of_module(transformer: nn.Module) -> CausalSettings | None:
    """Return the settings of a causal transformer; None for a bidirectional one."""
    config = getattr(unwrapped(transformer), "config", {})
    # a module that was loaded has the name of a class that its file has
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    return causal_settings("the transformer", own)


def require_kind(
    settings: CausalSettings | None, *, causal: bool, name: str = "the transformer"
) -> None:
    """Refuse a causal model in a bidirectional pipeline, or the reverse.

    Args:
        settings: those of the model, None for a bidirectional one.
        causal: whether the pipeline is of causal models.
        name: names the model in the error.

    Raises:
        ValueError: the model is of the other kind.
    """
    if settings is not None and not causal:
        raise ValueError(
            f"{name} is a causal model, which makes a video chunk by chunk: use "
            "anyflow.pipelines.AnyFlowFARPipeline, or anyflow.formats.load_transformer(..., "
            "bidirectional=True) and transformer=... for its bidirectional part"
        )
    if settings is None and causal:
        raise ValueError(
            f"{name} is a bidirectional model, which has no chunks: use "
            "anyflow.pipelines.AnyFlowPipeline, or make it causal by anyflow convert --causal and "
            "training"
        )


def refuse_graph(cuda_graph: bool, *, causal: bool) -> None:
    """Raise a ValueError for a CUDA graph of a causal model."""
    if cuda_graph and causal:
        raise ValueError(
            "cuda_graph=True is not available for a causal model, whose evaluations grow with its "
            "cache: leave it out; compile=True makes the blocks faster"
        )
