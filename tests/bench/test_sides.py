"""Every side of the bench at small odd sizes: it is the function that its twin is, forward, backward and through its
training steps; its passes do the work that they claim; what it saves comes back.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmaf
from fastmaf.bench.check import check
from fastmaf.bench.sides import SIDES, Side, Size, side_class
from fastmaf.bench.sides.dense import MaskedOnce
from fastmaf.bench.sides.side import LEARNING_RATE
from fastmaf.kernels import dispatch
from fastmaf.naive import NaiveMAF
from tests.bench.plans import Linears, Namespaces, entries, normal, one_thread, uniform

WIDE = Size(47, (24, 24), 3)  # more dimensions than units: several outputs share what they depend on
NARROW = Size(12, (31, 31), 3)  # more units than dimensions: every output depends on all before it
SINGLE = Size(47, (24,), 1)
DEEP = Size(23, (40, 40, 40), 2)
LEVELS = Size(47, (24, 24), 2, levels=6)

OWN = ("fastmaf", "fastmaf (reference)", "fastmaf, bfloat16")
DENSE = ("naive", "dense")
TORCH_PEERS = ("nflows", "zuko", "normflows")
ONE_WIDTH = ("nflows", "normflows", "flowjax")
# JAX compiles each function for seconds, so flowjax has one size; test_check.py is not for it either.
EVERY = [
    *((name, size) for name in (*OWN, *DENSE, *TORCH_PEERS) for size in (WIDE, NARROW, SINGLE, DEEP)),
    ("flowjax", NARROW),
    ("fastmaf", LEVELS),
    ("naive", LEVELS),
]
PASSES = [(name, size) for name, size in EVERY if name not in OWN]
TRAINED = [(name, size) for name, size in EVERY if name != "fastmaf, bfloat16"]
COUNTED = [(name, size) for name, size in PASSES if name != "flowjax"]


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


@functools.cache
def _kept(name: str, size: Size) -> Side:
    return side_class(name)(size, 5)


def side_of(name: str, size: Size) -> Side:
    """Returns a side, built once: whatever training did to it, its twin is taken anew."""
    if SIDES[name].package is not None:
        pytest.importorskip(SIDES[name].package or "")
    return _kept(name, size)


def of(pairs: list[tuple[str, Size]]) -> pytest.MarkDecorator:
    ids = [f"{name} {'x'.join(map(str, (size.features, *size.hidden)))}, {size.blocks}" for name, size in pairs]
    return pytest.mark.parametrize(("name", "size"), pairs, ids=ids)


def twin_of(side: Side) -> Any:
    return side.twin()


def densities(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.log_prob(x)
    return found.clone()


def twin_step(twin: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (-twin.log_prob(x).mean()).backward()  # type: ignore[operator]
    optimizer.step()


@of(EVERY)
def test_densities_are_those_of_the_twin(name: str, size: Size) -> None:
    side = side_of(name, size)
    x = uniform(7, size.features, 1)
    given = x.clone()
    found = side.log_prob(x)
    torch.testing.assert_close(found, densities(twin_of(side), x), rtol=1e-5, atol=0)
    assert found.shape == (7,) and not found.requires_grad
    assert torch.equal(x, given), "it wrote into its input"
    assert float(found.std()) > 0, "all images are the same to it"


@of(EVERY)
def test_the_inverse_takes_base_points_to_data_that_the_twin_takes_back(name: str, size: Size) -> None:
    side, z = side_of(name, size), normal(3, size.features, 2)
    given = z.clone()
    x = side.inverse(z)
    assert x.shape == z.shape and not torch.allclose(x, z, atol=1e-2)
    with torch.no_grad():
        back = twin_of(side)(x)[0]
    torch.testing.assert_close(back, z, rtol=0, atol=1e-5)
    assert torch.equal(z, given), "it wrote into its input"


@of(PASSES)
def test_passes_finish_the_first_dimensions(name: str, size: Size) -> None:
    side, z = side_of(name, size), normal(3, size.features, 3)
    last = twin_of(side).last
    for count in (1, 5, size.features):
        with torch.no_grad():
            back = last(side.passes(z, count))[0]
        torch.testing.assert_close(back[:, :count], z[:, :count], rtol=0, atol=1e-5, msg=f"after {count} passes")


@of([(name, size) for name, size in PASSES if size == NARROW])
def test_passes_finish_no_later_dimension(name: str, size: Size) -> None:
    """Where every dimension depends on all before it, what has not had its pass must be wrong still.

    By little: fresh weights are small, and each pass brings what is unfinished nearer. Hence float64 where there is.
    """
    side, z, float64 = side_of(name, size), normal(16, size.features, 3), name != "flowjax"
    if float64:
        side = copy.deepcopy(side)
        side.model.double()  # type: ignore[attr-defined]
        z = z.double()
    whole = side.passes(z, size.features)
    for count in (1, 2):
        off = (side.passes(z, count) - whole).abs().amax(0)
        finished, later = float(off[:count].max()), float(off[count:].min())
        assert finished < (1e-14 if float64 else 1e-6)
        assert later > (1e-7 if float64 else 1e-2), f"{count} passes have finished more than {count} dimensions"


@of(COUNTED)
def test_passes_run_the_network_once_each(name: str, size: Size) -> None:
    """A pass is one run of one block's network on all rows, and a whole inverse takes as many as the dimensions times
    the blocks: what the bench multiplies with.
    """
    side, layers = side_of(name, size), len(size.hidden) + 1
    with Linears() as few:
        side.passes(normal(5, size.features, 0), 4)
    assert few.rows == [5] * 4 * layers
    with Linears() as whole:
        side.inverse(normal(3, size.features, 0))
    claimed = size.features * size.blocks * layers
    # The naive inverse, and those of the peers, run once more to tell the log-determinant.
    assert claimed <= len(whole.rows) <= claimed + size.blocks * layers
    assert set(whole.rows) == {3}


@of([pair for pair in COUNTED if pair[1] == NARROW])
def test_samples_take_the_work_of_an_inverse(name: str, size: Size) -> None:
    side = side_of(name, size)
    with Linears() as sampled:
        side.sample(3)
    with Linears() as inverted:
        side.inverse(normal(3, size.features, 0))
    assert sampled.rows == inverted.rows


@pytest.mark.parametrize("name", OWN)
def test_fastmaf_samples_as_many_as_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    side: Any = side_of(name, NARROW)
    drawn: list[tuple[int, ...]] = []
    sample = side.flow.sample
    monkeypatch.setattr(side.flow, "sample", lambda n: drawn.append(tuple(sample(n).shape)))
    side.sample(3)
    assert drawn == [(3, NARROW.features)]
    assert not side.inverts_by_passes
    with pytest.raises(NotImplementedError):
        side.passes(normal(2, NARROW.features, 0), 1)


@of(TRAINED)
def test_training_steps_keep_side_and_twin_one_function(name: str, size: Size) -> None:
    side, x = side_of(name, size), uniform(7, size.features, 4)
    twin = twin_of(side)
    before = densities(twin, x)
    side.new_optimizer()
    optimizer = torch.optim.Adam(twin.parameters(), lr=LEARNING_RATE)
    for i in range(3):
        batch = uniform(8, size.features, 10 + i)
        given = batch.clone()
        side.train_step(batch)
        twin_step(twin, optimizer, batch)
        assert torch.equal(batch, given), "it wrote into its input"
    moved, expected = side.log_prob(x) - before, densities(twin, x) - before
    assert float(expected.abs().min()) > 1e-4, "nothing moved"
    assert float((moved - expected).norm() / expected.norm()) < 5e-3
    torch.testing.assert_close(side.log_prob(x), before + expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(densities(twin_of(side), x), side.log_prob(x), rtol=1e-5, atol=0)


@of([pair for pair in TRAINED if pair[1] in (NARROW, SINGLE)])
def test_a_new_optimizer_has_forgotten_the_moments(name: str, size: Size) -> None:
    side, x = side_of(name, size), uniform(7, size.features, 4)
    old = twin_of(side)
    kept = torch.optim.Adam(old.parameters(), lr=LEARNING_RATE)
    side.new_optimizer()
    for i in range(3):
        batch = 3 * uniform(8, size.features, 20 + i)
        side.train_step(batch)
        twin_step(old, kept, batch)
    twin = twin_of(side)
    before = densities(twin, x)
    side.new_optimizer()
    batch = -uniform(8, size.features, 30)
    side.train_step(batch)
    twin_step(twin, torch.optim.Adam(twin.parameters(), lr=LEARNING_RATE), batch)
    twin_step(old, kept, batch)
    moved, expected, remembered = side.log_prob(x) - before, densities(twin, x) - before, densities(old, x) - before
    assert float((moved - expected).norm() / expected.norm()) < 5e-3
    assert float((remembered - expected).norm() / expected.norm()) > 0.1, "moments make no difference here"


@of([pair for pair in TRAINED if pair[1] in (NARROW, SINGLE)])
def test_saved_weights_come_back(name: str, size: Size, tmp_path: Path) -> None:
    side, x, path = side_of(name, size), uniform(7, size.features, 4), tmp_path / "weights.safetensors"
    before = side.log_prob(x).clone()
    side.save(path)
    side.new_optimizer()
    for i in range(3):
        side.train_step(uniform(8, size.features, i))
    assert float((side.log_prob(x) - before).abs().min()) > 1e-4, "training changed nothing"
    side.load(path)
    torch.testing.assert_close(side.log_prob(x), before, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(twin_of(side).log_prob(x), before, rtol=1e-5, atol=0)
    # What was loaded is what is trained, and what samples.
    side.new_optimizer()
    side.train_step(x)
    assert float(side.log_prob(x).mean() - before.mean()) > 1e-4
    z = normal(2, size.features, 0)
    with torch.no_grad():
        torch.testing.assert_close(twin_of(side)(side.inverse(z))[0], z, rtol=0, atol=1e-5)


def test_saved_bfloat16_weights_come_back(tmp_path: Path) -> None:
    side: Any = side_class("fastmaf, bfloat16")(NARROW, 5)
    x, path = uniform(7, NARROW.features, 4), tmp_path / "weights.safetensors"
    before = side.log_prob(x).clone()
    side.save(path)
    with torch.no_grad():
        for parameter in side.flow.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(side.log_prob(x), before)
    side.load(path)
    assert torch.equal(side.log_prob(x), before)
    assert {layer.weight.dtype for layer in side.flow._mades()[0].layers} == {torch.bfloat16}


@pytest.mark.parametrize("name", [*OWN, *DENSE, *TORCH_PEERS])
def test_the_seed_alone_makes_the_weights(name: str) -> None:
    if SIDES[name].package is not None:
        pytest.importorskip(SIDES[name].package or "")
    x, make = uniform(3, 12, 0), side_class(name)
    one, same, other = (make(Size(12, (8, 8), 2), seed).log_prob(x) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_sides_use_none_of_our_kernels(name: str) -> None:
    side = side_of(name, NARROW)
    assert namespaces(side) <= {"aten", "profiler"}


def test_the_sides_of_fastmaf_do_use_them() -> None:
    assert "fastmaf" in namespaces(side_of("fastmaf", NARROW))


def namespaces(side: Side) -> set[str]:
    x = uniform(4, NARROW.features, 0)
    side.new_optimizer()
    with Namespaces() as called:
        side.log_prob(x)
        side.inverse(x)
        side.sample(2)
        side.train_step(x)
        if side.inverts_by_passes:
            side.passes(x, 3)
    return called.found


@pytest.mark.parametrize("name", ["fastmaf", "fastmaf (reference)"])
def test_each_side_of_fastmaf_runs_on_its_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"fastmaf": dispatch.default_backend("flow", torch.empty(0)), "fastmaf (reference)": "torch"}[name]
    side: Any = side_class(name)(NARROW, 5)
    chosen: list[str | None] = []
    for method in ("log_prob", "inverse", "sample"):
        monkeypatch.setattr(side.flow, method, spy(getattr(side.flow, method), chosen))
    side._score = side._scoring()
    x = uniform(4, NARROW.features, 0)
    side.log_prob(x)
    side.inverse(x)
    side.sample(2)
    side.new_optimizer()
    side.step = spy(side.step, chosen)
    side.train_step(x)
    assert len(chosen) >= 4 and {one or expected for one in chosen} == {expected}
    assert dispatch.chosen() is None, "the choice outlives the call"


def spy(call: Callable[..., Any], chosen: list[str | None]) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        chosen.append(dispatch.chosen())
        return call(*arguments, **options)

    return called


@pytest.mark.parametrize("name", [*OWN, *DENSE, *TORCH_PEERS])
def test_side_and_twin_share_no_code(name: str) -> None:
    twin = twin_of(side_of(name, NARROW))
    assert isinstance(twin, NaiveMAF if name in OWN else fastmaf.Flow)
    assert name in OWN or isinstance(twin.last, fastmaf.Transform)


def test_bfloat16_weights_are_rounded_and_do_not_train() -> None:
    side, full, x = side_of("fastmaf, bfloat16", NARROW), side_class("fastmaf")(NARROW, 5), uniform(7, 12, 0)
    error = ((side.log_prob(x) - full.log_prob(x)) / full.log_prob(x)).abs().max()
    assert 1e-5 < float(error) < 1e-2
    assert not side.trains and SIDES["fastmaf, bfloat16"].weight_bytes == 2
    with pytest.raises(NotImplementedError):
        side.new_optimizer()


def test_the_dense_weights_are_masked_again_after_each_step() -> None:
    side: Any = side_class("dense")(WIDE, 5)
    model: MaskedOnce = side.model
    for parts in (model.weights, model.hidden):
        assert len(parts) == WIDE.blocks * 3
    side.new_optimizer()
    for i in range(2):
        side.train_step(uniform(8, WIDE.features, i))
    assert all(bool((w[h] == 0).all()) for w, h in zip(model.weights, model.hidden, strict=True))
    with torch.no_grad():
        for weight in model.weights:
            weight += 1.0
    model.mask_again()
    assert all(bool((w[h] == 0).all()) for w, h in zip(model.weights, model.hidden, strict=True))
    assert all(bool((w[~h] != 0).any()) for w, h in zip(model.weights, model.hidden, strict=True))


def test_the_dense_user_has_the_naive_model() -> None:
    naive, dense, x = side_class("naive")(WIDE, 9), side_class("dense")(WIDE, 9), uniform(7, WIDE.features, 0)
    torch.testing.assert_close(dense.log_prob(x), naive.log_prob(x), rtol=1e-6, atol=0)
    z = normal(3, WIDE.features, 0)
    torch.testing.assert_close(dense.inverse(z), naive.inverse(z), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense.passes(z, 7), naive.passes(z, 7), rtol=1e-5, atol=1e-6)


def test_the_naive_side_sees_what_fastmaf_sees() -> None:
    """Both have the same degrees: a comparison with a network of fewer connections would not be one."""
    for size in (WIDE, NARROW, DEEP, LEVELS):
        own: Any = side_class("fastmaf")(size, 0)
        naive: Any = side_class("naive")(size, 0)
        masks = [block.get_buffer(f"mask_{k}") for block in naive.model.blocks for k in range(len(size.hidden) + 1)]
        assert own.flow.visible_weights == sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("hidden", [(5, 24), (24, 5), (9, 31, 4)])
@pytest.mark.parametrize("name", ["fastmaf", "naive", "dense", "zuko"])
def test_hidden_layers_of_different_widths_pass_the_check(name: str, hidden: tuple[int, ...]) -> None:
    """Their degrees differ, so a unit's degree may be one that no unit before it has."""
    if SIDES[name].package is not None:
        pytest.importorskip(SIDES[name].package or "")
    check(side_class(name)(Size(47, hidden, 2), 5), 7)


