"""DeepSpeed's small CPU collective, compiled once: at installation (`python -m pipeline.native_ops`) or visibly later.

DeepSpeed compiles it at the first `init_distributed` on a CPU, which takes a minute and looks like a hang.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Iterator

from pipeline.accelerator import select_device

_PATIENCE_SECONDS = 3.0


@contextlib.contextmanager
def announced_if_slow() -> Iterator[None]:
    """Say on standard error why nothing happens, if the block takes longer than a cached load does."""
    notice = "compiling DeepSpeed's CPU collective (once, about a minute; cached by torch in TORCH_EXTENSIONS_DIR)"
    timer = threading.Timer(_PATIENCE_SECONDS, print, (notice,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        # DeepSpeed reports on standard output, which belongs to our own commands.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        timer.cancel()


def build() -> None:
    """Compile the operation for this installation, or load it if it is there; nothing to do on a GPU."""
    device = select_device(local_rank=0)
    if device.type != "cpu":
        return
    from deepspeed.accelerator import get_accelerator

    with announced_if_slow():
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    build()
