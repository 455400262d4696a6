"""Every adapter at small odd sizes: it computes the function of its counterpart, forward, inverse and through training;
its passes do the work that is extrapolated; its files restore it.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastmaf
from fastmaf.bench.check import LARGEST, check
from fastmaf.bench.libraries import LIBRARIES, Library, Size, library_class
from fastmaf.naive import NaiveMAF
from tests.bench.helpers import FAILING, build, normal, uniform

WIDE = Size(47, (24, 24), 3)  # more dimensions than units: several outputs depend on the same inputs
NARROW = Size(12, (31, 31), 3)  # more units than dimensions: every output depends on all dimensions before it
SINGLE = Size(47, (24,), 1)
PLANE = Size(2, (9, 9), 3)
LEVELS = Size(47, (24, 24), 2, levels=6)
UNEQUAL = tuple(Size(47, hidden, 2) for hidden in ((5, 24), (24, 5), (9, 31, 4)))

FASTMAF = ("fastmaf", "fastmaf (torch)", "fastmaf, bfloat16")
DENSE = ("naive", "dense")
PEERS = ("nflows", "zuko", "normflows")
ALL = [
    *((name, size) for name in (*FASTMAF, *DENSE, *PEERS) for size in (WIDE, NARROW, SINGLE)),
    *(("fastmaf", LEVELS), ("naive", LEVELS)),
    *((name, size) for name in ("fastmaf", *DENSE, "zuko") for size in UNEQUAL),
    *((name, PLANE) for name in (*FASTMAF, *DENSE, *PEERS)),
    *(("flowjax", size) for size in (NARROW, PLANE)),  # JAX compiles each function for seconds
]
BY_PASSES = (*DENSE, *PEERS, "flowjax")
TRAINABLE = (*FASTMAF[:2], *BY_PASSES)


@functools.cache
def library_of(name: str, size: Size) -> Library:
    """Returns a library, built once: its counterpart is new whenever training has changed it."""
    return build(name, size, 5)


def over(names: tuple[str, ...] = (*FASTMAF, *BY_PASSES), sizes: tuple[Size, ...] = ()) -> Any:
    """Parametrizes a test over some libraries and sizes, by default over all."""
    pairs = [
        pytest.param(name, size, id=f"{name} {size}", marks=pytest.mark.slow if name == "flowjax" else ())
        for name, size in ALL
        if name in names and (not sizes or size in sizes)
    ]
    return pytest.mark.parametrize(("name", "size"), pairs)


@over()
def test_a_library_passes_the_check_twice(name: str, size: Size) -> None:
    library, x = library_of(name, size), uniform(7, size.features, 1)
    log_prob = library.log_prob(x)
    assert log_prob.shape == (7,) and not log_prob.requires_grad
    assert torch.equal(x, uniform(7, size.features, 1)), "it wrote into its input"
    assert float(log_prob.std()) > 0, "all images have the same density"
    for seed in (5, 6):  # the second optimiser has to start without the moments of the first
        errors = check(library, seed)
        assert list(errors) == ["log_prob", "inverse", "train step"][: 3 if library.trains else 2]
        # Far from what is refused, as rounding differs between machines.
        assert all(0 <= error < LARGEST[part] / 5 for part, error in errors.items()), errors


@over()
def test_the_counterpart_maps_the_inverse_back_to_the_base_points(name: str, size: Size) -> None:
    library, z = library_of(name, size), normal(3, size.features, 2)
    counterpart = library.counterpart()
    forward = counterpart.last if library.inverts_by_passes else counterpart
    for passes in {1, min(5, size.features), size.features} if library.inverts_by_passes else {size.features}:
        x = library.inverse(z, passes)
        assert x.shape == z.shape and not torch.allclose(x[:, :passes], z[:, :passes], atol=1e-2)
        with torch.no_grad():
            torch.testing.assert_close(forward(x)[0][:, :passes], z[:, :passes], rtol=0, atol=1e-5)
    assert torch.equal(z, normal(3, size.features, 2)), "it wrote into its input"


@over((*DENSE, *PEERS), (NARROW,))
def test_passes_finish_no_later_dimension(name: str, size: Size) -> None:
    library: Any = build(name, size, 5)
    library.model.double()  # fresh weights are small: unfinished dimensions differ by little
    z = normal(16, size.features, 3).double()
    complete = library.inverse(z, size.features)
    for count in (1, 2):
        off = (library.inverse(z, count) - complete).abs().amax(0)
        assert float(off[:count].max()) < 1e-14 and float(off[count:].min()) > 1e-7


class Linears(TorchFunctionMode):
    """Records the number of rows of every call of ``linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@over((*DENSE, *PEERS), (NARROW, SINGLE))
def test_a_sample_takes_as_many_passes_as_are_extrapolated(name: str, size: Size) -> None:
    library, layers = library_of(name, size), len(size.hidden) + 1
    with Linears() as few:
        library.inverse(normal(5, size.features, 0), 4)
    assert few.rows == [5] * 4 * layers, "a pass is one run of one block's network"
    with Linears() as sample:
        assert library.sample(3).shape == (3, size.features)
    passes = size.features * size.blocks * layers
    # Some run the network once more for the log-determinant.
    assert passes <= len(sample.rows) <= passes + size.blocks * layers


def train(library: Library, seeds: range) -> None:
    library.new_optimizer()
    for seed in seeds:
        library.train_step(uniform(8, library.size.features, seed))