@pytest.mark.parametrize("name", ONE_WIDTH)
def test_libraries_of_one_width_say_so(name: str) -> None:
    pytest.importorskip(SIDES[name].package or "")
    with pytest.raises(ValueError, match=rf"{name} takes hidden layers of one width; found \(5, 24\)"):
        side_class(name)(Size(12, (5, 24), 1), 0)


def test_zuko_reverses_every_second_block() -> None:
    side: Any = side_of("zuko", WIDE)
    forwards = torch.arange(WIDE.features)
    assert [side._order(i).tolist() for i in range(3)] == [
        order.tolist() for order in (forwards, forwards.flip(0), forwards)
    ]
    assert generated(side) == [order.tolist() for order in (forwards, forwards.flip(0), forwards)]


def test_nflows_reverses_before_every_block() -> None:
    side: Any = side_of("nflows", WIDE)
    backwards = torch.arange(WIDE.features).flip(0)
    found = [order.tolist() for _, order in side._blocks()]
    assert found == [order.tolist() for order in (backwards, backwards.flip(0), backwards)]
    assert generated(side) == found


def test_normflows_keeps_the_order_of_the_data() -> None:
    assert generated(side_of("normflows", WIDE)) == [list(range(WIDE.features))] * 3


def test_flowjax_shuffles_between_its_blocks() -> None:
    side: Any = side_of("flowjax", NARROW)
    permutations = [one.tolist() for one in side._permutations()]
    assert len(permutations) == NARROW.blocks
    natural = list(range(NARROW.features))
    assert all(sorted(one) == natural != one for one in permutations)
    assert permutations[0] != permutations[1] != permutations[2]
    orders = generated(side)
    assert orders[0] == natural
    assert orders[1] == permutations[0]
    assert orders[2] == [permutations[0][k] for k in permutations[1]]


