"""Weights of ``Flow.to_inference(torch.float8_e4m3fn)``: bytes with a factor per layer, wherever a flow goes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.kernels import flow_args
from fastmaf.kernels.float8 import decode, encode
from tests.core.helpers import blocks_of, build, layers_of, normal, padding_of
from tests.io.model_files import Parts
from tests.tolerances import F32, F64, assert_close

D, FLOAT8 = 37, torch.float8_e4m3fn
SIZES = [1e-37, 1e-5, 0.3, 1.0, 447.9, 448.0, 448.1, 3e38]


def flow_of(**options: Any) -> fastmaf.MAF:
    return build(D, **{"dtype": F32, "hidden_features": (29, 31), "degrees": "random", "scale": 1.5, **options})


@pytest.mark.parametrize("largest", SIZES)
def test_numbers_are_rounded_to_three_bits(largest: float) -> None:
    weight = normal(5000, dtype=F32)
    weight *= largest / weight.abs().max()
    stored, scale = encode(weight)
    found = decode(stored, scale, F64)
    assert stored.dtype == torch.uint8 and found.isfinite().all()
    # Half a unit of the last of three bits, or of the least number: 2⁻⁹, where 224 to 448 is the largest.
    bound = torch.maximum(weight.double().abs() / 16, torch.tensor(2.0**-10 * scale, dtype=F64))
    assert ((found - weight.double()).abs() <= bound).all()
    if largest > 1e-28:  # weights of 100 binary orders below 1 are as good as zero
        assert 224 <= float(found.abs().max()) / scale <= 448
    again, same = encode(found.float())
    assert torch.equal(decode(again, same, F64), found), "rounding twice is rounding once"
    assert torch.equal(decode(stored, scale, torch.bfloat16).double(), found), "bfloat16 holds it exactly"


def test_zero_and_nothing() -> None:
    for weight in (torch.zeros(5), torch.zeros(0), torch.zeros(3, device="meta")):
        stored, scale = encode(weight)
        assert stored.shape == weight.shape and scale == 1 and stored.device == weight.device
    assert not stored.is_meta or fastmaf.MAF(9, 2, (8,), device="meta").to_inference(FLOAT8).features == 9


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    flow = flow_of()
    with torch.no_grad():
        blocks_of(flow)[0].made.output.weight[-1] = value
    with pytest.raises(ValueError, match="finite"):
        flow.to_inference(FLOAT8)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_any_size_of_weights(backend: str, factor: float) -> None:
    """Hidden layers so large or small that float8 numbers without a factor would overflow or vanish."""
    flow = flow_of()
    with torch.no_grad():
        for block in blocks_of(flow):
            for parameter in block.made.hidden[0].parameters():
                parameter.mul_(factor)
            block.made.hidden[1].weight.div_(factor)
    small, x = flow.to_inference(FLOAT8), normal(5, D, dtype=F32)
    truth = copy.deepcopy(flow).double()
    for layer, stored in zip(layers_of(truth).values(), layers_of(small).values(), strict=True):
        layer.load_dense_(stored.dense_weight(), stored.bias)
        assert float((stored.dense_weight() - stored.layout.unpack(stored.weight.float())).abs().max()) > 0
    assert_close("values", small.log_prob(x), truth.log_prob(x.double()).detach())
    assert_close("inverse", small.inverse(x)[0], truth.inverse(x.double())[0].detach())
    difference = (small.log_prob(x) - flow.log_prob(x)).abs().max() / flow.log_prob(x).abs().max()
    assert difference < 0.2, "as of weights of the usual size"


def test_every_way_to_the_dense_model(backend: str) -> None:
    small, x = flow_of(order="random").to_inference(FLOAT8), normal(5, D, dtype=F32)
    assert_close("values", small.to_naive().log_prob(x).detach(), small.log_prob(x))
    for dtype in (torch.bfloat16, F32):
        wide = small.to_inference(dtype)
        assert {layer.weight.dtype for layer in layers_of(wide).values()} == {dtype}
        assert_close("values", wide.log_prob(x), small.log_prob(x))
    made = blocks_of(small)[0].made
    dense = torch.nn.functional.linear(x, made.hidden[0].dense_weight(), made.hidden[0].bias).relu()
    assert_close("values", made.hidden[0](x), dense)
    assert_close("values", copy.deepcopy(small).double().log_prob(x.double()).float(), small.log_prob(x))


def test_transforms_of_torch(backend: str) -> None:
    """Forward mode, ``vmap`` and second derivatives, which do not go through the ops."""
    small, x = flow_of().to_inference(FLOAT8), normal(3, D, dtype=F32)
    wide = small.to_inference(F32)
    for function in (torch.func.hessian, torch.func.jacfwd):
        found, expected = (function(lambda row, m=model: m.log_prob(row[None])[0])(x[0]) for model in (small, wide))
        assert_close("gradients", found, expected)
    found, expected = (torch.func.vmap(model.inverse)(x[:, None])[0] for model in (small, wide))
    assert_close("inverse", found, expected)


def test_state_dicts(backend: str) -> None:
    flow, x = flow_of(), normal(5, D, dtype=F32)
    small, other = flow.to_inference(FLOAT8), flow_of(scale=4.0).to_inference(FLOAT8)
    assert [name for name in small.state_dict() if name not in flow.state_dict()] == [
        f"{name}.weight_scale" for name in layers_of(small)
    ]
    assert not torch.equal(other.log_prob(x), small.log_prob(x))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other.log_prob(x), small.log_prob(x))
    for target, source in ((small, flow), (flow, small)):
        before = target.log_prob(x)
        for strict in (True, False):
            with pytest.raises(ValueError, match="float8"):
                target.load_state_dict(source.state_dict(), strict=strict)
        assert torch.equal(target.log_prob(x), before)
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(again.log_prob(x), small.log_prob(x))


def test_writes_are_seen(backend: str) -> None:
    small, x = flow_of().to_inference(FLOAT8), normal(5, D, dtype=F32)
    for evaluate in (small.log_prob, lambda x: small.inverse(x)[0], small.nll_per_dim):
        before = evaluate(x)
        for layer in layers_of(small).values():
            layer.weight.bitwise_xor_(128)  # the sign
        assert not torch.equal(evaluate(x), before)
        for layer in layers_of(small).values():
            layer.weight.bitwise_xor_(128)
        assert torch.equal(evaluate(x), before)
    for layer in layers_of(small).values():
        layer.weight.add_(1)
        assert layer.state_dict()["weight"][padding_of(layer)].count_nonzero() == 0


def test_inference_mode(backend: str) -> None:
    flow, x = flow_of(), normal(5, D, dtype=F32)
    expected = flow.to_inference(FLOAT8).log_prob(x)
    with torch.inference_mode():
        small = flow.to_inference(FLOAT8)
        assert_close("values", small.log_prob(x), expected)
        assert_close("round_trip", small.inverse(small(x)[0])[0], x)
    assert_close("values", small.log_prob(x), expected)


def test_weights_are_not_trained(backend: str) -> None:
    small = flow_of().to_inference(FLOAT8)
    layer = layers_of(small)["transforms.0.made.output"]
    with pytest.raises(RuntimeError, match="floating point"):
        small.requires_grad_()
    for write in (layer.reset_parameters, lambda: layer.load_dense_(layer.dense_weight(), layer.bias)):
        with pytest.raises(ValueError, match="to_inference"):
            write()
    with pytest.raises(RuntimeError, match="does not require grad"):
        fastmaf.TrainingStep(small, torch.optim.Adam([small.transforms[0].made.output.bias]))(normal(3, D, dtype=F32))  # type: ignore[union-attr, list-item]


def test_files(tmp_path: Path, backend: str) -> None:
    """Bytes and factors are checked as they are read."""
    flow, path = flow_of(), tmp_path / "flow.safetensors"
    flow.to_inference(FLOAT8).save(path)
    name = "transforms.0.made.output.weight"
    found = Parts.of(path.read_bytes())
    assert found.header[name]["dtype"] == "F8_E4M3" and found.header[f"{name}_scale"]["shape"] == []
    broken: list[tuple[str, np.ndarray]] = [
        (f"{name}_scale", np.array(factor, dtype=np.float32)) for factor in (0.3, 0.0, -0.5, np.nan, np.inf, 2.0**-120)
    ]
    count = found.header[name]["shape"][0]
    broken += [(name, np.full(count, byte, dtype=np.uint8)) for byte in (0x7F, 0xFF)]
    for key, values in broken:
        file = Parts.of(path.read_bytes())
        file.replace(key, values)
        (tmp_path / "broken.safetensors").write_bytes(file.joined())
        with pytest.raises(fastmaf.CheckpointError, match=name):
            fastmaf.load(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("op", ["flow_forward", "flow_inverse", "masked_linear", "affine_output"])
def test_opcheck(backend: str, op: str) -> None:
    block = blocks_of(flow_of(blocks=1, order="natural").to_inference(FLOAT8))[0]
    args = flow_args([block.block()], [None, None])
    layers, x = args.layers_of_blocks()[0], normal(3, D, dtype=F32).requires_grad_(op != "flow_inverse")
    h = block.made.hidden_units(x.detach())
    arguments: dict[str, tuple[Any, ...]] = {
        "flow_forward": (x, *args, True),
        "flow_inverse": (x, *args),
        "masked_linear": (x, *args.hidden(0)),
        "affine_output": (h, x, *args.output(0, layers[-1])),
    }
    torch.library.opcheck(getattr(torch.ops.fastmaf, op).default, arguments[op])


@pytest.mark.slow
def test_compiled(backend: str) -> None:
    small, x = flow_of().to_inference(FLOAT8), normal(5, D, dtype=F32)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return small.log_prob(x), small.inverse(x)[0]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x), both(x), strict=True):
        assert_close("values", found, expected)
