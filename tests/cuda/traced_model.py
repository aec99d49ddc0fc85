"""Run the whole model on fake CUDA tensors: operators, backends, dtypes and layouts."""

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from anyflow.kernels.launch import record
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.blocks import AnyFlowTransformerBlock
from anyflow.models.linear import linear_gelu
from anyflow.ops import backend_report
from anyflow.ops.backend import choose

BF16 = torch.bfloat16
HEADS, HEAD_DIM, LAYERS = 12, 128, 2  # of the 1.3B model, but for the layers
DIM, TOKENS = HEADS * HEAD_DIM, 21 * 30 * 52  # 480 x 832 x 81
PER_BLOCK = {
    "layer_norm_modulate": 1,
    "rms_norm_rope": 4,
    "residual_layer_norm": 2,
    "gated_residual": 1,
}
COPIES = ("aten.clone", "aten._to_copy", "aten.copy_", "aten.contiguous", "aten._unsafe_view")


class CuDNN(TorchFunctionMode):
    """Run cuDNN's attention, as torch does on Hopper, where only a real device can choose it.

    Attributes:
        operands: (shape, stride, dtype) of query, key and value of each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **({} if kwargs is None else kwargs))
        self.operands.append([(t.shape, t.stride(), t.dtype) for t in args])
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in args)
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            *args, None, gradient, 0.0, False, False
        )[0]


def network(device: Any, dtype: torch.dtype) -> AnyFlowTransformer3DModel:
    with torch.device("meta"), device.fakes:
        model = AnyFlowTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=8960, num_layers=LAYERS
        )
    return device.parameters(model, dtype)


def run(device: Any, variant: str, rows: int) -> tuple[CuDNN, Tensor]:
    """Run one forward, and a backward unless the variant is ``"inference"``.

    The model is bf16 but for ``"autocast"``.
    """
    model = network(device, torch.float32 if variant == "autocast" else BF16)
    if variant == "autocast":
        model.enable_gradient_checkpointing()
    x, text = (
        torch.empty(shape, dtype=BF16, device="cuda")
        for shape in ((1, 21, 16, 60, 104), (1, 512, 4096))
    )
    t = torch.empty((1,) if rows == 1 else (1, rows), device="cuda")
    device.clear()
    with CuDNN() as attention:
        with (
            torch.set_grad_enabled(variant != "inference"),
            torch.autocast("cuda", BF16, enabled=variant == "autocast", cache_enabled=False),
        ):
            out = model(x, t, t, text).sample
        if variant != "inference":
            # torch.autograd.backward itself, which is one call to a mode that is off inside of it
            engine, gradient = torch.autograd.Variable._execution_engine, torch.empty_like(out)
            engine.run_backward(
                (out,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
    return attention, out


@pytest.mark.parametrize(("variant", "rows"), [("inference", 1), ("training", 21), ("autocast", 1)])
def test_every_operator_of_the_model_is_a_kernel(variant: str, rows: int, device: Any) -> None:
    attention, out = run(device, variant, rows)
    assert out.dtype == BF16 and out.device.type == "cuda" and device.waits == []

    forward = {op: LAYERS * n for op, n in PER_BLOCK.items()}
    # the blocks, in the backward pass
    again = Counter(forward) if variant == "autocast" else Counter()
    forward["layer_norm_modulate"] += 1
    forward["dual_timestep_embedding"] = 1
    backward = {} if variant == "inference" else {f"{op}_backward": n for op, n in forward.items()}
    assert device.counts() == Counter(forward) + Counter(backward) + again
    assert not any(choice.fallbacks for choice in backend_report("cuda").values())

    check_dtypes(device, rows)
    check_attention(device, attention, calls=LAYERS * (4 if variant == "autocast" else 2))
    check_copies(device)
    check_launches(device)


def check_dtypes(device: Any, rows: int) -> None:
    """Check that tokens are bf16, and modulation and tables fp32 with R rows.

    The tokens before the output projection are fp32, too.
    """
    for call in device.calls:
        if not call.operator.startswith("anyflow.") or "embedding" in call.operator:
            continue
        tokens = [o for o in call.operands if o[0][:2] == (1, TOKENS) or o[0][:2] == (1, 512)]
        modulation = [o for o in call.operands if len(o[0]) == 3 and o[0][1] == rows]
        tables = [o for o in call.operands if o[0] == (TOKENS, HEAD_DIM // 2)]
        last = (
            call.operator.startswith("anyflow.layer_norm_modulate")
            and tokens[0][2] == torch.float32
        )
        assert tokens and {o[2] for o in tokens} == ({torch.float32} if last else {BF16}), (
            call.operator
        )
        assert {o[2] for o in (*modulation, *tables)} <= {torch.float32}
        assert (
            len(modulation)
            + len(tables)
            + ("rms_norm" in call.operator)
            + ("residual" in call.operator)
            > 0
        )


def check_attention(device: Any, attention: CuDNN, calls: int) -> None:
    """Check that query, key, value and result are ``[B, H, L, Dh]`` views of contiguous tokens."""
    assert len(attention.operands) == calls
    for operands in attention.operands:
        for shape, stride, dtype in operands:
            assert shape[1] == HEADS and shape[3] == HEAD_DIM and dtype == BF16
            assert stride == (shape[2] * DIM, HEAD_DIM, DIM, 1)
    kernels = [call for call in device.calls if "cudnn_attention" in call.operator]
    gradients = [call for call in kernels if "backward" in call.operator]
    assert len(kernels) == calls + len(gradients) and len(gradients) in (0, 2 * LAYERS)
    for call in kernels:
        for result in (
            r
            for r in call.result
            if isinstance(r, Tensor) and r.ndim == 4 and r.shape[3] == HEAD_DIM
        ):
            assert result.stride()[1:] == (HEAD_DIM, DIM, 1)


def check_copies(device: Any) -> None:
    """Check that only the latents are copied, into patches and back, and changes of dtype."""
    for call in device.calls:
        if not call.operator.startswith(COPIES) or not call.operands:
            continue
        shape, _, dtype = call.operands[0]
        large = (
            shape.numel() >= 512 * DIM
            and shape[-1] in (DIM, HEAD_DIM, 8960)
            and shape[:2] in [(1, TOKENS), (1, 512)]
        )
        if large:
            assert call.operator.startswith("aten._to_copy") and call.result.dtype != dtype, (
                call.operator
            )


class Copied(TorchDispatchMode):
    """Collect the operators that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # not what finishes a sum
        if str(function).startswith(COPIES) and args[0].numel() >= DIM * 21:
            self.copies.append(str(function))
        return function(*args, **({} if kwargs is None else kwargs))


