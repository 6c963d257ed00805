"""Files of named tensors in the safetensors format, written as a stream and hashed on the way.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header; the header,
JSON from names to dtype, shape and byte range; then the tensors' bytes. Nothing in such a file is executed on
loading, and its shapes can be checked before any tensor is read. Writing it here rather than with the package keeps
errors of a full disk plain OSErrors and gives the checksum of what was sent to the file in the same pass.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes and fsyncs ``tensors``; returns the file's SHA-256. OSError if the disk does not take it."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for tensor in tensors.values():
            data = _bytes(tensor)
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, Entry]:
    """What a file holds, without its tensors; ValueError if it is not such a file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: expected a file of tensors, got {size} bytes without a whole header")
        header = json.loads(file.read(length))
    start = 8 + length
    entries = {
        name: Entry(_DTYPES[item["dtype"]], tuple(item["shape"]), start + item["data_offsets"][0],
                    start + item["data_offsets"][1])
        for name, item in header.items()
        if name != "__metadata__"
    }  # fmt: skip
    missing = max((entry.end for entry in entries.values()), default=start) - size
    if missing > 0:
        raise ValueError(f"{path}: expected {size + missing} bytes, got {size}: the file is cut off")
    return entries


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU."""
    entries = read_header(path)
    tensors: dict[str, Tensor] = {}
    with open(path, "rb") as file:
        for name, entry in entries.items():
            file.seek(entry.begin)
            data = bytearray(file.read(entry.end - entry.begin))
            flat = torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)
            tensors[name] = flat.view(entry.shape)
    return tensors


def sha256(path: Path) -> str:
    """Checksum of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
