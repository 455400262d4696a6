"""How kernels are launched on a GPU: with several warps where tests look for races, and without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastmaf
from fastmaf.kernels.triton_common import launch_table
from tests.core.helpers import blocks_of, build, normal
from tests.kernels.cases import needs, set_launch
from tests.kernels.triton_common.limits import READ_WEIGHTS, SOLVE
from tests.tolerances import F32

pytestmark = needs("triton")


@pytest.mark.parametrize("capability", launch_table.TABLES)
def test_the_paths_that_sanitizers_watch_have_several_warps(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """With one, a missing barrier is no race. The tests that ``make gpu-check`` sanitizes are launched like this."""
    from fastmaf.kernels.triton_common.device import recording

    flow = build(21, blocks=2, dtype=F32)
    flow.validate_args = False  # launches that are recorded leave results as they were allocated
    for batch in (1, 3, 17):
        set_launch(monkeypatch, "cuda", 16, 16, 64)
        with fastmaf.use_backend("triton"), recording(capability, 6) as launches:
            flow.log_prob(normal(batch, 21, dtype=F32)).sum().backward()
            flow.sample(batch)
        warps = {
            one.kernel.__name__: one.options["num_warps"] for one in launches if one.kernel.__name__ in READ_WEIGHTS
        }
        assert set(warps) == set(READ_WEIGHTS)
        assert all(count >= 4 for count in warps.values()), warps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("capability", launch_table.TABLES)
def test_products_of_few_samples_fit_on_every_card(capability: int, dtype: torch.dtype) -> None:
    """A multiprocessor has registers for one program at least, and a thread loads 16 bytes of each tile."""
    from fastmaf.kernels.masked_linear.triton import shape_of
    from fastmaf.kernels.triton_common.device import recording

    with recording(capability, 6):
        for n in range(1, launch_table.MOST_LANES + 1):
            for whole in (False, True):
                shape = shape_of(torch.empty(1), n, dtype, whole)
                options = shape.options
                assert options["maxnreg"] * 32 * options["num_warps"] <= 65_536 and options["LANES"]
                assert options["BLOCK_K"] * options["TILES"] == shape.columns
                assert options["BLOCK_K"] * 16 * dtype.itemsize == 16 * 32 * options["num_warps"]


def test_no_launch_takes_an_inverse_through_many_levels() -> None:
    """Windows ends a launch that holds a display's GPU for two seconds, which a whole inverse might on a small card."""
    from fastmaf.kernels.triton_common.device import recording

    flow = build(101, blocks=2, hidden_features=(101,), dtype=F32)
    flow.validate_args = False
    schedules = [block.made.schedule for block in blocks_of(flow)]
    assert all(len(schedule) > 64 for schedule in schedules), "the test wants many levels"
    with torch.no_grad(), fastmaf.use_backend("triton"), recording(61, 6) as launches:
        flow.inverse(normal(512, 101, dtype=F32))
    solving = [launched for launched in launches if launched.kernel.__name__ == SOLVE]
    assert len(solving) >= sum(len(schedule) / 16 for schedule in schedules)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Makes an error of every operation that waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_neither_samples_nor_eager_steps_wait_for_the_gpu(no_waiting: None) -> None:
    flow = build(21, blocks=3, order="random", dtype=F32).to("cuda")
    flow.validate_args = False  # checks of values read them
    optimizer = fastmaf.optim.FusedAdam(flow.parameters())
    x = normal(5, 21, dtype=F32).cuda()

    def use() -> None:
        with torch.no_grad():
            flow.inverse(x)
        optimizer.minimize(-flow.log_prob(x).mean(), check_finite=False)

    for _ in range(2):
        use()  # compiles, and sends the tables that stay
    torch.cuda.set_sync_debug_mode("error")
    use()
