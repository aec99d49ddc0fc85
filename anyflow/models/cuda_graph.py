"""A transformer whose evaluations at sampling are one CUDA graph, launched at once instead of
kernel by kernel.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.network import evaluate, has_hooks
from anyflow.models.transformer import TextContext, TimeEmbedding


class CudaGraphTransformer:
    """Stands for a transformer in :func:`anyflow.sampling.sample`; the numbers are those of the
    transformer.

    The first evaluation of a shape runs as ever and is recorded; the others, in this call of the
    sampler and in later ones, replay the recording. That saves the time to launch kernels one by
    one, which counts where they are short: small models, few frames. The recording keeps the memory
    of one evaluation until :meth:`reset`. Another shape, or weights that have moved, are recorded
    anew; forced attention and operator backends, and the adapters that are switched on, are those
    of the recording.

    Raises:
        ValueError: the transformer is not on a CUDA device, or its weights come and go
            (offloading).
    """

    def __init__(self, transformer: AnyFlowTransformer3DModel) -> None:
        if transformer.device.type != "cuda":
            raise ValueError(
                "a CUDA graph needs a transformer on a CUDA device, this one is on "
                f"{transformer.device}"
            )
        if has_hooks(transformer):
            raise ValueError(
                "a CUDA graph needs weights that stay where they are, those of this transformer do "
                "not"
            )
        self.transformer = transformer
        self.config = transformer.config
        self._recording: _Recording | None = None
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Drop the recording and free its memory."""
        with self._lock:
            self._recording = None

    def embed_time(self, timestep: Tensor, r_timestep: Tensor | None = None) -> TimeEmbedding:
        """Of the transformer."""
        return self.transformer.embed_time(timestep, r_timestep)

    def encode_text(self, encoder_hidden_states: Tensor) -> TextContext:
        """Of the transformer."""
        return self.transformer.encode_text(encoder_hidden_states)

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Tensor,
        *,
        time_embedding: TimeEmbedding,
        text_context: TextContext,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The velocity ``[B, F, C_out, H, W]`` of ``hidden_states[B, F, C, H, W]``, in a
        1-tuple.
        """
        key = _Key.of(self.transformer, hidden_states, time_embedding, text_context)
        with self._lock:  # a recording has one set of inputs
            if self._recording is None or self._recording.key != key:
                self._recording = None  # frees its memory before the next one is made
                self._recording, velocity = _record(
                    self.transformer, key, hidden_states, time_embedding, text_context
                )
                return (velocity,)
            return (self._recording.replay(hidden_states, time_embedding, text_context),)


class _Key(NamedTuple):
    """What a recording holds for: shapes and types of the inputs, and where the weights are."""

    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    weights: tuple[int, ...]

    @classmethod
    def of(
        cls, model: AnyFlowTransformer3DModel, x: Tensor, times: TimeEmbedding, text: TextContext
    ) -> _Key:
        tensors = (x, times.emb, times.modulation, *(t for pair in text.key_values for t in pair))
        return cls(
            tuple((t.shape, t.dtype) for t in tensors),
            tuple(p.data_ptr() for p in model.parameters()),
        )


class _Recording:
    """A graph with the tensors that it reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        key: _Key,
        inputs: tuple[Tensor, TimeEmbedding, TextContext],
        text: TextContext,
        output: Tensor,
        rotary: object,
    ) -> None:
        self.graph, self.key, self._output = graph, key, output
        self._x, self._times, self._text = inputs
        self._text_given = text
        # the graph reads them: the model's cache of tables may let go of them
        self._rotary = rotary

    def replay(self, x: Tensor, times: TimeEmbedding, text: TextContext) -> Tensor:
        self._x.copy_(x)
        self._times.emb.copy_(times.emb)
        self._times.modulation.copy_(times.modulation)
        if text is not self._text_given:  # the same one at every step of a call
            for own, given in zip(self._text.key_values, text.key_values, strict=True):
                for target, source in zip(own, given, strict=True):
                    target.copy_(source)
            self._text_given = text
        self.graph.replay()
        return self._output.clone()


def _record(
    model: AnyFlowTransformer3DModel, key: _Key, x: Tensor, times: TimeEmbedding, text: TextContext
) -> tuple[_Recording, Tensor]:
    """A recording of the model on copies of its inputs, and the velocity of a first run that
    prepares the kernels.
    """
    # what inference mode makes could not be written to outside of it
    with torch.inference_mode(False):
        inputs = (
            x.clone(),
            TimeEmbedding(times.emb.clone(), times.modulation.clone()),
            TextContext(tuple((k.clone(), v.clone()) for k, v in text.key_values)),
        )

    def run() -> Tensor:
        return evaluate(model, inputs[0], time_embedding=inputs[1], text_context=inputs[2])

    with torch.cuda.device(x.device):
        current, side = torch.cuda.current_stream(), _side_stream(x.device)
        side.wait_stream(current)
        # compiles the kernels, chooses among them, gives cuBLAS its workspace
        with torch.cuda.stream(side):
            velocity = run()
        current.wait_stream(side)
        velocity.record_stream(current)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the driver meanwhile is no part of the recording and need not
        # fail.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            output = run()
    rotary = tuple(model.rope._cache.values())
    return _Recording(graph, key, inputs, text, output, rotary), velocity


_side_streams: dict[torch.device, torch.cuda.Stream] = {}
_side_streams_lock = threading.Lock()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device for recordings: cuBLAS keeps a workspace for every stream
    that it has met.
    """
    with _side_streams_lock:
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)
        return _side_streams[device]
