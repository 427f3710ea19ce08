"""Chat models behind an OpenAI-compatible address: `POST URL/chat/completions`. vLLM's server is one.

Questions go out side by side. An answer that does not come, a 429 and a 5xx are asked for again, later each time; an
address that does not answer at all and a token that is refused end the job with one line, since no question would fare
better. The token is read from an environment variable here and stands in no spec, log or URL.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf_nb.errors import ComputeError, SpecError
from rlhf_nb.feedback.chat import Question, Reply
from rlhf_nb.protocol.spec import VARIABLE, Endpoint
from rlhf_nb.training.rollout.vllm_engine import IDLE_S, reason

if TYPE_CHECKING:
    import httpx

BACKOFF_S = 0.5
"""Before the first retry; doubled before each that follows."""
BACKOFF_LIMIT_S = 30.0
BODY_LIMIT = 4 << 20
"""Bytes of an answer that are read: no verdict is that long."""
TOP_LOGPROBS = 20
LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}


def checked(endpoint: Endpoint) -> Endpoint:
    """The endpoint, if its address can be asked without giving anything away.

    Raises:
        SpecError: No http URL, a secret in it, no name of a variable, or a token that would travel in the clear.
    """
    try:
        parts = urlsplit(endpoint.url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise SpecError(f"judge url: no URL ({error}); give one such as https://api.example.com/v1") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        # The URL itself is not repeated: it holds the secret.
        raise SpecError(
            f"judge url of {host}: a URL is written down, so it holds no user, password or query; name the environment "
            f"variable that has the token: token_env=VARIABLE"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise SpecError(f"judge url={endpoint.url!r} is no http URL; give one such as https://api.example.com/v1")
    # A token without dashes is an identifier too; what is accepted here is written down and shown.
    if endpoint.token_env and not VARIABLE.fullmatch(endpoint.token_env):
        raise SpecError(
            "judge token_env: it is the NAME of an environment variable, in capitals such as JUDGE_TOKEN, not the "
            "token; export the token under such a name first"
        )
    if endpoint.token_env and parts.scheme == "http" and not _here(host):
        raise SpecError(f"judge url={endpoint.url!r}: over http the token could be read on the way; use https")
    return endpoint


def _here(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class EndpointChat:
    def __init__(self, endpoint: Endpoint, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """
        Raises:
            SpecError: The address cannot be used, or the token's variable is not set on this machine.
        """
        import httpx

        self.endpoint = checked(endpoint)
        self.name = f"{endpoint.model} at {urlsplit(endpoint.url).netloc}"
        headers = {}
        self._token = ""
        if endpoint.token_env:
            self._token = token = os.environ.get(endpoint.token_env, "").strip()
            if not token:
                raise SpecError(
                    f"judge token_env={endpoint.token_env}: not set where the job runs; export it before attaching"
                )
            if not token.isascii() or not token.isprintable():
                raise SpecError(f"judge token_env={endpoint.token_env}: its value holds characters that no header can")
            headers["Authorization"] = f"Bearer {token}"
        self._sleep = sleep
        self._url = endpoint.url.rstrip("/") + "/chat/completions"
        self._without: set[str] = set()
        self._http = httpx.Client(
            headers=headers,
            timeout=endpoint.timeout_s,
            limits=httpx.Limits(max_connections=endpoint.at_once, keepalive_expiry=IDLE_S),
            # No proxy stands between this machine and itself.
            trust_env=not _here(urlsplit(endpoint.url).hostname or ""),
        )

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        pool, over = ThreadPoolExecutor(self.endpoint.at_once), threading.Event()
        try:
            under_way = {pool.submit(self._ask, question, over): index for index, question in enumerate(questions)}
            for done in as_completed(under_way):
                yield under_way[done], done.result()
        finally:
            # Where nobody waits any more, what is under way must not be tried again: it would hold the process's end.
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self._http.close()

    def _ask(self, question: Question, over: threading.Event) -> Reply:
        failed = Reply(failure="error", detail="not asked")
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                self._sleep(_pause(attempt, failed.detail))
            if over.is_set():
                return failed
            found = self._once(question)
            if found.failure not in ("timeout", "error"):
                return found
            failed = found
        if failed.detail.startswith(_UNREACHED):
            raise ComputeError(
                f"judge url={self.endpoint.url}: {failed.detail}; see that it is served there, then resume"
            )
        return failed

    def _once(self, question: Question) -> Reply:
        import httpx

        deadline = time.monotonic() + self.endpoint.timeout_s
        without = frozenset(self._without)
        try:
            with self._http.stream("POST", self._url, json=self._body(question, without)) as answer:
                body = _read(answer, deadline)
                status, wait = answer.status_code, answer.headers.get("retry-after", "")
        except (httpx.TimeoutException, _LateError):
            return Reply(failure="timeout", detail=f"no answer within {self.endpoint.timeout_s:g} s")
        except httpx.ConnectError as error:
            return Reply(failure="error", detail=f"{_UNREACHED} ({_first_line(error)})")
        except httpx.HTTPError as error:
            return Reply(failure="error", detail=f"{type(error).__name__}: {_first_line(error)}")
        if status == 200:
            return _reply(body, question)
        if status in LATER:
            return Reply(failure="error", detail=f"{status} retry-after={wait}" if wait else f"answered {status}")
        said = self._reason(body)
        if status in (400, 422) and (unknown := _unknown(said, without)):
            self._without.add(unknown)
            return self._once(question)
        if status in (400, 403, 451) and b"content_filter" in body:
            return Reply(failure="refusal", detail=said[:80])
        if status in (400, 413, 422) and (status == 413 or "context" in said.lower() or "too long" in said.lower()):
            return Reply(failure="too_long", detail=said[:80])
        way_out = (
            f"; token_env={self.endpoint.token_env or 'VARIABLE'} names the token's variable"
            if status in (401, 403)
            else ""
        )
        if status == 404:
            way_out = "; url= ends before /chat/completions, often in /v1, and model= is a name that is served there"
        raise ComputeError(
            f"judge url={self.endpoint.url} model={self.endpoint.model}: refused ({status}): {said}{way_out}"
        )

    def _body(self, question: Question, without: frozenset[str]) -> dict[str, Any]:
        limit = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
        body: dict[str, Any] = {"model": self.endpoint.model, "messages": question.messages, limit: question.max_tokens}
        if "temperature" not in without:
            body["temperature"] = question.temperature
        if question.temperature and "seed" not in without:
            body["seed"] = question.draw
        if question.letters and "logprobs" not in without:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return body

    def _reason(self, body: bytes) -> str:
        """The one line in an error's body, without the token, which some servers repeat."""
        text = body.decode(errors="replace")
        try:
            said = reason(text)
        except RecursionError:
            said = text[:80]
        return said.replace(self._token, "…") if self._token else said


