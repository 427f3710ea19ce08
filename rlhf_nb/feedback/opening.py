"""From a judge's reference to the judge, beside the accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_nb import registry
from rlhf_nb.feedback.endpoint import EndpointChat
from rlhf_nb.feedback.judge import REASONS_TOKENS, ChatJudge, Journaled, Judge
from rlhf_nb.feedback.local import LocalChat
from rlhf_nb.protocol.spec import Endpoint, JudgeRef, ModelJudge, describe

if TYPE_CHECKING:
    from rlhf_nb.feedback.templates import Style
    from rlhf_nb.training.context import Context


def open_judge(
    context: Context, reference: JudgeRef, *, ask: Style, tokens: int = REASONS_TOKENS, journal: bool = True
) -> Judge:
    """The judge a reference stands for.

    Args:
        tokens: Longest reasoning, critique or revision of a chat model.
        journal: Keep its answers in the run's directory, one file a rank; not those of a judge that says it is
            `instant`, which answers faster than a line is kept.

    Raises:
        RlhfError: It cannot be opened here: no such model, a token that is not set.
    """
    judge = _open(context, reference, ask, tokens)
    return journaled(context, judge) if journal and not getattr(judge, "instant", False) else judge


def journaled(context: Context, judge: Judge) -> Journaled:
    folder = Path(context.run_dir) / "data"
    folder.mkdir(exist_ok=True)
    return Journaled(judge, folder / f"said-{context.rank}.jsonl")


def _open(context: Context, reference: JudgeRef, ask: Style, tokens: int) -> Judge:
    if isinstance(reference, ModelJudge):
        device = "cpu" if context.use_cpu else "cuda"
        path = context.model_path(reference.model)
        return ChatJudge(
            LocalChat.load(path, name=describe(reference), device=device, seed=context.method.seed), ask, tokens=tokens
        )
    if isinstance(reference, Endpoint):
        return ChatJudge(EndpointChat(reference), ask, tokens=tokens)
    return registry.judges.get(reference.name).create(**reference.config)
