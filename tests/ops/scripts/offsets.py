"""Prints, for each Triton kernel, how many addresses it forms and which 32-bit products are in
their offsets, as JSON.

Also the recorded launches' devices: each is made on that of its first argument.
"""

import json
import re

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anyflow.kernels import ahead_of_time
from anyflow.kernels.launch import record

DEFINITION = re.compile(r"\s*(%[\w#]+)(?::\d+)? = (\S+) (.*)")


def products(ttir: str) -> tuple[int, list[str]]:
    """Number of addresses, and what the offsets are computed from that multiplies in 32 bits; not
    what is loaded.
    """
    definitions = {
        m.group(1): (m.group(2), m.group(3)) for m in map(DEFINITION.match, ttir.splitlines()) if m
    }
    constants = {
        n: r.split(" : ")[0]
        for n, (operation, r) in definitions.items()
        if operation == "arith.constant"
    }
    addresses = [rest for operation, rest in definitions.values() if operation == "tt.addptr"]
    found = set()
    for address in addresses:
        todo, seen = [re.findall(r"%[\w#]+", address)[1]], set()
        while todo:
            name = todo.pop()
            if name in seen or name not in definitions:
                continue
            seen.add(name)
            operation, rest = definitions[name]
            operands = re.findall(r"%[\w#]+", rest.split(" : ")[0])
            if operation in ("arith.muli", "arith.shli") and re.search(
                r" : (tensor<[\dx]+x)?i32", rest
            ):
                found.add(" * ".join(constants.get(operand, operand) for operand in operands))
            # what divides makes numbers smaller
            if operation not in ("tt.load", "arith.divsi", "arith.remsi"):
                todo += operands
    return len(addresses), sorted(found)


calls = [
    *ahead_of_time.row_calls(1536, torch.bfloat16),
    *ahead_of_time.embedding_calls(1536, torch.bfloat16),
    *ahead_of_time.frame_calls(torch.bfloat16),
]
report = {}
for _, call in calls:
    with record() as launches:
        call()
    for launch in launches:
        tensors = [a for a in launch.args if isinstance(a, Tensor)]
        assert launch.args[0] is tensors[0] and {t.device for t in tensors} == {tensors[0].device}
        name = launch.kernel.fn.__name__
        if name not in report:
            source = ASTSource(launch.kernel, *ahead_of_time._specialize(launch))
            compiled = triton.compile(
                source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
            )
            report[name] = products(compiled.asm["ttir"])
print(json.dumps(report))
