"""Two ways to a vLLM: inside this process, and a server on this machine. Both take tokens and give tokens."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from rlhf_nb.errors import ComputeError, SpecError

if TYPE_CHECKING:
    from rlhf_nb.training.rollout.vllm_nccl import NCCLTransfer

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`."""
DEV_MODE = "VLLM_SERVER_DEV_MODE=1"
AT_ONCE = 64
"""Requests that are under way with a server."""
ANSWER_S = 600.0
IDLE_S = 1.0
"""Seconds for which a connection is kept for the next request. The server ends one after 5 s, and so would httpx: a
request on a connection that the other side is just ending is lost."""


@dataclass(frozen=True)
class Drawn:
    """One completion."""

    tokens: list[int]
    logprobs: list[float]
    """Nats, at the temperature that sampled."""


class Engine(Protocol):
    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, temperature: float, limit: int
    ) -> list[Drawn]:
        """One completion of each prompt, `limit` tokens at most, each drawn with its own seed."""
        ...

    def load_adapter(self, directory: Path) -> None:
        """Sample from now on with the LoRA adapter saved there."""
        ...

    def load_weights(self, directory: Path) -> None:
        """Sample from now on with the whole model saved there."""
        ...

    def take_weights(self, policy: Any) -> bool:
        """Sample from now on with these weights; False where there is no way but by a directory."""
        ...

    def close(self) -> None: ...


def sampling(temperature: float, limit: int, ends: Collection[int]) -> dict[str, Any]:
    """Every token may be drawn, none is favoured; ends are ours, whatever the model's generation config says."""
    return {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": limit,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": sorted(ends),
    }


class InProcess:
    """An engine beside the trainer, on the same accelerator."""

    def __init__(
        self,
        model: str,
        *,
        ends: Collection[int],
        dtype: str,
        max_length: int | None,
        memory: float,
        adapter_rank: int | None,
    ) -> None:
        """
        Args:
            model: Directory of the policy's start; of its base under LoRA.
            max_length: Tokens of prompt and completion together; None: what the model was built for.
            memory: Share of the accelerator's memory for its weights and cache.
            adapter_rank: Of the adapter that will be loaded; None for whole models.
        """
        # Set before the import, which reads them. Its engine stays in this process: weights go in by path.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # It would bind this whole process, the trainer with it, to cores of its own choice.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        try:
            from vllm import LLM
        except ImportError as error:
            raise SpecError(
                f'rollout_backend=vllm: vllm cannot be imported here ({error}); install "rlhf-nb[vllm]" beside the '
                f"accelerator, or use rollout_backend=transformers"
            ) from None
        self.ends = ends
        self.adapter: Any = None
        self._adapters = 0
        """Loaded so far."""
        lora = {} if adapter_rank is None else {"enable_lora": True, "max_lora_rank": rank_for(adapter_rank)}
        self.llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=max_length,
            gpu_memory_utilization=memory,
            # Raw log-probabilities would be those at temperature 1, whatever the temperature.
            logprobs_mode="processed_logprobs",
            seed=0,
            trust_remote_code=False,
            **lora,
        )

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, temperature: float, limit: int
    ) -> list[Drawn]:
        from vllm import SamplingParams

        fixed = sampling(temperature, limit, self.ends)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        settings = [SamplingParams(**fixed, seed=seed, detokenize=False) for seed in seeds]
        answers = self.llm.generate(asked, settings, lora_request=self.adapter, use_tqdm=False)
        drawn = []
        for answer in answers:
            said = answer.outputs[0]
            tokens = list(said.token_ids)
            logprobs = [at[token].logprob for at, token in zip(said.logprobs, tokens, strict=True)]
            drawn.append(Drawn(tokens, logprobs))
        return drawn

    def load_adapter(self, directory: Path) -> None:
        from vllm.lora.request import LoRARequest

        # Another number is another adapter. Versions come again where a run goes back to a checkpoint.
        self._adapters += 1
        self.adapter = LoRARequest(f"policy-{self._adapters}", self._adapters, str(directory))
        self.llm.reset_prefix_cache()

    def load_weights(self, directory: Path) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
        self.llm.reset_prefix_cache()

    def take_weights(self, policy: Any) -> bool:
        return False

    def close(self) -> None:
        del self.llm


