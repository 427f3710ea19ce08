"""Waiting for a run, in a real kernel: what a person sees of it, and of interrupting it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import jupyter_kernel


class Cell:
    """What a cell came to."""

    def __init__(self, kernel: Kernel, code: str, *, interrupt: bool = False) -> None:
        self.printed, self.value, self.error = "", "", []
        self._interrupts = [threading.Timer(0.5, kernel.interrupt)] if interrupt else []
        reply = kernel.client.execute_interactive(code, timeout=100, output_hook=self._hear)["content"]
        self.status, self.name = reply["status"], reply.get("ename")

    def _hear(self, message: dict[str, Any]) -> None:
        content = message["content"]
        match message["msg_type"]:
            case "stream":
                self.printed += content["text"]
                # The cell runs: what it prints comes just before it waits.
                while self._interrupts:
                    self._interrupts.pop().start()
            case "execute_result":
                self.value = content["data"]["text/plain"]
            case "error":
                self.error = content["traceback"]


class Kernel:
    def __init__(self, manager: Any, client: Any) -> None:
        self.manager, self.client = manager, client

    def __call__(self, code: str, **more: Any) -> Cell:
        return Cell(self, code, **more)

    def interrupt(self) -> None:
        """As Jupyter interrupts a kernel beside it: the whole process group hears it, what the kernel started too."""
        os.killpg(os.getpgid(self.manager.provisioner.pid), signal.SIGINT)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Iterator[Kernel]:
    with jupyter_kernel(cwd=str(tmp_path_factory.mktemp("await"))) as (manager, client):
        made = Kernel(manager, client)
        made("%load_ext rlhf_nb")
        yield made


def test_waiting_for_a_run_that_is_not_there_is_one_line(kernel):
    said = kernel("%rlhf wait ppo-9")
    assert said.error == ['NotFoundError: run "ppo-9" does not exist  %rlhf runs lists them']


def test_only_the_top_of_a_cell_awaits_and_only_while_the_extension_is_loaded(kernel):
    made = "get_ipython().transform_cell({!r})"
    assert "await" in kernel(made.format("%rlhf wait ppo-9")).value
    assert "await" not in kernel(made.format("def f():\n    %rlhf wait ppo-9")).value
    kernel("%unload_ext rlhf_nb")
    assert "await" not in kernel(made.format("%rlhf wait ppo-9")).value
    assert kernel("get_ipython().input_transformers_post").value == "[]"
    assert "not found" in kernel("%rlhf wait ppo-9").printed
    kernel("%load_ext rlhf_nb")
    assert "await" in kernel(made.format("%rlhf wait ppo-9")).value


@pytest.mark.slow
def test_an_interrupted_wait_detaches_and_the_run_goes_on_to_its_end(kernel):
    kernel("%rlhf attach local --no-standby")
    kernel(
        "run = %rlhf sft --base toy --data toy-demonstrations --set max_steps=60 batch_size=2 sample_every=0"
        " max_length=200"
    )
    detached = "detached from sft-1; it goes on. %rlhf stop sft-1 would end it"
    for wait in ("%rlhf wait sft-1", "await run", "run.wait()", "import asyncio; await asyncio.gather(run, run)"):
        said = kernel(f"print('waiting')\n{wait}", interrupt=True)
        assert said.error == [detached], wait
        assert kernel("run.state in ('finished', 'stopped', 'failed')").value == "False", wait
    late = kernel("%rlhf wait sft-1 --timeout 0.01").error
    assert len(late) == 1 and late[0].endswith("after 0.01 s; it goes on, wait again with run.wait()")
    assert kernel("await run").value == "'finished'"
    assert kernel("%rlhf wait sft-1").value == "Run sft-1 · toy → toy-demonstrations · finished 60/60"
    assert kernel("%rlhf wait").value == "Run sft-1 · toy → toy-demonstrations · finished 60/60"
