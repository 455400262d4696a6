"""Packed weights as rows, their padding, and the random numbers that they begin with."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmaf.kernels import PackedLayout, layout, storage, storage_numpy
from tests.core.helpers import generator

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LIBRARY = storage._library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the native library was not built")


def random_layout(out_features: int, in_features: int, seed: int = 0) -> PackedLayout:
    prefix = torch.randint(0, in_features + 1, (out_features,), generator=generator(seed))
    return PackedLayout(prefix.sort().values, in_features)


def layouts() -> dict[str, PackedLayout]:
    sizes = (1, 1), (1, 100), (15, 3), (16, 16), (17, 33), (100, 70), (37, 2000), (2100, 40)
    few = torch.randint(0, 4, (300,), generator=generator()).sort().values
    return {
        "one row sees nothing": PackedLayout(torch.tensor([0]), 1),
        "no row sees anything": PackedLayout(torch.zeros(40, dtype=torch.int64), 5),
        "the last row sees all": PackedLayout(torch.tensor([0] * 20 + [50]), 50),
        "all rows see all": PackedLayout(torch.full((32,), 48), 48),
        "duplicate degrees": PackedLayout(few * 30, 90),
        **{f"{out} x {columns}": random_layout(out, columns) for out, columns in sizes},
    }


@pytest.fixture(params=["torch", pytest.param("library", marks=needs_library)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL | None:
    chosen = LIBRARY if request.param == "library" else None
    monkeypatch.setattr(storage, "_library", lambda: chosen)
    return chosen


@pytest.fixture(params=[64, 3000, 1 << 20])
def part_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_numpy, "PART_BYTES", request.param)


def to_rows(weight: Tensor, of: PackedLayout) -> Tensor:
    rows = weight.new_empty(of.visible)
    storage.panels_to_rows(weight, rows, of)
    return rows


def each(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[tuple[PackedLayout, Tensor, torch.dtype]]:
    """Yields layouts with a dense weight that is zero where it is masked."""
    for of in layouts().values():
        for dtype in dtypes:
            dense = torch.randn(of.out_features, of.in_features, generator=generator()).to(dtype)
            yield of, dense.masked_fill_(~of.mask(), 0), dtype


def test_rows_become_panels_and_panels_rows(library: object, part_bytes: None) -> None:
    for of, dense, dtype in each():
        rows, packed = dense[of.mask()], of.pack(dense)
        weight = torch.full((of.numel,), torch.nan, dtype=dtype)
        again = torch.full((of.visible,), torch.nan, dtype=dtype)
        assert storage.rows_to_panels(rows, weight, of) and storage.panels_to_rows(packed, again, of)
        assert torch.equal(weight, packed) and torch.equal(again, rows)
        assert torch.equal(storage.from_rows(rows, of), packed) and torch.equal(to_rows(packed, of), rows)


def test_rows_are_written_to_a_file_and_read(library: object, part_bytes: None, tmp_path: Path) -> None:
    path, before, after = tmp_path / "rows", b"123", b"45678"
    for of, dense, dtype in each():
        packed, weight = of.pack(dense), torch.full((of.numel,), torch.nan, dtype=dtype)
        with open(path, "wb") as file:
            file.write(before)
            assert storage.write_rows(file, packed, of)
            file.write(after)
        assert path.read_bytes() == before + dense[of.mask()].view(torch.uint8).numpy().tobytes() + after
        with open(path, "rb", buffering=0) as file:
            file.seek(len(before))
            assert storage.read_rows(file, weight, of)
        assert torch.equal(weight, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_of_several_megabytes(library: object, dtype: torch.dtype, tmp_path: Path) -> None:
    """The library moves it on several threads, part by part."""
    of, bits = random_layout(2005, 3001), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    places = torch.arange(of.visible, dtype=torch.int32)
    rows, weight = places.to(bits).view(dtype), torch.full((of.numel,), torch.nan, dtype=dtype)
    dense = torch.zeros(of.out_features, of.in_features, dtype=bits).masked_scatter_(of.mask(), rows.view(bits))
    storage.rows_to_panels(rows, weight, of)
    assert torch.equal(of.unpack(weight.view(bits)), dense)
    assert torch.equal(to_rows(weight, of).view(bits), rows.view(bits))
    finite = weight.nan_to_num(0, 1, 1)
    with open(tmp_path / "rows", "wb") as file:
        assert storage.write_rows(file, finite, of)
    assert (tmp_path / "rows").read_bytes() == to_rows(finite, of).view(torch.uint8).numpy().tobytes()
    weight.fill_(torch.nan)
    with open(tmp_path / "rows", "rb", buffering=0) as file:
        assert storage.read_rows(file, weight, of)
    assert torch.equal(weight.view(bits), finite.view(bits))


def test_a_file_that_ends_before_or_cannot_be_read_or_written(library: object, tmp_path: Path) -> None:
    of, path = random_layout(100, 70), tmp_path / "rows"
    weight = torch.zeros(of.numel)
    path.write_bytes(b"\0" * (4 * of.visible - 1))
    with open(path, "rb", buffering=0) as file:
        with pytest.raises(EOFError):
            storage.read_rows(file, weight, of)
        with pytest.raises(OSError):
            storage.write_rows(file, weight, of)
    with open(path, "ab", buffering=0) as file, pytest.raises(OSError):
        storage.read_rows(file, weight, of)


def test_bits_are_moved_as_they_are(library: object) -> None:
    """Negative zeros, subnormal numbers and the payload of a NaN."""
    of = random_layout(37, 40)
    bits = torch.randint(-(2**31), 2**31 - 1, (of.visible,), generator=generator(), dtype=torch.int32)
    bits[:2] = torch.tensor([-(2**31), 1])
    rows = to_rows(storage.from_rows(bits.view(torch.float32), of), of)
    assert torch.equal(rows.view(torch.int32), bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_that_is_not_finite_is_found_wherever_it_is(
    library: object, dtype: torch.dtype, tmp_path: Path
) -> None:
    of, path = random_layout(19, 37), tmp_path / "rows"
    rows, weight = torch.ones(of.visible, dtype=dtype), torch.empty(of.numel, dtype=dtype)
    rows[5] = torch.finfo(dtype).max
    assert storage.rows_to_panels(rows, weight, of)
    for place in range(of.visible):
        for value in (torch.nan, torch.inf, -torch.inf):
            wrong = rows.clone()
            wrong[place] = value
            path.write_bytes(wrong.view(torch.uint8).numpy().tobytes())
            assert not storage.rows_to_panels(wrong, weight, of)
            assert not storage.panels_to_rows(weight, wrong, of)
            with open(path, "r+b", buffering=0) as file:
                assert not storage.read_rows(file, weight.zero_(), of)
                assert not storage.write_rows(file, weight, of)


def test_rows_of_another_dtype_are_refused() -> None:
    of = random_layout(3, 4)
    for dtype in (torch.int64, torch.bool, torch.complex128, torch.float8_e5m2):
        with pytest.raises(ValueError, match=rf"must be of one of torch.float16, .*; found {dtype}"):
            storage.from_rows(torch.ones(of.visible).to(dtype), of)


@pytest.mark.parametrize("value", [1e-7, torch.nan])
def test_padding_is_cleared_where_it_is_not_zero(library: object, value: float) -> None:
    for of, dense, _ in each():
        packed, where = of.pack(dense), layout.padding(of.prefix, of.panels)
        assert not storage.zero_padding([packed], [of.prefix], [of.panels])
        for place in {int(i) for i in where[[0, len(where) // 2, -1]]} if len(where) else ():
            dirty = packed.clone()
            dirty[place] = value
            assert storage.zero_padding([packed, dirty], [of.prefix] * 2, [of.panels] * 2)
            assert torch.equal(dirty, packed)


def test_clean_padding_is_not_written_to(library: object) -> None:
    """A parameter that requires gradients and an inference tensor are cleared, unseen by version counters."""
    of = random_layout(20, 30)
    where = layout.padding(of.prefix, of.panels)
    parameter = torch.nn.Parameter(of.pack(torch.ones(20, 30)))
    with torch.no_grad():
        parameter[where[0]] = 1
    version = parameter._version
    assert storage.zero_padding([parameter], [of.prefix], [of.panels]) and parameter._version == version
    with torch.inference_mode():
        weight = parameter.clone()
        weight[where[-1]] = 1
    assert storage.zero_padding([weight], [of.prefix], [of.panels])
    assert of.padding_is_zero(parameter) and of.padding_is_zero(weight)


@needs_library
def test_the_library_and_torch_draw_the_same_numbers(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    for of, _, dtype in each():
        for seed in (0, 1, -(2**63), 2**63 - 2):
            drawn = []
            for library, part_bytes in ((LIBRARY, 1 << 20), (None, 64), (None, 5000)):
                monkeypatch.setattr(storage, "_library", lambda library=library: library)
                monkeypatch.setattr(storage_numpy, "PART_BYTES", part_bytes)
                weight = torch.full((of.numel,), torch.nan, dtype=dtype)
                storage._write_uniform(weight, of, 0.3, seed)
                drawn.append(weight)
            assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def split_mix(seed: int, index: int) -> int:
    """SplitMix64 in Python's integers, as published."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_numbers_are_those_of_the_published_generator(library: object) -> None:
    assert split_mix(1234567, 0) == 6457827717110365317  # the reference implementation's first number
    of, seed, bound = random_layout(37, 40), 2**63 + 12345, 0.7
    single, double = torch.empty(of.numel), torch.empty(of.numel, dtype=torch.float64)
    storage._write_uniform(single, of, bound, seed)
    storage._write_uniform(double, of, bound, seed)
    bits = [split_mix(seed, i) for i in range(of.visible)]
    expected = torch.tensor([((b >> 11) - 2**52) * (bound / 2**52) for b in bits], dtype=torch.float64)
    assert torch.equal(to_rows(double, of), expected)
    steps = torch.tensor([(b >> 40) - 2**23 for b in bits], dtype=torch.float32)
    assert torch.equal(to_rows(single, of), steps * (torch.tensor(bound) / 2**23))


