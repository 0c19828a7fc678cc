"""DeepSpeed's small CPU collective, compiled once: at installation (`python -m pipeline.native_ops`) or visibly later.

DeepSpeed compiles it at the first `init_distributed` on a CPU, which takes a minute and looks like a hang.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pipeline.accelerator import select_device

_PATIENCE_SECONDS = 3.0


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Run a block in which DeepSpeed loads the operation; say on standard error if it has to be compiled."""
    # DeepSpeed looks for ninja on PATH even when there is nothing to compile; pip put it beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
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

    with loading():
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    build()
