"""Where the packages lie; everything else is said in pyproject.toml.

The top-level folder `kernels/` is installed as `fastmaf.kernels`. There is nothing to compile, so building needs no
compiler and no torch. Whatever is added here that does need torch imports it inside a function, where it is found.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["fastmaf", "fastmaf.*"]),
        "fastmaf.kernels",
        *(f"fastmaf.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastmaf.kernels": "kernels"},
)
