"""The public names: which there are, what importing them imports, and that the examples of their docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmaf

NAMES = """
    MADE MAF ActNorm AffineAutoregressive AffineMap BackendUnavailableError Base BatchNorm CheckpointError
    ConnectivityWarning Detector DiagonalGaussian ElementwiseAffine FallbackWarning Flow FlowDistribution
    GaussianMixture GaussianWhitening Guards IAF Inverted LeakyMaskError LocalAutoregressive Logit LowRankGaussian
    MaskedLinear MonotonicRQS NonFiniteLossError NotConvertibleError NotInvertibleError Permutation ProcessFailedError
    ProcessesDifferError
    ReplayedLogProb SavedFlow SplineMap StandardNormal StepReport StudentT TrainingStep Transform accelerate
    deterministic from_nflows from_normflows from_published from_zuko load load_with_extras memory_estimate optim
    to_nflows to_zuko torch_defaults use_backend use_precision
"""
# Packages that training and scoring of plain tensors do not need, and modules that are slow to import.
HEAVY = {
    "scipy", "sklearn", "matplotlib", "PIL", "typer", "tqdm", "jinja2", "triton", "sympy", "torch._dynamo",
    "torch._inductor", "fastmaf.capsule", "fastmaf.images", "fastmaf.inspection", "fastmaf.metrics",
}  # fmt: skip


def test_names() -> None:
    assert sorted(fastmaf.__all__) == sorted(NAMES.split())
    assert set(fastmaf.__all__) <= set(dir(fastmaf))
    for name in fastmaf.__all__:
        assert getattr(fastmaf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MAFF'"):
        _ = fastmaf.MAFF


def test_submodules_are_attributes() -> None:
    code = "import fastmaf; print(len(fastmaf.transforms.TRANSFORMS), fastmaf.degrees.__name__, fastmaf.naive.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["10", "fastmaf.degrees", "fastmaf.naive"]


def test_import_needs_little() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import fastmaf
for name in fastmaf.__all__:
    if name != "Detector":
        getattr(fastmaf, name)
flow = fastmaf.MAF(4, 2, 8)
flow.log_prob(torch.randn(3, 4)).sum().backward()
flow.sample(2)
print(*sorted({HEAVY!r} & (set(sys.modules) - before)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


def documented_modules() -> set[str]:
    """Returns the modules of the core and those that define the public names."""
    above = ("capsule", "images", "inspection", "metrics", "cli", "cli_options", "bench", "kernels", "__main__")
    core = pkgutil.walk_packages([str(Path(fastmaf.__file__).parent)], "fastmaf.")
    names = {module.name for module in core if module.name.split(".")[1] not in above}
    return names | {getattr(fastmaf, name).__module__ for name in fastmaf.__all__ if name != "optim"}


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    namespace = {"fastmaf": fastmaf, "torch": torch}
    modules = [fastmaf, *map(importlib.import_module, sorted(documented_modules()))]
    return [test for module in modules for test in finder.find(module, globs=namespace) if test.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda test: test.name)
def test_examples_of_docstrings(example: doctest.DocTest) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        messages: list[str] = []
        runner.run(example, out=messages.append)
    assert not messages, "".join(messages)


@pytest.mark.parametrize("name", fastmaf.__all__)
def test_public_names_have_docstrings(name: str) -> None:
    public = getattr(fastmaf, name)
    assert inspect.getdoc(public)
    for method_name, method in vars(public).items() if inspect.isclass(public) else ():
        if inspect.isfunction(method) and not method_name.startswith("_"):
            assert inspect.getdoc(getattr(public, method_name)), f"{name}.{method_name}"


@pytest.mark.parametrize("name", [n for n in fastmaf.__all__ if n != "optim"])
def test_public_names_have_examples(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(fastmaf, name)) or "")
