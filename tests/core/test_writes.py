"""After every way of writing to parameters, the density is that of the dense masked model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastmaf
from tests.core.helpers import build, generator, layers_of, naive_gradients, normal, padding_of
from tests.tolerances import F32, F64, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(like: Tensor) -> Tensor:
    return 0.2 * torch.randn(like.shape, generator=generator(9), dtype=F64).to(like.dtype)


def each(write: Callable[[nn.Parameter], Any]) -> Callable[[fastmaf.MAF], None]:
    def run(flow: fastmaf.MAF) -> None:
        for parameter in flow.parameters():
            write(parameter)

    return run


def in_place(flow: fastmaf.MAF) -> None:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(noise(parameter))


def initialised(flow: fastmaf.MAF) -> None:
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.2)


def in_inference_mode(flow: fastmaf.MAF) -> None:
    with torch.inference_mode():
        for parameter in flow.parameters():
            parameter.add_(noise(parameter))


def from_a_vector(flow: fastmaf.MAF) -> None:
    vector = parameters_to_vector(flow.parameters()).detach()
    for _ in range(3):  # later vectors may lie where earlier ones did
        vector_to_parameters(vector + noise(vector), flow.parameters())


def through_numpy(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[...] += noise(parameter).numpy()


def by_weight_decay_and_noise(flow: fastmaf.MAF) -> None:
    for parameter in flow.parameters():
        parameter.grad = noise(parameter)
    torch.optim.AdamW(flow.parameters(), lr=0.1, weight_decay=0.1).step()
    flow.zero_grad()


def by_a_new_parameter(flow: fastmaf.MAF) -> None:
    for layer in layers_of(flow).values():
        layer.weight = nn.Parameter(layer.weight.detach() + noise(layer.weight))


def averaged(flow: fastmaf.MAF) -> None:
    other = copy.deepcopy(flow)
    in_place(other)
    mean = torch.optim.swa_utils.AveragedModel(flow)
    mean.update_parameters(flow)
    mean.update_parameters(other)
    with torch.no_grad():
        for parameter, actual in zip(flow.parameters(), mean.module.parameters(), strict=True):
            parameter.copy_(actual)


def of_one_number(flow: fastmaf.MAF) -> None:
    """Writes one number of the padding in place."""
    for layer in layers_of(flow).values():
        where = padding_of(layer).nonzero().flatten()
        with torch.no_grad():
            layer.weight[where[len(where) // 3]] = 7.0


def strided(parameter: nn.Parameter) -> None:
    parameter.data = torch.stack((parameter.data + noise(parameter), torch.full_like(parameter, 7.0)), dim=1)[:, 0]


def in_a_state_dict(flow: fastmaf.MAF) -> None:
    for tensor in flow.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(noise(tensor))


WRITES: dict[str, Callable[[fastmaf.MAF], None]] = {
    "in place": in_place,
    "nn.init": initialised,
    "inference mode": in_inference_mode,
    ".data in place": each(lambda p: p.data.add_(noise(p))),
    ".data of other memory": each(lambda p: setattr(p, "data", p.data + noise(p))),
    "NaN": each(lambda p: p.data.masked_fill_(p.data == 0, torch.nan)),
    ".data of strided memory": each(strided),
    ".data of one repeated number": each(lambda p: setattr(p, "data", p.data.new_full((1,), 0.07).expand(p.shape))),
    "a vector": from_a_vector,
    "numpy": each(through_numpy),
    "an optimiser": by_weight_decay_and_noise,
    "new parameters": by_a_new_parameter,
    "averages": averaged,
    "one number": of_one_number,
    "state_dict": in_a_state_dict,
}


def model(dtype: torch.dtype = F64) -> fastmaf.MAF:
    flow = build(29, hidden_features=(23, 17), degrees="random", order="random", dtype=dtype)
    flow.log_prob(normal(2, 29, dtype=dtype))  # its padding is known to be zero
    flow.inverse(normal(2, 29, dtype=dtype))
    return flow


@pytest.mark.parametrize("use", ["log_prob", "forward", "nll_per_dim", "inverse", "rsample", "layers"])
@pytest.mark.parametrize("write", WRITES)
def test_the_function_is_that_of_the_masked_model(write: str, use: str, backend: str) -> None:
    flow, x = model(), normal(5, 29, seed=1)
    WRITES[write](flow)
    naive = flow.to_naive()
    if use == "log_prob":
        actual, expected = flow.log_prob(x), naive.log_prob(x)
        actual.sum().backward()
        expected.sum().backward()
        for name, pair in naive_gradients(flow, naive).items():
            assert_close("gradients", *pair, name)
        for layer in layers_of(flow).values():
            assert layer.weight.grad is not None and not layer.weight.grad[padding_of(layer)].any()
    elif use == "forward":
        actual, expected = flow(x)[0], naive(x)[0]
    elif use == "nll_per_dim":
        actual, expected = flow.nll_per_dim(x).sum(dim=1), -naive.log_prob(x)
    elif use == "inverse":
        with torch.no_grad():
            actual, expected = flow.inverse(x)[0], naive.inverse(x)[0]
    elif use == "rsample":
        actual, expected = flow.rsample(5, generator=generator(3)), naive.inverse(normal(5, 29, seed=3))[0]
        actual.square().sum().backward()
        expected.square().sum().backward()
        for name, pair in naive_gradients(flow, naive).items():
            assert_close("gradients", *pair, name)
    else:
        layer = layers_of(flow)["transforms.1.made.hidden.0"]
        actual, expected = layer(x), (x @ layer.dense_weight().T + layer.bias).relu()
    assert_close("values" if use != "inverse" else "inverse", actual, expected)


@pytest.mark.parametrize("write", WRITES)
def test_what_is_saved_has_no_padding(write: str, backend: str, tmp_path: Path) -> None:
    flow, x = model(), normal(5, 29, seed=1)
    WRITES[write](flow)
    naive = flow.to_naive()
    flow.save(tmp_path / "flow.safetensors")
    assert_close("values", fastmaf.load(tmp_path / "flow.safetensors").log_prob(x), naive.log_prob(x))
    again = model()
    again.load_state_dict(flow.state_dict())
    assert_close("values", again.log_prob(x), naive.log_prob(x))


@pytest.mark.parametrize("write", [write for write in WRITES if "repeated" not in write])  # torch's Adam refuses it
def test_steps_after_a_write(write: str, backend: str) -> None:
    """Values written to the padding have no effect on a step of Adam or of ``minimize``."""
    flow, x = model(), normal(64, 29, seed=1)
    WRITES[write](flow)
    twin = copy.deepcopy(flow)
    for layer in layers_of(twin).values():
        layer.load_dense_(layer.dense_weight(), layer.bias.detach().clone())
    optimizer, other = fastmaf.optim.FusedAdam(flow.parameters()), torch.optim.Adam(twin.parameters())
    for _ in range(3):
        optimizer.minimize(-flow.log_prob(x).mean())
        other.zero_grad()
        (-twin.log_prob(x).mean()).backward()
        other.step()
    assert_close("values", flow.to_naive().log_prob(x), twin.to_naive().log_prob(x))
    assert_close("values", flow.log_prob(x), flow.to_naive().log_prob(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F32], ids=str)
def test_inference_copies(dtype: torch.dtype, backend: str) -> None:
    small, x = model(F32).to_inference(dtype), normal(5, 29, dtype=F32)
    small.log_prob(x)
    for layer in layers_of(small).values():
        layer.weight.data[padding_of(layer)] = 3.0
    assert_close("values", small.log_prob(x), small.to_naive().float().log_prob(x))


def test_parameters_made_in_inference_mode(backend: str) -> None:
    """Inference tensors have no version counter."""
    with torch.inference_mode():
        flow = model()
        layer = layers_of(flow)["transforms.1.made.output"]
        layer.weight[padding_of(layer).nonzero()[5, 0]] = 3.0
    x = normal(5, 29)
    with torch.inference_mode():
        assert_close("values", flow.log_prob(x), flow.to_naive().log_prob(x))


@pytest.mark.parametrize("leaf", [True, False])
def test_tensors_in_place_of_parameters(leaf: bool, backend: str) -> None:
    """functional_call with values in the padding: masked function, zero gradients there, unchanged tensors."""
    flow, x = model(), normal(5, 29, seed=1)
    raw = {name: p.detach() + noise(p) for name, p in flow.named_parameters()}
    given = {name: t.clone().requires_grad_() for name, t in raw.items()}
    used = given if leaf else {name: t * 1.0 for name, t in given.items()}
    z, ladj = functional_call(flow, used, (x,))
    (z.square().sum() + ladj.sum()).backward()
    vector_to_parameters(parameters_to_vector(raw.values()), flow.parameters())
    naive = flow.to_naive()
    assert_close("values", z, naive(x)[0])
    for name, layer in layers_of(flow).items():
        gradient, where = given[f"{name}.weight"].grad, padding_of(layer)
        assert gradient is not None and not gradient[where].any() and gradient[~where].any()
        assert torch.equal(used[f"{name}.weight"].detach(), raw[f"{name}.weight"])


def test_a_write_between_forward_and_backward_is_still_refused(backend: str) -> None:
    """Clearing the padding neither causes nor hides torch's error."""
    flow, x = model(), normal(5, 29)
    loss = flow.log_prob(x).sum()
    flow.log_prob(x)
    loss.backward()  # nothing was written
    in_place(flow)
    first = flow.log_prob(x).sum()
    second = flow.log_prob(x).sum()
    first.backward()
    second.backward()
    third = flow.log_prob(x).sum()
    in_place(flow)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        third.backward()


