"""Import of models trained by the published notebook, against an independent re-implementation of that model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastmaf
from tests.core.helpers import blocks_of, generator, jacobian, normal
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")


class NotebookLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a mask kept as a buffer."""

    mask: Tensor

    def __init__(self, below: Tensor, above: Tensor, *, strict: bool = False) -> None:
        super().__init__(below.numel(), above.numel())
        mask = above[:, None] > below[None, :] if strict else above[:, None] >= below[None, :]
        self.register_buffer("mask", mask.float())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class NotebookMade(nn.Module):
    def __init__(self, features: int, hidden: tuple[int, int], degrees: tuple[Tensor, Tensor], *, strict: bool) -> None:
        super().__init__()
        inputs = torch.arange(1, features + 1)
        self.fc1 = NotebookLinear(inputs, degrees[0])
        self.fc2 = NotebookLinear(degrees[0], degrees[1])
        self.fc3 = NotebookLinear(degrees[1], torch.cat((inputs, inputs)), strict=strict)
        self.net = nn.Sequential(self.fc1, nn.ReLU(), self.fc2, nn.ReLU(), self.fc3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.net(x).chunk(2, dim=1)
        return mean, log_scale.clamp(-5, 5)


class NotebookFlow(nn.Module):
    def __init__(self, made: NotebookMade) -> None:
        super().__init__()
        self.made = made


class Notebook(nn.Module):
    """z = (x - mean) exp(-log_scale) in every block, natural order, standard normal base."""

    def __init__(
        self,
        features: int = 13,
        hidden: tuple[int, int] = (9, 11),
        blocks: int = 2,
        *,
        strict: bool,
        seed: int = 0,
        draw: Any = None,
    ) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        flows = []
        for _ in range(blocks):
            first, second = (torch.randint(1, features, (width,), generator=source) for width in hidden)
            drawn = first, second
            flows.append(NotebookFlow(NotebookMade(features, hidden, draw or drawn, strict=strict)))
        self.flows: Any = nn.ModuleList(flows)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1.5)

    def log_prob(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0])
        for flow in self.flows:
            mean, log_scale = flow.made(x)
            x = (x - mean) * torch.exp(-log_scale)
            total = total - log_scale.sum(dim=1)
        return total - 0.5 * (x**2).sum(dim=1) - 0.5 * x.shape[1] * math.log(2 * math.pi)


def convert(model: Notebook | dict[str, Tensor], **options: Any) -> fastmaf.MAF:
    return fastmaf.from_published(model if isinstance(model, dict) else model.state_dict(), **options)


# Two hidden layers that share no degree: even with >= at the output, no path leads an output back to its own input.
NO_TIES = (torch.tensor([2, 4, 4, 8, 10, 12]), torch.tensor([3, 5, 9, 11]))


def no_ties(strict: bool, features: int = 13) -> Notebook:
    return Notebook(features, (6, 4), strict=strict, draw=NO_TIES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "features, hidden, blocks", [(13, (9, 11), 2), (2, (3, 3), 1), (13, (40, 25), 3), (37, (8, 30), 1)], ids=str
)
def test_strict_masks_give_an_equal_density(
    features: int, hidden: tuple[int, int], blocks: int, dtype: torch.dtype
) -> None:
    for seed in range(4):
        notebook = Notebook(features, hidden, blocks, strict=True, seed=seed).to(dtype)
        flow = convert(notebook)
        x = normal(6, features, seed=seed, dtype=dtype)
        assert isinstance(flow, fastmaf.MAF) and next(flow.parameters()).dtype == dtype
        assert_close("values", flow.log_prob(x), notebook.log_prob(x))
        with torch.no_grad():
            assert_close("round_trip", flow(flow.inverse(x)[0])[0], x)
        for block, original in zip(blocks_of(flow), notebook.flows, strict=True):
            assert block.log_scale_bound == 5.0 and not block.soft_bound
            assert [d.numel() for d in block.made.degrees] == list(hidden)
            assert original.made.fc1.weight.data_ptr() != block.made.layers[0].weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_leaky_masks_are_refused_or_accepted_for_scoring(dtype: torch.dtype) -> None:
    notebook = Notebook(13, (40, 40), strict=False).to(dtype)
    x = normal(6, 13, dtype=dtype)
    # The model does leak: its first block's output depends on its own input through the mean, so ladj is wrong.
    block = notebook.flows[0].made
    assert (jacobian(lambda v: block(v)[0], x[0]).diagonal() != 0).any()
    with pytest.raises(fastmaf.LeakyMaskError, match="own input.*>=.*strict=False") as error:
        convert(notebook)
    assert isinstance(error.value, ValueError)
    flow = convert(notebook, strict=False)
    assert_close("values", flow.log_prob(x), notebook.log_prob(x))
    for call in (lambda: flow.inverse(x), lambda: flow.sample(1), lambda: flow.sample_and_log_prob(1)):
        with pytest.raises(fastmaf.NotInvertibleError):
            call()


