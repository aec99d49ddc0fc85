"""Run some of the device checks in a process of its own: ``python -m gpu.check_part ORDER``.

:mod:`gpu.checks` starts it, and reads what it prints: lines of :data:`MARK` and JSON.
"""

from __future__ import annotations

import json
import sys
import time

MARK = "check "


def main() -> None:
    """Run the checks of the order, each named before and with its outcome afterwards."""
    from gpu import build

    order = json.loads(sys.argv[1])
    device, _ = build.prepare_process(order["device"], order["parent"])
    import torch

    from gpu.device_checks import catalogue
    from gpu.outcomes import evaluate

    checks = {check.name: check for check in catalogue(device, order["tiny"])}
    for name in order["names"]:
        if time.monotonic() >= order["deadline"]:
            break
        print(MARK + json.dumps(name), flush=True)
        print(MARK + json.dumps(evaluate(checks[name])), flush=True)
        if device.type == "cuda":
            # raises where the check has broken the device: this process is of no more use
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
