"""Scoring by several processes that ``torchrun`` started, on one machine or several: shares of files, and their rows.

The processes exchange bytes through gloo, so that they need no common folder for their journals, and nothing is
unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed

from fastmaf.training.failures import connected
from fastmaf.training.processes import Processes


def files_of_first(team: Processes, files: Sequence[Path]) -> list[Path]:
    """Returns the files that the first process found, in all processes: a folder may have changed meanwhile."""
    if team.size == 1:
        return list(files)
    content = _tensor(json.dumps([str(file) for file in files]).encode() if team.is_first else b"")
    length = torch.tensor([len(content)])
    team.check()
    with connected():
        distributed.broadcast(length, 0, group=team.group)
        content = content if team.is_first else torch.empty(int(length), dtype=torch.uint8)
        distributed.broadcast(content, 0, group=team.group)
    return [Path(name) for name in json.loads(bytes(content.numpy()))]


def contents_at_first(team: Processes, content: bytes) -> list[bytes]:
    """Returns the contents of the other processes in the first, and nothing in the others."""
    if team.size == 1:
        return []
    team.check()
    lengths = team.stack(torch.tensor([len(content)]))
    with connected():
        if not team.is_first:
            distributed.send(_tensor(content), 0, group=team.group)
            return []
        received = []
        for rank in range(1, team.size):
            part = torch.empty(int(lengths[rank]), dtype=torch.uint8)
            distributed.recv(part, rank, group=team.group)
            received.append(bytes(part.numpy()))
    return received


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
