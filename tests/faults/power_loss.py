"""What a disk may hold after a power cut, of the operations that were recorded before it.

Nothing is promised but what POSIX says: the content of a file is safe once the file was synced after the write, and
its name once the directory was synced after the entry was made. What is not safe may be lost or not, each alone; of a
content that is not safe a part may be there, or zeros of the right length. A rename is atomic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from tests.faults.interpose import Operation

Tree = bytes | tuple[tuple[str, "Tree"], ...]
"""The content of a file, or the sorted entries of a directory."""

_ALL_SUBSETS_OF = 5


@dataclass(frozen=True)
class Record:
    """An operation that was done.

    Attributes:
        kind: which.
        path: of what, as it was named then.
        other: the new name of what was renamed.
        offset: where was written, or the length to which was truncated.
        data: what was written.
    """

    kind: Operation
    path: Path
    other: Path
    offset: int
    data: bytes


def read_records(log: Path) -> list[Record]:
    """Return the operations that `Action.RECORD` has written down, in order."""
    records = []
    with log.open("rb") as file:
        while line := file.readline():
            kind, size, offset, path, other = line.decode().rstrip("\n").split("\t")
            records.append(Record(Operation(int(kind)), Path(path), Path(other), int(offset), file.read(int(size))))
    return records


class Disk:
    """A directory as processes see it, and as it may be found after a power cut.

    Args:
        root: the directory, as records name it.
        before: what it held before the first operation; all of that is safe.
    """

    def __init__(self, root: Path, before: Tree) -> None:
        self._root, self._top = root, _thaw(before)

    def do(self, record: Record) -> None:
        """Carry out an operation below the directory."""
        if record.kind is Operation.SYNC:
            self._find(record.path).sync()
        elif record.kind in (Operation.WRITE, Operation.TRUNCATE):
            file = self._find(record.path)
            assert isinstance(file, _File)
            file.write(record.offset, record.data, cut=record.kind is Operation.TRUNCATE)
        else:
            parent = self._find(record.path.parent)
            assert isinstance(parent, _Directory)
            assert record.kind is not Operation.RENAME or record.other.parent == record.path.parent
            name = record.path.name
            if record.kind in (Operation.CREATE, Operation.MKDIR):
                parent.change(_Change(None, name, _File() if record.kind is Operation.CREATE else _Directory()))
            else:
                parent.change(_Change(name, record.other.name or None))

    def now(self) -> Tree:
        """Return what processes see."""
        return self._top.now()

    def after_power_cut(self) -> set[Tree]:
        """Return what may be found after a power cut now."""
        return set(self._top.found())

    def _find(self, path: Path) -> _File | _Directory:
        node = self._top
        for name in path.relative_to(self._root).parts:
            assert isinstance(node, _Directory)
            node = node.entries[name]
        return node


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self._content = self._safe = content

    def write(self, offset: int, data: bytes, *, cut: bool) -> None:
        before, after = self._content[:offset].ljust(offset, b"\0"), self._content[offset + len(data) :]
        self._content = before + data + (b"" if cut else after)

    def sync(self) -> None:
        self._safe = self._content

    def now(self) -> Tree:
        return self._content

    def found(self) -> Iterator[Tree]:
        length = len(self._content)
        yield self._safe
        if self._content != self._safe:
            yield from (self._content, self._content[: length // 2], self._safe[:length].ljust(length, b"\0"))


@dataclass(frozen=True)
class _Change:
    """An entry that is made, moved or removed."""

    old: str | None
    new: str | None
    node: _File | _Directory | None = None

    def __call__(self, entries: dict[str, _File | _Directory]) -> None:
        node = self.node if self.old is None else entries.pop(self.old, None)
        if node is not None and self.new is not None:  # what never got to the disk cannot be moved there
            entries[self.new] = node


class _Directory:
    def __init__(self, entries: dict[str, _File | _Directory] | None = None) -> None:
        self.entries, self._safe = dict(entries or {}), dict(entries or {})
        self._pending: list[_Change] = []

    def change(self, change: _Change) -> None:
        change(self.entries)
        self._pending.append(change)

    def sync(self) -> None:
        self._safe, self._pending = dict(self.entries), []

    def now(self) -> Tree:
        return tuple((name, self.entries[name].now()) for name in sorted(self.entries))

    def found(self) -> Iterator[Tree]:
        for survivors in _subsets(self._pending):
            entries = dict(self._safe)
            for change in survivors:
                change(entries)
            names = sorted(entries)
            for contents in product(*(set(entries[name].found()) for name in names)):
                yield tuple(zip(names, contents, strict=True))


def _subsets(changes: list[_Change]) -> Iterator[tuple[_Change, ...]]:
    """Yield all subsets, in order; of many changes only all up to one, and all but one."""
    if len(changes) <= _ALL_SUBSETS_OF:
        for size in range(len(changes) + 1):
            yield from combinations(changes, size)
        return
    for index in range(len(changes) + 1):
        yield tuple(changes[:index])
        yield tuple(changes[:index] + changes[index + 1 :])


def _thaw(tree: Tree) -> _File | _Directory:
    return _File(tree) if isinstance(tree, bytes) else _Directory({name: _thaw(node) for name, node in tree})


def tree_of(path: Path) -> Tree:
    """Return what a file or directory holds."""
    if path.is_file():
        return path.read_bytes()
    return tuple((each.name, tree_of(each)) for each in sorted(path.iterdir()))


def lay_out(tree: Tree, path: Path) -> None:
    """Write a tree to the file or new directory `path`."""
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, node in tree:
        lay_out(node, path / name)
