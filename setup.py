"""The package map, and the native build, which CMakeLists.txt defines; everything else is in
pyproject.toml.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
HINT = "then build with `pip install -e . --no-build-isolation`"


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja. Variables: ANYFLOW_CUDA_ARCHS,
    ANYFLOW_CMAKE_ARGS, CXX, CUDACXX.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        extra = os.environ.get("ANYFLOW_CMAKE_ARGS", "").split()
        # A folder for each environment and each kind of build: what CMake remembers holds for one
        # of them.
        key = hashlib.sha256(repr((str(ROOT), sys.prefix, extra)).encode()).hexdigest()[:8]
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{key}"
        cmake = self._tool("cmake")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={self._tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self._pybind11()}",
            f"-DANYFLOW_CUDA_ARCHS={os.environ.get('ANYFLOW_CUDA_ARCHS', '')}",
            *extra,
        ]
        self._run(configure, "configured")
        self._run([cmake, "--build", str(build)], "compiled")
        target.parent.mkdir(parents=True, exist_ok=True)
        (built,) = build.glob("_C.*")
        shutil.copy(built, target)

    def _tool(self, name: str) -> str:
        folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        path = shutil.which(name, path=os.pathsep.join(folders))
        if path is None:
            raise SystemExit(
                f"anyflow: building needs {name}, which was not found: `pip install {name}`, "
                f"{HINT}."
            )
        return path

    def _pybind11(self) -> str:
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                f"anyflow: building needs pybind11: `pip install pybind11`, {HINT}."
            ) from None
        return pybind11.get_cmake_dir()

    def _run(self, command: list[str], what: str) -> None:
        if subprocess.run(command).returncode:
            raise SystemExit(
                f"anyflow: the native extension could not be {what}; the reason is above."
            )


setup(
    packages=[*find_packages(include=["anyflow", "anyflow.*"]), "anyflow.kernels"],
    package_dir={"anyflow.kernels": "kernels"},
    ext_modules=[Extension("anyflow._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