def leaks(degrees: tuple[Tensor, Tensor], features: int) -> int:
    """Returns how many outputs see their own input under >= masks, by following paths."""
    inputs = torch.arange(1, features + 1)
    first = (degrees[0][:, None] >= inputs).float()
    second = (degrees[1][:, None] >= degrees[0]).float() @ first
    third = (inputs[:, None] >= degrees[1]).float() @ second
    return int((third.diagonal() > 0).sum())


@pytest.mark.parametrize("seed", range(12))
def test_leaks_are_counted(seed: int) -> None:
    """Narrow layers share degrees by chance: refused if an output does see its own input, with the right count."""
    notebook = Notebook(13, (3, 3), blocks=2, strict=False, seed=seed)
    source = torch.Generator().manual_seed(seed)
    expected = 0
    for _ in range(2):
        expected += leaks(
            (torch.randint(1, 13, (3,), generator=source), torch.randint(1, 13, (3,), generator=source)), 13
        )
    x = normal(4, 13, dtype=torch.float32)
    # One block may leak and the other not; each is converted by its own rule.
    assert_close("values", convert(notebook, strict=False).log_prob(x), notebook.log_prob(x))
    if expected:
        with pytest.raises(fastmaf.LeakyMaskError, match=rf"\b{expected}\b"):
            convert(notebook)
    else:
        assert_close("values", convert(notebook).log_prob(x), notebook.log_prob(x))


def test_the_seeds_above_hold_all_cases() -> None:
    counts = []
    for seed in range(12):
        source = torch.Generator().manual_seed(seed)
        drawn = [torch.randint(1, 13, (3,), generator=source) for _ in range(4)]
        counts.append((leaks((drawn[0], drawn[1]), 13), leaks((drawn[2], drawn[3]), 13)))
    kinds = {(bool(first), bool(second)) for first, second in counts}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}, kinds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_leaky_rule_without_ties_is_a_strict_model(dtype: torch.dtype) -> None:
    notebook = no_ties(strict=False).to(dtype)
    assert leaks(NO_TIES, 13) == 0
    flow, x = convert(notebook), normal(6, 13, dtype=dtype)
    assert_close("values", flow.log_prob(x), notebook.log_prob(x))
    with torch.no_grad():
        assert_close("round_trip", flow(flow.inverse(x)[0])[0], x)
        sample, log_prob = flow.sample_and_log_prob(5, generator=generator())
        assert_close("sample_log_prob", log_prob, notebook.log_prob(sample))
    exact = convert(notebook.double())
    row = normal(13)
    slogdet = torch.linalg.slogdet(jacobian(lambda v: exact(v)[0], row)).logabsdet
    assert_close("slogdet", exact(row[None])[1][0], slogdet)