def test_versions_are_not_counted(backend: str) -> None:
    flow = model()
    each(lambda p: p.data.add_(noise(p)))(flow)
    before = [p._version for p in flow.parameters()]
    flow.log_prob(normal(2, 29))
    assert [p._version for p in flow.parameters()] == before


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_know_nothing_of_the_original(copied: str, backend: str) -> None:
    import io

    flow, x = model(), normal(5, 29)
    if copied == "deepcopy":
        twin = copy.deepcopy(flow)
    else:
        file = io.BytesIO()
        torch.save(flow, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    each(lambda p: p.data.add_(noise(p)))(twin)
    assert_close("values", twin.log_prob(x), twin.to_naive().log_prob(x))
    assert_close("values", flow.log_prob(x), flow.to_naive().log_prob(x))


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmaf.kernels import storage

    monkeypatch.setattr(storage, "_library", lambda: None)
    with fastmaf.use_backend("torch"):
        for name, write in WRITES.items():
            flow, x = model(), normal(5, 29, seed=1)
            write(flow)
            assert_close("values", flow.log_prob(x), flow.to_naive().log_prob(x), name)


def test_compiled_flows(backend: str) -> None:
    flow, x = model(), normal(5, 29)
    compiled = torch.compile(flow.log_prob, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        each(lambda p: p.data.add_(noise(p)))(flow)
        assert_close("values", compiled(x), flow.to_naive().log_prob(x))


def test_steps_with_strided_gradients() -> None:
    """torch's fused kernels read their memory as if it were contiguous; those of ``torch.optim.Adam`` do not."""
    fused, other = nn.Parameter(torch.zeros(3, 4, dtype=F64)), nn.Parameter(torch.zeros(3, 4, dtype=F64))
    optimizers = fastmaf.optim.FusedAdam([fused]), torch.optim.Adam([other])
    for parameter, optimizer in zip((fused, other), optimizers, strict=True):
        parameter.grad = normal(4, 3).T
        optimizer.step()
    assert_close("values", fused.detach(), other.detach())
