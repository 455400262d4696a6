"""Work buffers that backends and the BLAS library keep from call to call, as part of ``fastmaf.memory_estimate``.

The size of the backends' buffers follows from shapes. Those of BLAS libraries, which pack matrices, depend on the
library, the CPU and the number of threads, from nothing to tens of megabytes, and no library reports them. So they are
not predicted; ``allocate_work_buffers`` allocates them before the remaining memory is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastmaf.flows import Flow
from fastmaf.kernels import PackedLayout, dispatch
from fastmaf.kernels.layout import PANEL
from fastmaf.kernels.triton_common import work_lists
from fastmaf.kernels.triton_common.launch_table import MOST_LANES, TABLES, family


def runs_on(flow: Flow, device: torch.device | str | None) -> tuple[torch.device, str]:
    """Returns the device that a flow is to run on, ``device`` if given, and the name of its backend there."""
    like = flow._like()
    where = torch.device(("cpu" if like.is_meta else like.device) if device is None else device)
    if (chosen := dispatch.chosen()) is not None:
        return where, chosen
    if where.type == "cuda" and not torch.cuda.is_available():  # an estimate for another machine
        return where, "triton"
    return where, dispatch.default_backend("affine_output", torch.empty(0, device=where, dtype=like.dtype))


@torch.no_grad()
def allocate_work_buffers(
    flow: Flow, batch: int, *, training: bool = True, device: torch.device | str | None = None
) -> None:
    """Makes the BLAS library allocate the work buffers that it keeps while a flow runs.

    For use before free memory is compared with ``memory_estimate``, which does not count them. Where the flow runs on
    the torch backend and the CPU, matrices of zeros are multiplied, with the shapes and strides of the products of each
    layer. This takes about the time of one block's part of a training step, and the memory of one layer's inputs,
    outputs and largest run of panels. On other backends nothing is done, as they use no BLAS library.

    Args:
        flow: gives the shapes; it is not run and may be on ``device="meta"``.
        batch: N.
        training: whether to include the products of the backward pass.
        device: the device to run on, if not the flow's own; the CPU for a flow on ``"meta"``.

    Example:
        >>> from fastmaf.training.workspace import allocate_work_buffers
        >>> flow = fastmaf.MAF(6, 2, (16,), order="natural", device="meta")
        >>> allocate_work_buffers(flow, 8)
    """
    where, backend = runs_on(flow, device)
    if where.type != "cpu" or backend != "torch":
        return
    dtype = flow._like().dtype
    layouts = {(layer.in_features, layer.out_features, *layer.layout.runs): layer.layout for layer in flow._layers()}
    for layout in layouts.values():
        _multiply(layout, batch, partial(torch.zeros, dtype=dtype, device="cpu"), training)


def _multiply(layout: PackedLayout, batch: int, zeros: Callable[..., Tensor], training: bool) -> None:
    """Computes the products of ``kernels/masked_linear/torch.py``, run by run."""
    rows = PANEL * (len(layout.panels) - 1)
    inputs, outputs, bias = zeros(batch, layout.in_features), zeros(batch, rows), zeros(rows)
    inputs_t = inputs.t().contiguous()
    for run in layout.runs:
        count, places = run.end - run.start, run.rows(rows)
        x, y, panels = inputs[:, : run.width], outputs[:, places], zeros(count, run.width, PANEL)
        if count == 1:
            torch.addmm(bias[places], x, panels[0], out=zeros(batch, PANEL))
        else:
            torch.baddbmm(bias[places].view(-1, 1, PANEL), x.expand(count, -1, -1), panels)
        if not training:
            continue
        x.addmm_(y, panels.view(run.width, count * PANEL).t())
        if count == 1:
            torch.mm(inputs_t[: run.width], y, out=panels[0])
        else:
            of_panels = y.unflatten(1, (-1, PANEL)).transpose(0, 1)
            torch.bmm(inputs_t[: run.width].expand(count, -1, -1), of_panels, out=panels)


def workspace_bytes(
    flow: Flow, batch: int, device: torch.device, backend: str, *, training: bool, layer_by_layer: bool
) -> int:
    """Returns the bytes of a backend's own buffers, with ``training`` those of the backward pass too.

    With ``layer_by_layer`` that pass calls the kernels layer by layer, as ``minimize`` does with ``max_grad_norm``.
    """
    if backend == "triton":
        return _triton_bytes(flow, batch, device, training=training)
    if device.type == "cpu" and backend == "native":
        return _native_bytes(flow, batch, training=training, layer_by_layer=layer_by_layer)
    return 0


def _triton_bytes(flow: Flow, n: int, device: torch.device, *, training: bool) -> int:
    """Returns the buffers of flow/triton/forward.py: partial sums, and planes ``[N, D]`` between kernels.

    The estimate counts two planes of a pass already: z with its square, or with its gradient.
    """
    card = torch.cuda.get_device_properties(device) if torch.cuda.is_available() and device.type == "cuda" else None
    capability = 61 if card is None else 10 * card.major + card.minor
    sms = 6 if card is None else card.multi_processor_count
    table, host = TABLES[family(capability)], torch.device("cpu")
    layers = flow._layers()
    launch = table.lanes if n == 1 else table.few if n <= MOST_LANES else table.dot
    tiles = -(-n // table.most_samples)
    plane, numbers = n * flow.features, [0]
    for layer in layers:
        is_output = layer.in_features < layer.out_features and layer.layout.out_features == 2 * flow.features
        if training:
            shape = table.backward if n <= MOST_LANES else table.backward_many
            programs = -(-sms * shape.programs_per_sm // tiles)
            work = work_lists.backward(layer.layout.panels, host, layer.in_features, PANEL, shape.columns, programs)
            from_above = 4 * plane if is_output else n * layer.out_features + 2 * plane
            from_above += n * layer.out_features if n > MOST_LANES else 0  # the gradient transposed
            numbers.append(work.slots * n * layer.in_features + from_above)
        elif not is_output:
            programs = -(-sms * launch.programs_per_sm // tiles)
            work = work_lists.forward(layer.layout.panels, host, launch.rows, launch.columns, programs)
            numbers.append(work.slots * n * layer.out_features)
    # Partial log-determinants are float64, the starts of panels int64.
    lists = sum(8 * len(layer.layout.panels) + 4 * (layer.in_features + layer.out_features) for layer in layers)
    partial_sums = 8 * n * len(flow._mades()) * -(-2 * flow.features // launch.rows)
    planes = 0 if training else 2 * plane + n * sum(made.hidden_features[0] for made in flow._mades()[:1])
    return 4 * (max(numbers) + planes) + lists + partial_sums


def _native_bytes(flow: Flow, n: int, *, training: bool, layer_by_layer: bool) -> int:
    """Returns the bytes that the kernels of csrc/ request from ``Scratch`` (thread_pool.h).

    The leading thread has what all share and the activations between layers, each thread inputs and sums of its own.
    """
    features, whole = flow.features, _up(n, 16)
    hidden = max((units for made in flow._mades() for units in made.hidden_features), default=0)
    chunk = min(_up(-(-n // -(-n // 128)), 16), n)  # samples that pass together
    is_wide = chunk > 8 and _up(chunk, 16) * 5 <= chunk * 6  # see tiles.h
    lanes = _up(chunk, 16) if is_wide else chunk
    fused = min(whole, 256)  # samples whose grad_x is formed at once
    shared, inputs, gradients, layerwise = [0], [0], [0], [0]
    for layer in flow._layers():
        rows, columns, groups = layer.out_features, layer.in_features, -(-(len(layer.layout.panels) - 1) // 8)
        if columns > rows:
            strip = min(max(_up(65536 // chunk, 64), 64), 1024)
            shared.append(-(-columns // strip) * lanes * (_up(rows, 32) + PANEL))
        if not training:
            continue
        outputs = features if columns < rows == 2 * features else rows
        layerwise.append(whole * (2 * columns + (6 if outputs == features else 2) * outputs))
        if columns > rows:
            strip = min(max(_up(16384 // n, 12), 48), 768)
            shared.append(256 * whole * groups)
            inputs.append(n * (strip + 28) + strip * fused)
        else:
            parts = min(max(layer.layout.numel // columns // 128, 1), 32) if columns else 1
            shared.append(max(n * (columns + 28), min(n, fused) * (columns + 28) + parts * columns * fused))
            gradients.append(256 * whole)
    forward = 1 if training and is_wide else 3 if training else 2  # planes; what is saved may be computed in its place
    state = [lanes * (forward * features + (0 if training and is_wide else 2 * hidden))]
    if training:
        state.append(max(layerwise) if layer_by_layer else whole * (3 * features + 2 * hidden))
    of_threads = max(inputs) + 128 * lanes + max(gradients)
    numbers = max(state) + max(shared) + torch.get_num_threads() * of_threads
    return numbers * flow._like().element_size() * 5 // 4  # a buffer grows by a quarter more than is needed


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