def test_numbers_are_uniform_and_independent(library: object) -> None:
    """Moments of 200,000 numbers within five standard errors, within rows and across neighbours."""
    of, bound = PackedLayout(torch.full((400,), 500), 500), 0.25
    weight = torch.empty(of.numel, dtype=torch.float64)
    storage.uniform_(weight, of, bound, generator(3))
    u = of.unpack(weight) / bound  # variance 1/3, fourth moment 1/5
    n = u.numel()
    assert -1 <= float(u.min()) < -0.999 and 0.999 < float(u.max()) < 1
    assert abs(float(u.mean())) < 5 * (1 / 3 / n) ** 0.5
    assert abs(float(u.square().mean()) - 1 / 3) < 5 * ((1 / 5 - 1 / 9) / n) ** 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u[:, 16:], u[:, :-16])):
        assert abs(float((a * b).mean())) < 5 * (1 / 9 / a.numel()) ** 0.5
    counts = torch.histc(u, bins=100, min=-1, max=1)
    assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 99 + 5 * 198**0.5


def test_a_seed_gives_the_same_weights_on_any_number_of_threads(library: object) -> None:
    of, threads, drawn = random_layout(2000, 3000), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            weight = torch.nn.Parameter(torch.empty(of.numel))
            version = weight._version
            storage.uniform_(weight, of, 0.1, generator(1))
            assert weight._version > version, "autograd must see that the weight changed"
            drawn.append(weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)
    storage.uniform_(other := torch.empty(of.numel), of, 0.1, generator(2))
    assert int((other == drawn[0]).sum()) <= of.numel - of.visible + 2, "only padding is equal"


