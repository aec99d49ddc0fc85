"""Hold the Triton kernels, one file per operator: the package ``anyflow.kernels``.

The folder stands at the root of the repository, so whenever the root is on ``sys.path`` the folder
hides the distribution named ``kernels`` on PyPI, which diffusers and transformers use where it is
installed. The guard below therefore refuses every name but ``anyflow.kernels``. Under the plain
name ``kernels``,

- the distribution from PyPI is loaded instead if it is installed, because diffusers and
  transformers import names from it;
- transformers (>= 5.0), which imports any folder of that name to read its version, is told version
  0;
- every other importer gets an ImportError.

``tests/test_packaging.py`` proves each of these.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import FrameType, ModuleType

_MACHINERY = ("importlib", "_frozen_importlib", "_frozen_importlib_external")


class _NotInstalled(ModuleType):
    """Stand in for ``kernels`` in transformers, which would not catch an ImportError.

    The module removes itself once its version is read.
    """

    @property
    def __version__(self) -> str:
        """Return version 0, and make room for a later import."""
        sys.modules.pop(self.__name__, None)
        return "0"


def _importer() -> str:
    """Return the name of the module that asked for this import."""
    # past the frames of this module and of importlib
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name != __name__ and name.partition(".")[0] not in _MACHINERY:
            return name
        frame = frame.f_back
    return ""


def _load_distribution() -> bool:
    """Put the ``kernels`` distribution in ``sys.modules``; return False where there is none."""
    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(
        "kernels", [entry for entry in sys.path if Path(entry).resolve() != root]
    )
    # no origin: a folder without an __init__.py
    if spec is None or spec.origin is None or spec.loader is None:
        return False
    module = sys.modules["kernels"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return True


def _guard() -> None:
    """Load the distribution, stand in for it, or raise an ImportError that explains the name."""
    if __name__ == "kernels" and _load_distribution():
        return
    if __name__ == "kernels" and _importer() == "transformers.utils.import_utils":
        sys.modules["kernels"] = _NotInstalled("kernels")
        return
    raise ImportError(
        f"This folder, {Path(__file__).parent}, is the package `anyflow.kernels` and was imported "
        f"as `{__name__}`, because the root of the anyflow repository is on sys.path (it is when "
        "Python starts there). For anyflow's kernels, install anyflow and write "
        "`import anyflow.kernels`. For the distribution named `kernels` on PyPI, install it with "
        "`pip install kernels`; it then takes precedence over this folder.",
        name=__name__,
    )


if __name__ != "anyflow.kernels":
    _guard()
