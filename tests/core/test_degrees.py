"""Degrees, orders, levels and seeds, and the warning about gaps in the degrees."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmaf
from fastmaf import degrees
from tests.core.helpers import blocks_of, build, normal


def quietly(features: int, **options: Any) -> fastmaf.MAF:
    """Builds a model; any ConnectivityWarning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastmaf.ConnectivityWarning)
        return fastmaf.MAF(features, **{"blocks": 2, "hidden_features": (7, 5), "seed": 0, **options})


@given(features=st.integers(1, 400), hidden=st.lists(st.integers(2, 80), min_size=1, max_size=3))
@settings(max_examples=60)
def test_spread_leaves_no_gap(features: int, hidden: list[int]) -> None:
    drawn = degrees.hidden_degrees("spread", features, hidden)
    for layer, width in zip(drawn, hidden, strict=True):
        assert layer.shape == (width,) and torch.equal(layer, layer.sort().values)
        if features > 1:
            assert int(layer[0]) == 1 and int(layer[-1]) == features - 1
        steps = layer.diff()
        assert not steps.numel() or int(steps.max() - steps.min()) <= 1, f"not evenly spread: {layer}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastmaf.ConnectivityWarning)
        degrees.warn_if_disconnected(features, [drawn])


@pytest.mark.parametrize(
    "features, hidden", [(1, (2,)), (2, (2, 2)), (3, (2, 2)), (13, (2, 7)), (37, (5, 3, 2)), (64, (64, 64)), (9, (40,))]
)
def test_spread_warns_of_nothing(features: int, hidden: tuple[int, ...]) -> None:
    quietly(features, hidden_features=hidden)


@pytest.mark.parametrize("features, hidden", [(100, (10, 10)), (12_288, (512, 512)), (38, (36,))])
def test_cyclic_warns_once_and_says_what_and_why(features: int, hidden: tuple[int, ...]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        blocks = 3 if features < 1000 else 1
        fastmaf.MAF(features, blocks, hidden, degrees="cyclic", seed=0)
    assert [w.category for w in seen] == [fastmaf.ConnectivityWarning]
    text = str(seen[0].message)
    # Inputs of degree 1..H are read: the first H of the order; the last input of all is never read by anyone.
    assert f"{hidden[0] + 1} to {features - 1}" in text, text
    assert "spread" in text, text
    assert seen[0].filename == __file__, "the warning points elsewhere than at the caller"


def test_cyclic_with_enough_units_warns_of_nothing() -> None:
    quietly(13, hidden_features=(12, 12), degrees="cyclic")
    quietly(13, hidden_features=(30, 12), degrees="cyclic")


@pytest.mark.parametrize("hidden, levels", [(1, None), (8, 1), ((8, 1), None)])
def test_spread_warns_of_one_unit_or_level(hidden: int | tuple[int, ...], levels: int | None) -> None:
    with pytest.warns(fastmaf.ConnectivityWarning, match="at least 2 units per hidden layer and 2 levels"):
        fastmaf.MAF(6, 1, hidden, levels=levels)


def test_unconditioned_outputs_are_named() -> None:
    with pytest.warns(fastmaf.ConnectivityWarning, match="outputs 2 to 4 ") as seen:
        fastmaf.MAF(9, 2, (4,), degrees=[torch.tensor([4, 5, 7, 8])])
    assert len(seen) == 1


def test_gaps_between_layers_are_found() -> None:
    """Each layer covers all degrees, but the low units of the second layer see none of the first."""
    with pytest.warns(fastmaf.ConnectivityWarning):
        fastmaf.MAF(9, 1, (3, 3), degrees=[torch.tensor([5, 6, 8]), torch.tensor([1, 4, 8])])


def test_cyclic_is_what_other_libraries_do() -> None:
    for features, hidden in ((13, 30), (13, 12), (13, 5), (2, 4)):
        expected = (torch.arange(hidden) % (features - 1) + 1).sort().values
        assert torch.equal(degrees.hidden_degrees("cyclic", features, (hidden,))[0], expected)


def test_random_degrees_are_uniform_and_differ_by_layer() -> None:
    first, second = degrees.hidden_degrees("random", 5, (8000, 8000), generator=torch.Generator().manual_seed(0))
    for layer in (first, second):
        counts = torch.bincount(layer, minlength=6)
        assert counts[0] == 0 and counts[5] == 0
        assert ((counts[1:5] - 2000).abs() < 200).all(), counts
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["spread", "random", "cyclic"])
@pytest.mark.parametrize("levels", [1, 2, 3, 8, 1000])
def test_levels_bound_the_steps(kind: Any, levels: int) -> None:
    flow = build(200, hidden_features=(60, 45), degrees=kind, levels=levels)
    for block in blocks_of(flow):
        distinct = torch.cat(block.made.degrees).unique()
        assert distinct.numel() <= levels
        assert block.made.steps <= levels + 1
        assert block.made.steps == 1 + block.made.degrees[-1].unique().numel(), "degrees below D, and a last step"
        for layer in block.made.degrees:
            assert torch.equal(layer, layer.sort().values)
    unbounded = degrees.hidden_degrees(kind, 200, (60, 45), generator=torch.Generator().manual_seed(0))
    if levels == 1000:
        bounded = degrees.hidden_degrees(kind, 200, (60, 45), levels=levels, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(unbounded, bounded, strict=True))


@pytest.mark.parametrize("levels", [2, 5, 30])
def test_levels_keep_the_ends(levels: int) -> None:
    """Grouped spread degrees still read every input and condition every output."""
    quietly(64, hidden_features=(60, 45), levels=levels)


