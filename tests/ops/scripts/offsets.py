"""Print the addresses that each Triton kernel forms, and the 32-bit products in their offsets.

The result is JSON. The script checks the devices of the recorded launches too: each is made on that
of its first argument.
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
    """Return the number of addresses, and the 32-bit products that their offsets come from.

    Products in values that are loaded do not count.
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


examples = [
    *ahead_of_time.block_examples(1536),
    *ahead_of_time.embedding_examples(1536),
    *ahead_of_time.loss_examples(),
]
report = {}
for _, _, call in ahead_of_time.kernel_calls(examples, torch.bfloat16):
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