def test_the_two_mask_rules_are_told_apart() -> None:
    """The same weights and degrees under > and >= are two functions; each is converted correctly."""
    leaky, strict = (no_ties(rule).double() for rule in (False, True))
    x = normal(4, 13)
    for notebook in (leaky, strict):
        assert_close("values", convert(notebook).log_prob(x), notebook.log_prob(x))
    assert not torch.allclose(leaky.log_prob(x), strict.log_prob(x))


@pytest.mark.parametrize("keep", ["net.", "fc"])
def test_either_set_of_keys_is_enough(keep: str) -> None:
    notebook, x = no_ties(strict=True), normal(4, 13, dtype=torch.float32)
    state = {key: value for key, value in notebook.state_dict().items() if f".made.{keep}" in key}
    assert len(state) == 2 * 9
    assert_close("values", convert(state).log_prob(x), notebook.log_prob(x))


def test_the_state_dict_is_left_alone() -> None:
    state = no_ties(strict=True).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    flow = convert(state)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_hidden_garbage_is_dropped() -> None:
    """Weights that the masks hide are arbitrary in a trained notebook: they change nothing and leave no trace."""
    notebook = no_ties(strict=True)
    x, before = normal(4, 13, dtype=torch.float32), None
    for value in (0.0, 1e30):
        with torch.no_grad():
            for flow in notebook.flows:
                for layer in (flow.made.fc1, flow.made.fc2, flow.made.fc3):
                    layer.weight[layer.mask == 0] = value
        flow = convert(notebook)
        after = flow.log_prob(x)
        assert all(layer.layout.padding_is_zero(layer.weight) for b in blocks_of(flow) for layer in b.made.layers)
        assert before is None or torch.equal(after, before)
        before = after


def test_a_converted_model_trains_and_saves(tmp_path: Any) -> None:
    flow, x = convert(no_ties(strict=True)), normal(4, 13, dtype=torch.float32)
    (-flow.log_prob(x).mean()).backward()
    assert all(p.grad is not None for p in flow.parameters())
    flow.save(tmp_path / "imported.safetensors")
    assert torch.equal(fastmaf.load(tmp_path / "imported.safetensors").log_prob(x), flow.log_prob(x))


def changed(**changes: Any) -> dict[str, Tensor]:
    """Returns a state_dict with both copies of the named tensors of block 0 changed by a function; None drops them."""
    state = dict(no_ties(strict=True).state_dict())
    twins = {"fc1": "net.0", "fc2": "net.2", "fc3": "net.4"}
    for name, change in changes.items():
        layer, field = name.split("_")
        for alias in (layer, twins[layer]):
            key = f"flows.0.made.{alias}.{field}"
            if change is None:
                del state[key]
            else:
                state[key] = change(state[key].clone())
    return state


def flip(row: int, column: int) -> Any:
    def change(mask: Tensor) -> Tensor:
        mask[row, column] = 1.0 - mask[row, column]
        return mask

    return change


@pytest.mark.parametrize("changes, words", [
    ({"fc1_mask": flip(0, 12)}, "mask"),
    ({"fc1_mask": flip(5, 0)}, "mask"),
    ({"fc2_mask": flip(0, 0)}, "mask"),
    ({"fc3_mask": flip(0, 3)}, "mask"),
    ({"fc3_mask": flip(14, 0)}, "mask"),
    ({"fc3_mask": flip(25, 0)}, "mask"),
    ({"fc2_mask": lambda mask: mask * 0.5}, "mask"),
    ({"fc1_mask": lambda mask: mask.flip(1)}, "mask"),
    ({"fc3_mask": lambda mask: mask.new_ones(mask.shape)}, "mask"),
    ({"fc2_weight": None}, "fc2.weight"),
    ({"fc3_mask": None}, "fc3.mask"),
    ({"fc1_bias": None}, "fc1.bias"),
    ({"fc2_weight": lambda weight: weight[:, :-1]}, "flows.0"),
    ({"fc1_bias": lambda bias: bias[:-1]}, "flows.0"),
    ({"fc3_weight": lambda w: w[:-1], "fc3_mask": lambda m: m[:-1], "fc3_bias": lambda b: b[:-1]}, "flows.0"),
    ({"fc2_mask": lambda mask: mask.t()}, "flows.0"),
], ids=lambda value: ",".join(value) if isinstance(value, dict) else None)  # fmt: skip
def test_what_is_not_the_notebooks_is_refused(changes: dict[str, Any], words: str) -> None:
    for strict in (True, False):
        with pytest.raises(ValueError, match=words) as error:
            convert(changed(**changes), strict=strict)
        assert not isinstance(error.value, fastmaf.LeakyMaskError)