def generated(side: Side) -> list[list[int]]:
    """Returns, per block of the twin, the dimensions of the data in the order in which it generates them."""
    frame, found = torch.arange(side.size.features), []
    for transform in twin_of(side).transforms:
        if isinstance(transform, fastmaf.Permutation):
            frame = frame[transform.permutation]
        else:
            found.append(frame.tolist())
    return found


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_the_generated_order_of_a_library_is_that_of_its_twin(name: str) -> None:
    """By the Jacobian of one block of the library itself, which knows nothing of degrees."""
    side: Any = side_of(name, SINGLE)
    order = generated(side)[0]
    x = uniform(1, SINGLE.features, 0).requires_grad_()
    # Through the density alone: the second derivative of what dimension i adds vanishes for all that come after it.
    (grad,) = torch.autograd.grad(twin_of(side)(x)[0][0, 0], x)
    assert grad[0].nonzero().flatten().tolist() == [order[0]]
    library = side.model().transform(x)[0] if name == "zuko" else latent(side, x)
    last = library[order[-1]] if name == "zuko" else library[-1]
    (grad,) = torch.autograd.grad(last, x)
    assert float(grad[0, order[-1]]) != 0 and int((grad[0] != 0).sum()) > SINGLE.features // 2


def latent(side: Any, x: Tensor) -> Tensor:
    if hasattr(side.model, "_transform"):
        found: Tensor = side.model._transform(x)[0][0]
    else:
        found = side.model.inverse(x)[0]
    return found


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, entry in entries().items():
        monkeypatch.setitem(SIDES, name, entry)
    yield