@over(TRAINABLE, (NARROW, SINGLE))
def test_saved_weights_are_restored_and_used(name: str, size: Size, tmp_path: Path) -> None:
    library, x, path = library_of(name, size), uniform(7, size.features, 4), tmp_path / "weights.safetensors"
    before = library.log_prob(x).clone()
    library.save(path)
    train(library, range(3))
    assert float((library.log_prob(x) - before).abs().min()) > 1e-4, "training changed nothing"
    library.load(path)
    assert torch.equal(library.log_prob(x), before)
    library.new_optimizer()
    library.train_step(x)
    assert float(library.log_prob(x).mean() - before.mean()) > 1e-4, "other weights were trained"


def test_bfloat16_weights_are_rounded_restored_and_not_trained(tmp_path: Path) -> None:
    library: Any = build("fastmaf, bfloat16", NARROW, 5)
    x, exact = uniform(7, 12, 0), build("fastmaf", NARROW, 5)
    before = library.log_prob(x).clone()
    error = ((before - exact.log_prob(x)) / before).abs().max()
    assert 1e-5 < float(error) < 1e-2
    assert not library.trains and LIBRARIES["fastmaf, bfloat16"].weight_bytes == 2
    library.save(tmp_path / "weights.safetensors")
    with torch.no_grad():
        for parameter in library.flow.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(library.log_prob(x), before)
    library.load(tmp_path / "weights.safetensors")
    assert torch.equal(library.log_prob(x), before)
    assert torch.bfloat16 in {parameter.dtype for parameter in library.flow.parameters()}


class Namespaces(TorchDispatchMode):
    """Records the namespaces of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*FASTMAF, *DENSE, *PEERS])
def test_a_library_depends_on_its_seed_and_shares_no_code_with_its_counterpart(name: str) -> None:
    x = uniform(4, NARROW.features, 0)
    library, same, other = (build(name, NARROW, seed) for seed in (1, 1, 2))
    assert torch.equal(library.log_prob(x), same.log_prob(x))
    assert not torch.allclose(library.log_prob(x), other.log_prob(x))
    assert isinstance(library.counterpart(), NaiveMAF if name in FASTMAF else fastmaf.Flow)
    with Namespaces() as namespaces:
        library.log_prob(x)
        library.inverse(x, NARROW.features)
        if library.trains:
            library.new_optimizer()
            library.train_step(x)
    assert ("fastmaf" in namespaces.called) == (name in FASTMAF)


def test_the_dense_library_is_the_naive_model_masked_after_every_step() -> None:
    naive, dense, x = build("naive", WIDE, 9), build("dense", WIDE, 9), uniform(7, WIDE.features, 0)
    torch.testing.assert_close(dense.log_prob(x), naive.log_prob(x), rtol=1e-6, atol=0)
    z = normal(3, WIDE.features, 0)
    torch.testing.assert_close(dense.inverse(z, 7), naive.inverse(z, 7), rtol=1e-5, atol=1e-6)
    train(dense, range(2))
    for block in dense.model.blocks:  # type: ignore[attr-defined]
        for weight, mask in zip(block.weights, block.buffers(), strict=True):
            assert bool((weight[~mask] == 0).all()) and bool((weight[mask] != 0).any())


@pytest.mark.parametrize("size", [WIDE, NARROW, LEVELS], ids=str)
def test_the_naive_library_has_the_connections_of_fastmaf(size: Size) -> None:
    fast: Any = build("fastmaf", size, 0)
    naive: Any = build("naive", size, 0)
    masks = [buffer for name, buffer in naive.model.named_buffers() if "mask" in name]
    assert fast.flow.visible_weights == sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("name", ["nflows", "normflows", pytest.param("flowjax", marks=pytest.mark.slow)])
def test_libraries_of_one_width_refuse_others(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs hidden layers of equal width; found \(5, 24\)"):
        build(name, Size(12, (5, 24), 1), 0)


LATENTS: dict[str, Any] = {
    "nflows": lambda model, x: model._transform(x)[0],
    "zuko": lambda model, x: model().transform(x),
    "normflows": lambda model, x: model.inverse(x),
}


@pytest.mark.parametrize("name", PEERS)
def test_the_order_of_generation_is_that_of_the_library(name: str) -> None:
    """The dimension that is generated first depends on itself alone, the last one on all: by the library's Jacobian."""
    library: Any = library_of(name, Size(12, (31, 31), 1))
    permutations = [part for part in library.counterpart().transforms if isinstance(part, fastmaf.Permutation)]
    order = permutations[0].permutation.tolist() if permutations else list(range(12))
    x = normal(32, 12, 0)  # many, as an inactive unit hides a dependence
    jacobian = torch.autograd.functional.jacobian(lambda x: LATENTS[name](library.model, x).sum(0), x).abs().sum(1)
    seen = sorted((row.count_nonzero().item(), row.nonzero().flatten().tolist()) for row in jacobian)
    assert seen == [(count, sorted(order[:count])) for count in range(1, 13)]


def test_missing_libraries_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"^absent is not installed .*pip install 'fastmaf\[bench\]'"):
        library_class(FAILING["absent"])
    for name in (*PEERS, "flowjax"):
        for module in [*sys.modules]:
            if module == name or module.startswith((f"{name}.", f"fastmaf.bench.libraries.{name}")):
                monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"^{name} is not installed"):
            library_class(LIBRARIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense, compiled", "naive, compiled"])
def test_compiled_libraries_are_the_same_function(name: str) -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception as problem:
        pytest.skip(f"torch.compile does not work here: {type(problem).__name__}")
    size = Size(12, (8, 8), 2)
    library, eager = build(name, size, 3), build(name.partition(",")[0], size, 3)
    x = uniform(8, 12, 0)
    torch.testing.assert_close(library.log_prob(x), eager.log_prob(x), rtol=1e-5, atol=0)
    check(library, 7)
