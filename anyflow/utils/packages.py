"""Say which packages anyflow needs for what, and the command that installs one.

The command names the packages themselves, so that it is right for a wheel, for a checkout and in
any environment.
"""

from __future__ import annotations

import importlib.util

DISTRIBUTION = "anyflow-video"  # on the package index, where `anyflow` is another project
SAMPLE = (
    *("torch", "diffusers", "transformers", "tokenizers", "ftfy", "accelerate"),
    *("safetensors", "huggingface_hub", "numpy", "pillow", "av"),
)
DEMO = ("matplotlib", "jinja2")
TRAIN = ("peft", "pyarrow", "pyyaml", "pydantic")
EVALUATE = ("opencv-python-headless", "torchmetrics")
GROUPS = {"sample": SAMPLE, "demo": DEMO, "train": TRAIN, "evaluate": EVALUATE}
OPTIONAL = ("train", "evaluate")  # groups that a base installation does without

# These packages have modules of another name.
_MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}


def module_name(package: str) -> str:
    """Return the name that a package is imported by."""
    return _MODULES.get(package, package)


def is_missing(package: str) -> bool:
    """Return whether a package cannot be imported because it is not there, without importing it."""
    return importlib.util.find_spec(module_name(package)) is None


def install_command(package: str) -> str:
    """Return the command that installs a package that is missing, and what is missing of its group.

    Args:
        package: name on the package index. The others of its group are named too, as the next
            errors would name them.
    """
    group = next((group for group in GROUPS.values() if package in group), ())
    others = [other for other in group if other != package and is_missing(other)]
    return " ".join(["pip install", package, *others])


def missing(purpose: str, package: str) -> str:
    """Say that a package is not installed, for the error in place of a failed import.

    Args:
        purpose: the beginning of the sentence, such as ``"reading a recipe"``.
        package: name on the package index.
    """
    return (
        f"{purpose} needs the package {package}, which is not installed: {install_command(package)}"
    )
