"""The buffers that backends hold on to from call to call, as part of ``fastmaf.memory_estimate``."""

from __future__ import annotations

import torch

from fastmaf.flows import Flow
from fastmaf.kernels.triton_common import work_lists
from fastmaf.kernels.triton_common.launch_table import TABLES, family


def workspace_bytes(
    flow: Flow, batch: int, device: torch.device, backend: str, *, training: bool, layer_by_layer: bool
) -> int:
    """Returns the bytes that a backend's own buffers come to.

    Args:
        flow: what runs; shapes alone are read.
        batch: N.
        device: where it runs.
        backend: ``"torch"``, ``"native"`` or ``"triton"``.
        training: the backward pass runs too.
        layer_by_layer: it goes through the layers in calls of their own, as ``FusedAdam.minimize`` does with
            ``max_grad_norm``.
    """
    if backend == "triton":
        return _of_kernels(flow, batch, device, training=training)
    if device.type != "cpu" or backend != "native":
        return 0  # torch's ops hold none of their own; for those of the BLAS library see fastmaf.training.blas
    return _scratch(flow, batch, training=training, layer_by_layer=layer_by_layer)


def _of_kernels(flow: Flow, n: int, device: torch.device, *, training: bool) -> int:
    """What flow/triton/forward.py asks for beside what is kept: partial sums, and planes ``[N, D]`` between kernels.

    The memory model counts two planes of a pass already: z with its square, or with its gradient.
    """
    card = torch.cuda.get_device_properties(device) if torch.cuda.is_available() and device.type == "cuda" else None
    capability = 61 if card is None else 10 * card.major + card.minor
    sms = 6 if card is None else card.multi_processor_count
    table, host = TABLES[family(capability)], torch.device("cpu")
    layers = [layer for made in flow._mades() for layer in made.layers]
    aligned = all(work_lists.rows(layer.layout.table, host).aligned for layer in layers)
    launch = (table.lanes if n == 1 else table.dot).fitted(aligned)
    tiles = -(-n // table.most_samples)
    plane, numbers = n * flow.features, [0]
    for layer in layers:
        is_output = layer.in_features < layer.out_features and layer.layout.out_features == 2 * flow.features
        if not training and not is_output:
            programs = -(-sms * launch.programs_per_sm // tiles)
            work = work_lists.forward(layer.layout.table, host, launch.rows, launch.columns, programs)
            numbers.append(work.slots * n * layer.out_features)
        if training:
            one = table.backward_of(min(n, table.most_samples)).fitted(aligned)
            programs = sms * one.programs_per_sm
            work = work_lists.backward(layer.layout.table, host, layer.in_features, one.rows, one.columns, programs)
            above = 4 * plane if is_output else n * layer.out_features + 2 * plane
            numbers.append(work.slots * n * layer.in_features + above)
    # Shares of log-determinants are float64; where a row lies and how wide it is takes 12 bytes of it.
    lists = sum(12 * layer.out_features + 4 * (layer.in_features + layer.out_features) for layer in layers)
    shares = 8 * n * len(flow._mades()) * -(-2 * flow.features // launch.rows)
    planes = 0 if training else 2 * plane + n * sum(made.hidden_features[0] for made in flow._mades()[:1])
    return 4 * (max(numbers) + planes) + lists + shares


def _scratch(flow: Flow, n: int, *, training: bool, layer_by_layer: bool) -> int:
    """What flow_forward.cpp, forward.h and backward.h ask of ``Scratch`` (thread_team.h), in all slots and threads."""
    threads = torch.get_num_threads()
    mades = flow._mades()
    layers = [layer for made in mades for layer in made.layers]
    widest = max((layer.in_features for layer in layers), default=0)
    # Activations in panels of 16 samples (small batches: in blocks of 512 columns), 64 samples at a time.
    pack = n * 528 * -(-widest // 512) if n <= 8 else 16 * -(-min(n, 64) // 16) * widest
    if not training:
        numbers = pack + n * (2 * flow.features + max((sum(made.hidden_features) for made in mades), default=0))
    else:
        strips = n * (2 * 528 + 80)  # of each thread; in the first one's the forward pass has its pack
        parts = 1 if threads == 1 else round(6.2 * threads)  # most_parts
        shared = [
            80 * n * -(-layer.out_features // 64)
            if layer.in_features > layer.out_features
            else parts * n * (layer.in_features + 16)
            for layer in layers
        ]
        numbers = max(pack, strips) + (threads - 1) * strips + max(shared, default=0)
        if not layer_by_layer:
            hidden = max((units for made in mades for units in made.hidden_features), default=0)
            numbers += n * (3 * flow.features + 2 * hidden)
    return numbers * flow._like().element_size() * 5 // 4  # a buffer grows by a quarter more than is needed