class Server:
    """A vLLM server on this machine. It reads weights from the run's directory, so it shares our disk."""

    def __init__(self, url: str, *, ends: Collection[int], adapter: str | None, owner: bool = True) -> None:
        """
        Args:
            url: Of the server's root, on loopback: what changes its weights has no authentication.
            adapter: Name under which the policy's adapter is loaded; None for whole models.
            owner: It loads weights, and takes the adapter away in the end.
        """
        import httpx

        self.url, self.ends = loopback(url), ends
        # No proxy from the environment: the address is this machine's.
        limits = httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=IDLE_S)
        self.http = httpx.Client(base_url=self.url, timeout=ANSWER_S, limits=limits, trust_env=False)
        self.adapter, self.owner = adapter, owner
        self.model = adapter or str(self.asked("GET", "/v1/models")["data"][0]["id"])
        self._loaded = False
        self.transfer: NCCLTransfer | None = None
        """Takes whole models over, instead of the disk."""

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, temperature: float, limit: int
    ) -> list[Drawn]:
        fixed = {"model": self.model, "return_token_ids": True, **sampling(temperature, limit, self.ends)}

        # One prompt a request: the prompts of one request would share its seed.
        def ask(prompt: Sequence[int], seed: int) -> Drawn:
            answer = self.post("/v1/completions", {**fixed, "prompt": list(prompt), "seed": seed})["choices"][0]
            return Drawn(answer["token_ids"], answer["logprobs"]["token_logprobs"])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(ask, prompts, seeds))

    def load_adapter(self, directory: Path) -> None:
        assert self.adapter is not None, "the server was opened for whole models"
        asked = {"lora_name": self.adapter, "lora_path": str(directory), "load_inplace": True}
        self.post("/v1/load_lora_adapter", asked, needs="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora")
        self._loaded = True
        # The name is the same, and so would be the cached prefixes.
        self._reset()

    def load_weights(self, directory: Path) -> None:
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        self.post("/collective_rpc", asked, needs=DEV_MODE)
        self._reset()

    def take_weights(self, policy: Any) -> bool:
        if self.transfer is None:
            return False
        self.transfer.send(policy)
        self._reset()
        return True

    def _reset(self) -> None:
        self.post("/reset_prefix_cache", {}, needs=DEV_MODE)

    def close(self) -> None:
        if self.transfer is not None:
            self.transfer.close()
        if self._loaded and self.owner:
            # A server that has ended before us holds nothing any more.
            with suppress(ComputeError):
                self.post("/v1/unload_lora_adapter", {"lora_name": self.adapter})
        self.http.close()

    def post(self, path: str, body: dict[str, Any], *, needs: str | None = None) -> Any:
        """The answer's JSON, if it has any.

        Args:
            needs: What a server that does not know the path is to be started with.
        """
        return self.asked("POST", path, body, needs=needs)

    def asked(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        needs: str | None = None,
        may_fail: bool = False,
    ) -> Any:
        """As `post`.

        Args:
            may_fail: An error is an answer, and more will be asked. On the connection on which an error has surprised
                it the server says no more, and ends it a moment after the answer: the next request has another.
        """
        import httpx

        headers = {"Connection": "close"} if may_fail else {}
        try:
            answer = self.http.request(verb, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise ComputeError(
                f"vllm_url={self.url}: no answer to {path} ({type(error).__name__}: {error}); start the server, or use "
                f"rollout_backend=transformers"
            ) from None
        if answer.status_code == 404 and needs is not None:
            raise ComputeError(f"vllm_url={self.url}: the server does not offer {path}; start it with {needs}")
        if answer.status_code != 200:
            raise ComputeError(f"vllm_url={self.url}: {path} was refused ({answer.status_code}): {reason(answer.text)}")
        return json.loads(answer.text) if answer.text.lstrip().startswith(("{", "[")) else None


def reason(text: str) -> str:
    """The one line in an error's body."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        said = json.loads(text)
        text = str(said["error"]["message"] if "error" in said else said.get("message", text))
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason given"


def loopback(url: str) -> str:
    """The URL, if it leads to this machine.

    Raises:
        SpecError: It is no http URL, or another machine's.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(f"vllm_url={url!r} is no http URL; give that of a server here, such as http://127.0.0.1:8000")
    try:
        here = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        here = False
    if not here:
        raise SpecError(
            f"vllm_url={url!r} is not this machine: what changes the server's weights has no authentication, so it "
            f"must listen on 127.0.0.1, beside the trainer"
        )
    return f"{parts.scheme}://{parts.netloc}"


def rank_for(rank: int) -> int:
    """The smallest `max_lora_rank` that holds an adapter."""
    fitting = [one for one in ADAPTER_RANKS if one >= rank]
    if not fitting:
        raise SpecError(f"adapter rank={rank}: vLLM takes ranks up to {ADAPTER_RANKS[-1]}; use a smaller one")
    return fitting[0]