def check_launches(device: Any) -> None:
    """Check that kernels launch on the very tensors of the model, and none is copied before."""
    with _disable_current_modes():
        for call in device.calls:
            namespace, name = call.operator.split(".")[:2]
            if namespace != "anyflow":
                continue
            op, direction = (
                name.removesuffix("_backward"),
                "backward" if name.endswith("_backward") else "forward",
            )
            assert choose(op, torch.device("cuda"), lambda *_: None, ()) == "triton"
            wrapper = getattr(importlib.import_module(f"anyflow.kernels.{op}"), direction)
            with record() as launches, Copied() as copied:
                wrapper(*tree_map_only(Tensor, on_meta, call.arguments))
            assert launches and not copied.copies, (name, copied.copies)


def on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def test_gelu_is_in_the_epilogue_of_the_product(device: Any) -> None:
    """Require one product and no copy of the feed-forward without a gradient."""
    x = torch.empty(1, TOKENS, DIM, dtype=BF16, device="cuda")
    weight, bias = (
        torch.empty(shape, dtype=BF16, device="cuda") for shape in ((8960, DIM), (8960,))
    )
    device.clear()
    assert linear_gelu(x, weight, bias).shape == (1, TOKENS, 8960)
    assert device.counts("aten")["_addmm_activation"] == 1
    assert not [call for call in device.calls if call.operator.startswith(COPIES[:4])]


def test_a_compiled_block_keeps_the_operators(device: Any) -> None:
    """Require one graph forward and one backward of torch.compile, with the same operators."""
    with torch.device("meta"), device.fakes:
        block = AnyFlowTransformerBlock(DIM, 8960, HEADS, cross_attn_norm=True, eps=1e-6)
    device.parameters(block, BF16)
    graphs: list[Counter[str]] = []

    def keep(graph: Any, inputs: Any) -> Any:
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        graphs.append(Counter(name.split(".")[1] for name in names if name.startswith("anyflow.")))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        block, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    with _disable_current_modes(), device.fakes:  # torch.compile takes no modes but the fakes'
        x = torch.empty(1, 42, DIM, dtype=BF16, device="cuda", requires_grad=True)
        text, modulation = (
            torch.empty(1, 5, DIM, dtype=BF16, device="cuda"),
            torch.empty(1, 21, 6, DIM, device="cuda"),
        )
        table = torch.empty(42, HEAD_DIM // 2, device="cuda")
        out = compiled(x, text, modulation, (table, table))
        out.backward(torch.empty_like(out))
    assert graphs == [
        Counter(PER_BLOCK),
        Counter({f"{op}_backward": n for op, n in PER_BLOCK.items()}),
    ]