def _unknown(said: str, without: frozenset[str]) -> str | None:
    """A parameter that the server complains of and that can be left out; servers differ in which they know."""
    names = ("logprobs", "max_tokens", "temperature", "seed")
    return next((name for name in names if name in said.lower() and name not in without), None)


class _LateError(Exception):
    """The answer's bytes come too slowly."""


_UNREACHED = "nothing answers there"


def _read(answer: httpx.Response, deadline: float) -> bytes:
    """The body, as far as it is read. A server that sends a byte now and then must not hold a question for ever."""
    parts, size = [], 0
    for part in answer.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > BODY_LIMIT:
            break
        if time.monotonic() > deadline:
            raise _LateError
    return b"".join(parts)


def _reply(body: bytes, question: Question) -> Reply:
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Reply(failure="error", detail="the answer is no chat completion")
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return Reply(failure="refusal", detail=str(message.get("refusal") or "content filter")[:80])
    # Half a surrogate pair is legal in JSON and nowhere else.
    return Reply(text=text.encode("utf-8", "replace").decode(), logprobs=_letters(choice, question.letters))


def _letters(choice: dict[str, Any], letters: tuple[str, ...]) -> dict[str, float] | None:
    """The letters' log-probabilities at the first token; spellings with a space in front are the same letter."""
    found: dict[str, float] = {}
    if not letters:
        return None
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        for each in choice["logprobs"]["content"][0]["top_logprobs"]:
            letter, logprob = str(each["token"]).strip(), float(each["logprob"])
            if letter in letters and logprob <= 0:
                before = found.get(letter, -math.inf)
                found[letter] = max(before, logprob) + math.log1p(math.exp(-abs(before - logprob)))
        return found
    return None


def _pause(attempt: int, detail: str) -> float:
    with suppress(ValueError):
        asked = float(detail.partition("retry-after=")[2])
        return min(max(asked, 0.0), BACKOFF_LIMIT_S)
    # Jitter: what failed together must not come back together.
    return min(BACKOFF_S * 2 ** (attempt - 1), BACKOFF_LIMIT_S) * random.uniform(0.5, 1.0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
