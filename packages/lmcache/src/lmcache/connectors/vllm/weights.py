"""What a model *is*, beyond its name: a fingerprint of its weight files that costs milliseconds, not a full read.

A redeployed fine-tune keeps its path, and KV computed by the old weights would be served to the new ones. Per tensor
of a safetensors file we take name, dtype, shape and three samples (start, middle, end); of other formats the size and
evenly spaced samples. What this cannot see is an edit that leaves every sample as it was; training touches all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
SAMPLE_BYTES = 64
BLIND_SAMPLES = 256
HEADER_BYTES_MAX = 100 << 20


def fingerprint_weights(path: str, revision: str | None = None) -> str | None:
    """Digest (hex) of the weight files at ``path``: a folder, one file, or a hub name that is in the local cache.

    Returns None when the files cannot be found, so that the caller never takes two unknown models for the same.
    """
    folder = _locate(path, revision)
    if folder is None:
        return None
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if not files:
        return None
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            for part in _samples(file):
                digest.update(part)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def _locate(path: str, revision: str | None) -> Path | None:
    if os.path.exists(path):
        return Path(path)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception:
        # The hub client raises many kinds of errors for "not here"; any of them means that we do not know the weights.
        return None


def _samples(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        if file.suffix == ".safetensors":
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= min(size, HEADER_BYTES_MAX):
                raise ValueError(f"{file} has no safetensors header")
            header = handle.read(length)
            yield header
            for begin, end in sorted(_tensor_spans(header)):
                for at in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                    yield _read(handle.fileno(), 8 + length + at, min(SAMPLE_BYTES, end - at))
        else:
            for index in range(BLIND_SAMPLES):
                yield _read(handle.fileno(), index * max(0, size - SAMPLE_BYTES) // BLIND_SAMPLES, SAMPLE_BYTES)
            yield _read(handle.fileno(), max(0, size - SAMPLE_BYTES), SAMPLE_BYTES)


def _tensor_spans(header: bytes) -> Iterator[tuple[int, int]]:
    entries = json.loads(header)
    for name, entry in entries.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield int(begin), int(end)


def _read(fd: int, offset: int, length: int) -> bytes:
    return os.pread(fd, length, offset) if length > 0 else b""
