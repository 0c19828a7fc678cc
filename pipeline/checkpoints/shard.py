"""The files of a checkpoint: safetensors, laid out ahead, so that a copy in memory is written as it is.

The format (https://huggingface.co/docs/safetensors) is a length (8 bytes, little-endian), a JSON header of that length,
and the tensors one after the other. The safetensors package reads these files; it would write them only from tensors
that are all in memory, through a second copy of them, and without a checksum on the way.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from pipeline.accelerator import has_accelerator, synchronize
from pipeline.checkpoints.manifest import CHECKSUM, WEIGHT, open_file
from pipeline.engine import Fragment
from pipeline.errors import CheckpointError

CHUNK_BYTES = 2**24
_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_READ_BYTES = 2**30  # Linux reads no more than 2 GiB at once
Shape = tuple[int, ...]
Entry = dict[str, Any]
"""What a manifest says of a file: {"bytes": size, "xxh3_128": checksum}."""


def file_checksum(file: io.FileIO) -> str:
    """Return the hex digest of a file's content (XXH3, 128 bits: as fast as memory, and not against an adversary)."""
    digest, chunk = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    while read := file.readinto(chunk):
        digest.update(chunk[:read])
    return digest.hexdigest()


class _Sink:
    """A new file that is hashed on its way to the disk; a context.

    Attributes:
        entry: what the manifest says of it; after the context.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._digest, self._bytes = path, xxhash.xxh3_128(), 0
        self.entry: Entry = {}

    def __enter__(self) -> _Sink:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        return self

    def write(self, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            self._digest.update(chunk)
            try:
                while chunk:
                    chunk = chunk[os.write(self._descriptor, chunk) :]
            except OSError as error:
                raise self._named(error) from None
        self._bytes += len(content)

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                try:
                    os.fsync(self._descriptor)
                except OSError as error:
                    raise self._named(error) from None
                self.entry = {"bytes": self._bytes, CHECKSUM: self._digest.hexdigest()}
        finally:
            os.close(self._descriptor)

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self._path))


def write_file(path: Path, content: memoryview) -> Entry:
    """Write a file to the disk; return what the manifest says of it."""
    with _Sink(path) as sink:
        sink.write(content)
    return sink.entry


def copy_file(source: Path, target: Path) -> Entry:
    """Copy a file to the disk under another name; return what the manifest would say of what was read."""
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with source.open("rb", buffering=0) as file, _Sink(target) as sink:
        while read := file.readinto(chunk):
            sink.write(chunk[:read])
    return sink.entry


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, of which none is held; a context.

    Args:
        path: the file.
        tensors: name -> (shape, dtype), in the order in which they will be written.
        metadata: strings for the header.

    Attributes:
        entry: what a manifest says of the file; after the context.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[Shape, torch.dtype]], metadata: dict[str, str] | None = None
    ) -> None:
        self._sink, self._tensors = _Sink(path), dict(tensors)
        self._header = _header(self._tensors, metadata)
        self._names = iter(self._tensors)
        self.entry: Entry = {}

    def __enter__(self) -> SafetensorsWriter:
        self._sink.__enter__()
        self._sink.write(memoryview(self._header))
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        assert name == next(self._names), name
        assert (tuple(tensor.shape), tensor.dtype) == self._tensors[name], name
        if tensor.numel():
            self._sink.write(_bytes_of(tensor.detach().cpu().contiguous()))

    def __exit__(self, kind: object, *rest: object) -> None:
        assert kind is not None or next(self._names, None) is None, "tensors are left"
        self._sink.__exit__(kind, *rest)
        self.entry = self._sink.entry


def _header(tensors: Mapping[str, tuple[Shape, torch.dtype]], metadata: dict[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, (shape, dtype) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class SafetensorsFile:
    """A safetensors file, read tensor by tensor into memory of the caller's.

    Not mapped: an error of the disk would end the process under a mapping, whose pages count as the process's memory
    besides. `close` gives the descriptor back, and the next `read` takes one again.

    Args:
        path: the file.
        other_owners: take it if it belongs to another user.

    Raises:
        CheckpointError: it is not such a file, or one of another owner.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, *, other_owners: bool = False) -> None:
        self._path, self._other_owners = path, other_owners
        file = self._file = open_file(path, other_owners=other_owners)
        try:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            header = dict[str, Any](json.loads(file.read(length))) if 8 + length <= size else {}
            self._start = 8 + length
            self._places: dict[str, tuple[torch.dtype, int, int]] = {
                name: (_TORCH_DTYPES[place["dtype"]], int(place["data_offsets"][0]), int(place["data_offsets"][1]))
                for name, place in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._file.close()
            raise CheckpointError(f"{path}: not a safetensors file ({error!r})") from None

    @property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return list(self._places)

    def close(self) -> None:
        """Give the descriptor back."""
        self._file.close()

    def read(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill `out` (numel,) with the elements of a tensor from number `first` on; their types must be the same.

        Raises:
            CheckpointError: the file has no such elements.
        """
        dtype, begin, end = self._places.get(name, (out.dtype, 0, 0))
        position = begin + first * dtype.itemsize
        if dtype != out.dtype or position + out.nbytes > end:
            raise CheckpointError(f"{self._path}: lacks elements of {name}, or has them in another type")
        if self._file.closed:
            self._file = open_file(self._path, other_owners=self._other_owners)
        host = out if out.device.type == "cpu" and out.is_contiguous() else torch.empty(out.shape, dtype=dtype)
        memory = _bytes_of(host) if host.numel() else memoryview(b"")
        while memory:
            read = os.preadv(self._file.fileno(), [memory[:_READ_BYTES]], self._start + position)
            if not read:
                raise CheckpointError(f"{self._path}: ends within {name}")
            memory, position = memory[read:], position + read
        if host is not out:
            out.copy_(host)


Piece = tuple[str, int, int]
"""Parameter, first element, number of elements."""


def tensor_key(parameter: str, start: int, kind: str) -> str:
    """Return the name of a piece's tensor in its file; `kind` is "weight" or an optimizer state."""
    return f"{parameter}@{start}:{kind}"


class Snapshot:
    """This rank's part of a checkpoint in host memory, byte for byte as its file will be.

    Its memory is taken once and filled again and again, at the speed of a copy; page-locked beside an accelerator.

    Args:
        fragments: what this rank saves, by whose names and sizes the file is laid out.

    Attributes:
        pieces: the pieces that it holds.
        optimizer_state: names of the optimizer's tensors, sorted.
        memory: (bytes,) what goes into the file.
    """

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        layout: dict[str, tuple[Shape, torch.dtype]] = {}
        self.pieces: list[Piece] = []
        states: set[str] = set()
        for fragment in fragments:
            self.pieces.append((fragment.parameter, fragment.start, fragment.weight.numel()))
            states.update(fragment.optimizer_state)
            layout |= {key: ((tensor.numel(),), tensor.dtype) for key, tensor in _tensors(fragment)}
        self.optimizer_state = sorted(states)
        header = _header(layout, None)
        numel = len(header) + sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        # Zeroed: memory that was never touched costs several times the copy at the first save.
        buffer = torch.empty(numel, dtype=torch.uint8, pin_memory=has_accelerator()).zero_()
        self.memory = buffer.numpy().data
        self.memory[: len(header)] = header
        self._places: dict[str, torch.Tensor] = {}
        start = len(header)
        for key, (shape, dtype) in layout.items():
            end = start + math.prod(shape) * dtype.itemsize
            self._places[key] = buffer[start:end].view(dtype)
            start = end

    def fits(self, fragments: Iterable[Fragment]) -> bool:
        """Say whether these fragments have the layout of the snapshot."""
        keys = [(key, tensor.numel(), tensor.dtype) for fragment in fragments for key, tensor in _tensors(fragment)]
        return keys == [(key, place.numel(), place.dtype) for key, place in self._places.items()]

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Fill it; returns when the fragments may change again."""
        device = None
        for fragment in fragments:
            device = fragment.weight.device
            for key, tensor in _tensors(fragment):
                self._places[key].copy_(tensor.detach(), non_blocking=True)
        if device is not None:
            synchronize(device)


def _tensors(fragment: Fragment) -> list[tuple[str, torch.Tensor]]:
    kinds = {WEIGHT: fragment.weight, **fragment.optimizer_state}
    return [(tensor_key(fragment.parameter, fragment.start, kind), tensor) for kind, tensor in kinds.items()]