def test_a_side_whose_library_is_missing_says_what_to_install(absent: None) -> None:
    with pytest.raises(ImportError, match=r"^absent is not installed .*pip install 'fastmaf\[bench\]'"):
        side_class("absent")


@pytest.mark.parametrize("name", [*TORCH_PEERS, "flowjax"])
def test_each_peer_names_its_own_package_when_it_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SIDES[name].package
    assert package is not None
    for loaded in [*sys.modules]:
        if loaded == package or loaded.startswith(f"{package}.") or loaded == f"fastmaf.bench.sides.{name}_side":
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"^{package} is not installed"):
        side_class(name)


@pytest.mark.parametrize("name", ["naive", "dense", "nflows", "fastmaf"])
def test_a_deep_copy_is_no_other_function(name: str) -> None:
    """The tests of the check break copies of sides: a copy must pass."""
    if SIDES[name].package is not None:
        pytest.importorskip(SIDES[name].package or "")
    check(copy.deepcopy(side_class(name)(Size(12, (8, 8), 2), 0)), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense, compiled", "naive, compiled"])
def test_compiled_sides_are_the_same_function(name: str) -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception as problem:
        pytest.skip(f"torch.compile does not work here: {type(problem).__name__}")
    size = Size(12, (8, 8), 2)
    side, eager = side_class(name)(size, 3), side_class(name.partition(",")[0])(size, 3)
    x = uniform(8, 12, 0)
    torch.testing.assert_close(side.log_prob(x), eager.log_prob(x), rtol=1e-5, atol=0)
    check(side, 7)