def same(a: fastmaf.MAF, b: fastmaf.MAF) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return (
        list(first) == list(second)
        and all(torch.equal(first[k], second[k]) for k in first if first[k].shape == second[k].shape)
        and all(first[k].shape == second[k].shape for k in first)
    )


@pytest.mark.parametrize("kind", ["spread", "random"])
def test_seeds(kind: str) -> None:
    options: dict[str, Any] = {"degrees": kind, "order": "random", "hidden_features": (9, 8)}
    first, again, other = (build(13, seed=seed, **options) for seed in (1, 1, 2))
    assert same(first, again)
    for name, parameter in first.named_parameters():
        twin = dict(other.named_parameters())[name]
        assert parameter.shape != twin.shape or not torch.equal(parameter, twin), f"{name} does not depend on the seed"
    blocks = blocks_of(first)
    assert not torch.equal(blocks[0].made.output.bias, blocks[1].made.output.bias)
    if kind == "random":
        assert any(not torch.equal(a, b) for a, b in zip(blocks[0].made.degrees, blocks[1].made.degrees, strict=True))


def test_a_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(13, seed=1, degrees="random", order="random")
    assert torch.equal(torch.rand(3), expected)


def test_no_seed_draws_from_the_global_generator() -> None:
    torch.manual_seed(5)
    first = build(13, seed=None, degrees="random")
    second = build(13, seed=None, degrees="random")
    torch.manual_seed(5)
    assert same(first, build(13, seed=None, degrees="random"))
    assert not same(first, second)


@pytest.mark.parametrize("other", [{"dtype": torch.float32}, {"init": "identity"}], ids=str)
def test_a_seed_gives_the_same_degrees_and_orders_whatever_the_weights_are(other: dict[str, Any]) -> None:
    """load_state_dict asks for "the same degrees and seed": these must be enough."""
    options: dict[str, Any] = {"degrees": "random", "order": "random", "blocks": 3}
    first, second = build(13, **options), build(13, **{**options, **other})
    for a, b in zip(blocks_of(first), blocks_of(second), strict=True):
        for layer, twin in zip(a.made.degrees, b.made.degrees, strict=True):
            assert torch.equal(layer, twin)
    orders = [
        [t.permutation for t in flow.transforms if isinstance(t, fastmaf.Permutation)] for flow in (first, second)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


def test_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    natural, reverse = torch.arange(6), torch.arange(6).flip(0)
    assert all(torch.equal(o, natural) for o in degrees.orders("natural", 6, 3))
    assert all(
        torch.equal(o, e) for o, e in zip(degrees.orders("alternate", 6, 3), (natural, reverse, natural), strict=True)
    )
    drawn = degrees.orders("random", 600, 3, generator=generator)
    assert all(torch.equal(o.sort().values, torch.arange(600)) for o in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    explicit = [torch.tensor([2, 0, 1]), torch.tensor([1, 0, 2])]
    assert all(torch.equal(o, e) for o, e in zip(degrees.orders(explicit, 3, 2), explicit, strict=True))


def test_explicit_degrees_are_sorted_and_kept() -> None:
    given_degrees = [torch.tensor([5, 0, 3, 3]), torch.tensor([6, 1])]
    kept = degrees.hidden_degrees(given_degrees, 6, (4, 2))
    assert torch.equal(kept[0], torch.tensor([0, 3, 3, 5])) and torch.equal(kept[1], torch.tensor([1, 6]))
    assert torch.equal(given_degrees[0], torch.tensor([5, 0, 3, 3])), "the caller's tensor was sorted in place"
    flow = build(6, degrees=given_degrees, hidden_features=(4, 2))
    assert torch.equal(blocks_of(flow)[1].made.degrees[0].long(), kept[0])


def test_unsorted_degrees_of_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted|ascending"):
        fastmaf.MaskedLinear(torch.tensor([2, 1]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="sorted|ascending"):
        fastmaf.MaskedLinear(torch.tensor([1, 2]), torch.tensor([2, 1]))


@given(
    below=st.lists(st.integers(0, 9), max_size=12), above=st.lists(st.integers(0, 9), max_size=12), strict=st.booleans()
)
def test_prefix_is_the_row_sum_of_the_mask(below: list[int], above: list[int], strict: bool) -> None:
    prefix = degrees.prefix(
        torch.tensor(sorted(below), dtype=torch.long), torch.tensor(sorted(above), dtype=torch.long), strict=strict
    )
    assert prefix.tolist() == [sum(i < o if strict else i <= o for i in below) for o in sorted(above)]


@given(
    features=st.integers(1, 12),
    hidden=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=3),
)
@settings(max_examples=150)
def test_connectivity_against_paths(features: int, hidden: list[list[int]]) -> None:
    """The counts agree with products of the masks."""
    layers = [torch.tensor(sorted(min(d, features) for d in layer)) for layer in hidden]
    all_degrees = [torch.arange(1, features + 1), *layers]
    paths = torch.eye(features)
    for below, above in zip(all_degrees, layers, strict=False):
        paths = (above[:, None] >= below).float() @ paths
    paths = (all_degrees[0][:, None] > layers[-1]).float() @ paths > 0
    report = degrees.connectivity(features, layers)
    unread = [i for i in range(features - 1) if not paths[:, i].any()]
    unconditioned = [o for o in range(1, features) if not paths[o].any()]
    assert report == (len(unread), len(unconditioned))


def test_devices_and_dtypes_of_a_model() -> None:
    flow = build(5, dtype=torch.float32)
    assert {p.dtype for p in flow.parameters()} == {torch.float32}
    assert torch.isfinite(flow.log_prob(normal(2, 5, dtype=torch.float32))).all()
    assert {p.dtype for p in fastmaf.MAF(5, 1, (4, 4)).parameters()} == {torch.get_default_dtype()}
