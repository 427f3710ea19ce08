"""Whole models from the trainer's GPU to a server's, without the disk: vLLM's own weight transfer over NCCL."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from rlhf_nb.errors import ComputeError, SpecError

if TYPE_CHECKING:
    from rlhf_nb.training.rollout.vllm_engine import Server

NEEDS = """VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "nccl"}'"""


class NCCLTransfer:
    """The trainer's end: rank 0 of a group of its own, in which the server's workers are the others."""

    def __init__(self, server: Server, device: torch.device) -> None:
        """
        Raises:
            SpecError: There is no CUDA here, or no vLLM that knows weight transfer.
        """
        if device.type != "cuda":
            raise SpecError(
                f"vllm_transfer=nccl: NCCL is between CUDA devices and the trainer's is {device.type}; use "
                f"vllm_transfer=disk"
            )
        try:
            from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise SpecError(
                f"vllm_transfer=nccl: no vllm beside the trainer that transfers weights ({error}); install "
                f'"rlhf-nb[vllm]" there, or use vllm_transfer=disk'
            ) from None
        self.server, self.device = server, device
        self._engine: Any = None
        self._source, self._info, self._open = ModuleSource, NCCLTrainerInitInfo, WeightTransferTrainerFactory

    def send(self, policy: Any) -> None:
        """
        Args:
            policy: A whole model, its weights under the names of a checkpoint.

        Raises:
            ComputeError: They did not arrive.
        """
        try:
            if self._engine is None:
                self._engine = self._opened(policy)
            # It sends on streams of its own, which wait for nothing: not for the step that writes what they read.
            torch.cuda.synchronize(self.device)
            self._engine.send_weights()
        except ComputeError:
            raise
        except Exception as error:
            said = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ComputeError(
                f"vllm_transfer=nccl: the weights did not reach {self.server.url} ({said[0]}); NCCL wants a server on "
                f"another GPU of this machine than the trainer's: check that, or use vllm_transfer=disk"
            ) from error

    def _opened(self, policy: Any) -> Any:
        self._refuse_a_server_without_it()
        workers = self.server.asked("GET", "/get_world_size", needs=NEEDS)["world_size"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        info = self._info("127.0.0.1", port, workers + 1, rank=0)
        return self._open.trainer_init(info, client=self, source=self._source(policy))

    def _refuse_a_server_without_it(self) -> None:
        """The routes are there whatever it was started with, and the trainer would wait for its workers for ever."""
        try:
            self.server.asked("POST", "/init_weight_transfer_engine", {"init_info": {}}, needs=NEEDS, may_fail=True)
        except ComputeError as error:
            if "not configured" in str(error):
                raise ComputeError(
                    f"vllm_url={self.server.url}: the server takes no weights over NCCL; start it with {NEEDS}, or use "
                    f"vllm_transfer=disk"
                ) from None
            if "init_info" not in str(error):
                raise

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            # A server that has ended before us holds its end no more.
            with suppress(ComputeError):
                self.server.post("/shutdown_weight_transfer_engine", {})

    # --- vLLM's protocol of a client: its routes, over the connection that there is ---

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.post("/init_weight_transfer_engine", {"init_info": init_info}, needs=NEEDS)

    def start_weight_update(self) -> None:
        self.server.post("/start_weight_update", {}, needs=NEEDS)

    def update_weights(self, update_info: Any) -> None:
        self.server.post("/update_weights", {"update_info": update_info}, needs=NEEDS)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.post("/finish_weight_update", {}, needs=NEEDS)
