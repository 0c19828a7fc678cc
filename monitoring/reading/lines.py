"""Lines of a file that grows, read in chunks: memory stays small whatever the length of the file or of a line."""

from __future__ import annotations

from pathlib import Path

MOST_LINE = 1 << 20
"""Bytes of the longest line that is read; a longer one is skipped. A step record is about a thousandth of it."""

_CHUNK = 1 << 20


class LineReader:
    """Follows one file; a last line without its newline is not complete and is left for a later call.

    Attributes:
        path: the file; it may not exist yet.
        offset: bytes behind us.
        too_long: number of lines over `MOST_LINE`, which were skipped.
        problem: why the file could not be read the last time, None if it could or is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.too_long = 0
        self.problem: str | None = None
        self._skipping = False

    def read(self, budget: int) -> list[bytes]:
        """Return the next complete lines, without newlines, from about `budget` bytes.

        None at the end of the file, or of a piece of a very long line: `offset` tells.
        """
        lines: list[bytes] = []
        rest = b""
        self.problem = None
        try:
            with self.path.open("rb", buffering=0) as file:
                start = file.seek(self.offset)
                while (budget > 0 or self.offset == start) and (chunk := file.read(_CHUNK)):
                    budget -= len(chunk)
                    rest = self._take(rest + chunk, lines)
        except FileNotFoundError:
            pass
        except OSError as error:  # what was read before counts
            self.problem = error.strerror or str(error)
        return lines

    def _take(self, content: bytes, lines: list[bytes]) -> bytes:
        """Move complete lines over and return the piece behind them."""
        if self._skipping:
            end = content.find(b"\n") + 1
            self.offset += end or len(content)
            if not end:
                return b""
            self._skipping, content = False, content[end:]
        end = content.rfind(b"\n") + 1
        whole, rest = content[:end].split(b"\n")[:-1], content[end:]
        self.offset += end
        short = [line for line in whole if len(line) <= MOST_LINE]
        self.too_long += len(whole) - len(short)
        lines += short
        if len(rest) > MOST_LINE:
            self._skipping, rest = True, b""
            self.too_long += 1
            self.offset += len(content) - end
        return rest