def test_an_unchanged_state_dict_is_accepted() -> None:
    """Editing the state_dict is not what makes those fail."""
    same = {name: (lambda tensor: tensor) for name in ("fc1_mask", "fc2_weight", "fc3_bias")}
    x = normal(2, 13, dtype=torch.float32)
    assert_close("values", convert(changed(**same)).log_prob(x), no_ties(strict=True).log_prob(x))


@pytest.mark.parametrize("state", [
    {},
    {"weight": torch.zeros(2, 2)},
    {key.replace("flows.1.", "flows.2."): value for key, value in no_ties(strict=True).state_dict().items()},
    {key.replace("flows.", "module."): value for key, value in no_ties(strict=True).state_dict().items()},
], ids=["empty", "other", "block 1 missing", "other prefix"])  # fmt: skip
def test_other_keys_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="flows"):
        convert(state)


@pytest.mark.parametrize("changes, words", [
    ({"fc2_weight": lambda weight: weight * torch.inf}, "flows.0.made: weights and biases must be finite"),
    ({"fc1_bias": lambda bias: bias + torch.inf}, "flows.0.made: weights and biases must be finite"),
    ({"fc1_mask": lambda mask: mask[0]}, r"fc1.mask must be a tensor of 2 axes .*found a tensor \[13\]"),
    ({"fc3_bias": lambda bias: bias.sum()}, r"fc3.bias must be a tensor of 1 axes .*found a tensor \[\]"),
    ({"fc2_weight": lambda weight: weight.tolist()}, "fc2.weight must be a tensor of 2 axes .*found list"),
    ({"fc2_weight": lambda weight: weight.to("meta")}, "fc2.weight must be a tensor .* holds numbers"),
    ({"fc2_weight": lambda weight: weight.to_sparse()}, "fc2.weight must be a tensor .* holds numbers"),
    ({"fc1_weight": lambda weight: weight.double()}, "one floating-point dtype; found torch.float32, torch.float64"),
], ids=lambda value: ",".join(value) if isinstance(value, dict) else None)  # fmt: skip
def test_tensors_that_cannot_be_used_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert(changed(**changes))


def test_two_copies_of_a_layer_that_differ_are_refused() -> None:
    for other in (torch.zeros(6, 13), torch.zeros(6, 13, dtype=torch.float64), torch.zeros(5, 13)):
        state = {**no_ties(strict=True).state_dict(), "flows.1.made.net.0.weight": other}
        with pytest.raises(ValueError, match=r"flows.1.made.fc1.weight and flows.1.made.net.0.weight must be the same"):
            convert(state)


def test_blocks_of_other_dtypes_are_refused() -> None:
    state = {k: v.double() if k.startswith("flows.1.") else v for k, v in no_ties(strict=True).state_dict().items()}
    with pytest.raises(ValueError, match=r"flows.1.made: expected 13 features in torch.float32.*float64"):
        convert(state)


def test_gaps_of_an_imported_model_are_reported() -> None:
    with pytest.warns(fastmaf.ConnectivityWarning) as warnings:
        convert(no_ties(strict=True))
    assert len(warnings) == 1
