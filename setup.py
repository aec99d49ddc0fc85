"""The package map; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# The CMake build of `anyflow._C` will be driven from here, through cmdclass={"build_ext": ...}.
setup(
    packages=[*find_packages(include=["anyflow", "anyflow.*"]), "anyflow.kernels"],
    package_dir={"anyflow.kernels": "kernels"},
)