def test_weights_of_fewer_bits_are_those_of_float32(library: object) -> None:
    of = random_layout(30, 40)
    single, half = torch.empty(of.numel), torch.empty(of.numel, dtype=torch.bfloat16)
    for weight in (single, half):
        storage.uniform_(weight, of, 0.1, generator())
    assert torch.equal(single.to(torch.bfloat16), half)


def test_strided_weights_are_initialised() -> None:
    of = random_layout(30, 40)
    weight = torch.full((of.numel, 2), torch.nan)[:, 0]
    storage.uniform_(weight, of, 0.1, generator())
    assert of.padding_is_zero(weight) and float(weight.abs().max()) <= 0.1 and len(weight.unique()) > of.visible // 2


@needs_library
def test_what_the_library_cannot_read_is_refused(tmp_path: Path) -> None:
    of = random_layout(40, 30)
    weight, rows = torch.ones(of.numel), torch.ones(of.visible)
    wrong = weight[:-1], weight.to(torch.float8_e4m3fn), weight.to("meta"), torch.ones(of.numel, 2)[:, 0], weight[None]
    with (tmp_path / "rows").open("w+b", buffering=0) as file:
        for other in wrong:
            for call in (
                lambda w=other: storage.rows_to_panels(rows.to(w.dtype), w, of),
                lambda w=other: storage.panels_to_rows(w, rows.to(w.dtype), of),
                lambda w=other: storage.read_rows(file, w, of),
                lambda w=other: storage.write_rows(file, w, of),
                lambda w=other: storage.zero_padding([w], [of.prefix], [of.panels]),
            ):
                with pytest.raises(ValueError, match="weight"):
                    call()
        for other in (rows[:-1], rows.double(), torch.ones(of.visible, 2)[:, 0]):
            with pytest.raises(ValueError, match="rows"):
                storage.rows_to_panels(other, weight, of)
            with pytest.raises(ValueError, match="rows"):
                storage.panels_to_rows(weight, other, of)
    assert (tmp_path / "rows").stat().st_size == 0
    with pytest.raises(ValueError, match="weight"):
        storage.uniform_(weight[:-1], of, 1.0)
    assert bool((weight == 1).all()) and bool((rows == 1).all())
