"""Evaluate a transformer at sampling by one CUDA graph, launched at once."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.network import evaluate, has_hooks


class CudaGraphTransformer:
    """Stand for a transformer in :func:`anyflow.sampling.sample`, with the same numbers.

    The first evaluation of a shape runs kernel by kernel and is recorded; the others, in this call
    of the sampler and in later ones, replay the recording. Replaying saves the time to launch
    kernels one by one, which counts where they are short: small models, few frames. The recording
    keeps the memory of one evaluation until :meth:`reset`. Another shape, or weights that have
    moved, are recorded anew. Forced attention and operator backends, and the adapters that are
    switched on, are those of the recording.

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

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor,
        r_timestep: Tensor | None,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the velocity ``[B, F, C_out, H, W]`` in a 1-tuple, for the model's arguments."""
        inputs = _GraphInputs(hidden_states, timestep, r_timestep, encoder_hidden_states)
        key = _Key.of(self.transformer, inputs)
        with self._lock:  # a recording has one set of inputs
            if self._recording is None or self._recording.key != key:
                self._recording = None  # frees its memory before the next one is made
                self._recording, velocity = _record(self.transformer, key, inputs)
                return (velocity,)
            return (self._recording.replay(inputs),)


class _GraphInputs(NamedTuple):
    """Hold the tensors that an evaluation reads."""

    x: Tensor
    t: Tensor
    r: Tensor | None
    text: Tensor


class _Key(NamedTuple):
    """Hold what a recording is for: shapes and types of the inputs, and where the weights are."""

    inputs: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, model: AnyFlowTransformer3DModel, inputs: _GraphInputs) -> _Key:
        return cls(
            tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in inputs),
            tuple(p.data_ptr() for p in model.parameters()),
        )


class _Recording:
    """Hold a graph with the tensors that it reads and writes."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        key: _Key,
        inputs: _GraphInputs,
        output: Tensor,
        rotary: object,
    ) -> None:
        self.graph, self.key = graph, key
        self._inputs, self._output = inputs, output
        # the graph reads them: the model's cache of tables may let go of them
        self._rotary = rotary

    def replay(self, inputs: _GraphInputs) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        self.graph.replay()
        return self._output.clone()


def _record(
    model: AnyFlowTransformer3DModel, key: _Key, inputs: _GraphInputs
) -> tuple[_Recording, Tensor]:
    """Record the model on copies of its inputs; return also the velocity of a run before."""
    # what inference mode makes could not be written to outside of it
    with torch.inference_mode(False):
        r = None if inputs.r is None else inputs.r.clone()
        own = _GraphInputs(inputs.x.clone(), inputs.t.clone(), r, inputs.text.clone())

    def run() -> Tensor:
        return evaluate(
            model, own.x, timestep=own.t, r_timestep=own.r, encoder_hidden_states=own.text
        )

    with torch.cuda.device(own.x.device):
        current, side = torch.cuda.current_stream(), _side_stream(own.x.device)
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
    return _Recording(graph, key, own, output, rotary), velocity


_side_streams: dict[torch.device, torch.cuda.Stream] = {}
_side_streams_lock = threading.Lock()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream of a device for recordings.

    cuBLAS keeps a workspace for every stream that it has met.
    """
    with _side_streams_lock:
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)
        return _side_streams[device]
