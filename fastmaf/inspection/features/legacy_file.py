"""Reading the weights of one published file in torch's format before 1.6, without unpickling it.

Such a file holds five pickles (magic number, version, system, names, order of the storages), then the storages in that
order: the number of values as int64, and the values. Of the pickles only the strings are read, by
``pickletools.genops``, which parses opcodes and executes none: each name of a tensor is followed by the key of its
storage. A file with other bytes than the published one is refused first.
"""

from __future__ import annotations

import hashlib
import io
import pickletools
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastmaf

_PICKLES = 5
_COUNTERS = "num_batches_tracked"  # of batch normalisation, int64; all other tensors are float32


def read_legacy(path: str | Path, sha256: str) -> dict[str, Tensor]:
    """Returns the float32 tensors of a file by their names, each as one row of values.

    Args:
        path: the file.
        sha256: of its bytes, in hexadecimal digits.

    Raises:
        fastmaf.CheckpointError: the file has another hash.
        FileNotFoundError: there is no such file.
    """
    data = Path(path).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise fastmaf.CheckpointError(f"{path}: expected the file with SHA-256 {sha256}; found {found}")
    stream = io.BytesIO(data)
    *_, words, keys = [
        [str(value) for code, value, _ in pickletools.genops(stream) if code.name == "BINUNICODE"]
        for _ in range(_PICKLES)
    ]
    words = [word for word in words if word not in ("storage", "cpu")]  # of the description of the first storage
    known = set(keys)
    names = {key: name for name, key in pairwise(words) if key in known}
    tensors = {}
    for key in keys:
        count, start = int.from_bytes(stream.read(8), "little"), stream.tell()
        counter = names[key].endswith(_COUNTERS)
        stream.seek(count * (8 if counter else 4), io.SEEK_CUR)
        if not counter:
            values = np.frombuffer(data, dtype="<f4", count=count, offset=start).astype(np.float32)
            tensors[names[key]] = torch.from_numpy(values)
    return tensors
