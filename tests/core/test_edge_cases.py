"""Edge cases of several modules."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmaf
from fastmaf.kernels import LinearArgs, PackedLayout, masked_linear
from tests.core.helpers import build, normal, shared_widths


@pytest.mark.parametrize("shared", [True, False])
def test_a_file_loads_whatever_the_widths_of_this_version_are(tmp_path: Path, shared: bool) -> None:
    flow, x = build(40, hidden_features=(70, 60), widths="shared" if shared else "own"), normal(5, 40)
    flow.save(tmp_path / "model.safetensors")
    if shared:
        loaded = fastmaf.load(tmp_path / "model.safetensors")
    else:
        with shared_widths():
            loaded = fastmaf.load(tmp_path / "model.safetensors")
    assert loaded.stored_weights != flow.stored_weights, "both layouts are the same: nothing was tested"
    assert torch.allclose(loaded.log_prob(x), flow.log_prob(x), rtol=1e-13)


def test_two_layouts_of_one_prefix_have_a_padding_each() -> None:
    prefix = torch.arange(40)
    own = PackedLayout(prefix, 40)
    with shared_widths(1):
        shared = PackedLayout(prefix, 40)
    assert not torch.equal(own.panels, shared.panels)
    x, bias = normal(3, 40), torch.zeros(40, dtype=torch.float64)
    grads = []
    for layout in (own, shared):
        weight = torch.zeros(layout.numel, dtype=torch.float64, requires_grad=True)
        masked_linear(x, LinearArgs(weight, bias, prefix, layout.panels)).sum().backward()
        assert weight.grad is not None
        assert layout.padding_is_zero(weight.grad)
        grads.append(layout.unpack(weight.grad))
    assert torch.equal(*grads)


def test_a_weight_with_gaps_in_memory_is_read_right() -> None:
    layout = PackedLayout(torch.tensor([1, 2, 3]), 3)
    dense = normal(3, 3).tril()
    spread = torch.full((2 * layout.numel,), torch.nan, dtype=torch.float64)
    spread[::2] = layout.pack(dense)
    x, bias = normal(4, 3, seed=1), torch.zeros(3, dtype=torch.float64)
    assert torch.allclose(masked_linear(x, LinearArgs(spread[::2], bias, layout.prefix, layout.panels)), x @ dense.t())


def test_a_flow_refuses_what_is_no_transform() -> None:
    with pytest.raises(TypeError, match=r"transform 0 must be a fastmaf.Transform; found Linear"):
        fastmaf.Flow(4, [nn.Linear(4, 4)])  # type: ignore[list-item]


def test_a_transform_that_is_not_registered_is_not_saved(tmp_path: Path) -> None:
    class Mirror(fastmaf.Permutation):
        pass

    with pytest.raises(TypeError, match=r"Mirror cannot be saved.*TRANSFORMS"):
        fastmaf.Flow(3, [Mirror(torch.tensor([2, 1, 0]))]).save(tmp_path / "model.safetensors")


def test_a_flow_without_parameters_samples() -> None:
    flow = fastmaf.Flow(3, [fastmaf.Permutation(torch.tensor([2, 1, 0]))])
    assert flow.sample(2).shape == (2, 3)


def test_a_plain_flow_stays_one_through_a_file(tmp_path: Path) -> None:
    flow = fastmaf.Flow(3, [fastmaf.Permutation(torch.tensor([2, 0, 1]))])
    flow.save(tmp_path / "flow.safetensors")
    loaded, x = fastmaf.load(tmp_path / "flow.safetensors"), torch.randn(4, 3)
    assert type(loaded) is fastmaf.Flow
    assert torch.equal(loaded(x)[0], x[:, [2, 0, 1]])


def test_a_soft_bound_needs_a_bound() -> None:
    with pytest.raises(ValueError, match="soft_bound needs a log_scale_bound"):
        fastmaf.AffineAutoregressive(fastmaf.MADE(4, (4,)), soft_bound=True, log_scale_bound=None)


def test_the_default_device_is_where_a_flow_ends_and_not_where_it_is_drawn() -> None:
    here = build(9, dtype=torch.float32)
    with torch.device("meta"):
        there = build(9, dtype=torch.float32)
    assert {p.device.type for p in there.parameters()} == {"meta"}
    assert [p.shape for p in there.parameters()] == [p.shape for p in here.parameters()]


def test_after_warm_up_the_learning_rate_is_the_schedulers() -> None:
    flow = fastmaf.MAF(6, 1, (4,), seed=0)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    step = fastmaf.TrainingStep(flow, optimizer, fastmaf.Guards(warmup_steps=2))
    seen = []
    for _ in range(2):
        step(torch.zeros(3, 6))
        seen.append(optimizer.param_groups[0]["lr"])
    optimizer.param_groups[0]["lr"] = 0.01  # as a scheduler would
    step(torch.zeros(3, 6))
    assert [*seen, optimizer.param_groups[0]["lr"]] == pytest.approx([0.05, 0.1, 0.01])


def test_linear_hidden_layers_invert_too() -> None:
    made = fastmaf.MADE(7, (5, 6), activation="identity", dtype=torch.float64)
    block, x = fastmaf.AffineAutoregressive(made), normal(3, 7)
    assert torch.allclose(block.inverse(block(x)[0])[0], x)
    h = made.hidden_units(x)
    assert bool((h < 0).any()), "relu was applied"


def test_reading_a_complete_model_of_the_notebook_warns_of_nothing() -> None:
    features, hidden = 6, 12
    degrees = [torch.arange(hidden).flip(0) % (features - 1) + 1 for _ in range(2)]  # complete, and not sorted
    inputs = torch.arange(1, features + 1)
    masks = [
        degrees[0][:, None] >= inputs,
        degrees[1][:, None] >= degrees[0],
        (inputs[:, None] > degrees[1]).repeat(2, 1),
    ]
    state = {}
    for k, mask in enumerate(masks):
        state[f"flows.0.made.fc{k + 1}.mask"] = mask.float()
        state[f"flows.0.made.fc{k + 1}.weight"] = torch.randn(mask.shape)
        state[f"flows.0.made.fc{k + 1}.bias"] = torch.randn(mask.shape[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastmaf.from_published(state)
