"""The one small interface behind which every chat model stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rlhf_nb.feedback.templates import Messages

Failure = Literal["", "unreadable", "refusal", "timeout", "error", "too_long"]
"""Why there is no answer: it cannot be read, the model declined, no answer came in time, the server failed at this
question again and again, or the question does not fit in the model's context."""


@dataclass(frozen=True)
class Question:
    messages: Messages
    letters: tuple[str, ...] = ()
    """Answers of one token whose log-probabilities are wanted, where the backend can give them."""
    max_tokens: int = 512
    temperature: float = 0.0
    """0 takes the likeliest token at every step."""
    draw: int = 0
    """Number of this question among those that draw lots; the same number draws the same lots again."""


@dataclass(frozen=True)
class Reply:
    text: str = ""
    logprobs: dict[str, float] | None = None
    """Nats, of those letters that the backend gave, as the first token of the answer."""
    failure: Failure = ""
    detail: str = ""
    """What the failure was, in a few words."""


class Chat(Protocol):
    name: str
    """Which model: what an AI label is traced to."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Each question's number and its reply, as they come.

        Raises:
            RlhfError: No question can be answered: an address that does not answer, a token that is refused.
        """
        ...

    def close(self) -> None: ...
