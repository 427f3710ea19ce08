"""On the path of a kernel: ipykernel reads its control channel a second before it can make a subshell."""

from __future__ import annotations

import sys

if any("ipykernel_launcher" in argument for argument in sys.orig_argv):
    import time

    from ipykernel.kernelbase import Kernel

    start = Kernel.start

    def slow_start(self: Kernel) -> None:
        import asyncio

        self._control_lock = asyncio.Lock()
        self.control_stream.on_recv(self.dispatch_control, copy=False)
        time.sleep(1)
        start(self)

    Kernel.start = slow_start
