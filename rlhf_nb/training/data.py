"""Rows beside the accelerator: found, checked against their hash and kind, and given the shape a tokenizer needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.compute.rundir import RunDir
from rlhf_nb.data.conversions import convert
from rlhf_nb.data.rows import COLUMNS, Prompt, Row, decode_rows, fault
from rlhf_nb.errors import DataError
from rlhf_nb.protocol.spec import BlobData, NamedData, RunData

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context


@cache
def embedded_rows(name: str) -> tuple[str, list[Row]]:
    """Kind and rows of the toy world's data, written by its generator once in a process."""
    from rlhf_nb.toy import dataset

    return dataset(name)


def kind_of(reference: NamedData | BlobData | RunData) -> str:
    """The kind of rows that a reference stands for."""
    return embedded_rows(reference.name)[0] if isinstance(reference, NamedData) else reference.row_kind


def load_rows(
    reference: NamedData | BlobData | RunData, blobs: Path, kind: str, *, runs_root: Path | None = None
) -> list[Row]:
    """The rows a reference stands for.

    Args:
        kind: What the method trains on; rows with a prompt of any kind serve where `prompts` are wanted.
        runs_root: Folder of run directories, where the rows that a run made are found; by default that of `blobs`.

    Raises:
        DataError: The blob is missing or damaged, the kind is another, or a row, named by its number, cannot be used.
    """
    match reference:
        case NamedData(name=name):
            found, kept = embedded_rows(name)
            rows = [dict(row) for row in kept]
        case BlobData(content_hash=content_hash, row_kind=found):
            name = reference.name or content_hash[:8]
            path = blobs / f"{content_hash}.jsonl"
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                raise DataError(
                    f'data "{name}": its rows did not arrive at {path}; start the run again to send them'
                ) from None
            if hashlib.sha256(data).hexdigest() != content_hash:
                raise DataError(
                    f'data "{name}": {path.name} is damaged (its hash differs); delete it and start the run again'
                )
            rows = decode_rows(data)
        case RunData(run_id=name, row_kind=found):
            path = RunDir((runs_root or blobs.parent) / name).rows_path
            try:
                rows = decode_rows(path.read_bytes())
            except FileNotFoundError:
                raise DataError(f"run {name} has no rows at {path}; run it to its end first") from None
            if kind == "prompts":
                rows, _ = convert(rows, found, kind)
    if kind not in (found, "prompts"):
        raise DataError(f'data "{name}" holds {found}, and this method trains on {kind}')
    if not rows:
        raise DataError(f'data "{name}" holds 0 rows; import some, or label some, first')
    for index, row in enumerate(rows):
        if reason := fault(kind, row):
            raise DataError(f'data "{name}", row {index}: {reason}; leave it out and import again')
    return rows


def as_messages(prompt: Prompt, tokenizer: Any) -> Prompt:
    """A prompt as a chat model sees it: text is one user message. Without a chat template it stays text.

    Raises:
        DataError: Messages, and a tokenizer that has no chat template to write them with.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
    if not tokenizer.chat_template:
        raise DataError(
            f"prompts are chat messages and the tokenizer of {Path(tokenizer.name_or_path).name} has no chat template; "
            f"use plain text prompts or a chat model"
        )
    return prompt


def for_trl(rows: Iterable[Mapping[str, Any]], kind: str, tokenizer: Any) -> list[Row]:
    """Rows with only the columns of their kind, as messages or text throughout: TRL refuses a mixture."""
    result = []
    for row in rows:
        prompt = as_messages(row["prompt"], tokenizer)
        shaped: Row = {"prompt": prompt}
        for column in COLUMNS[kind][1:]:
            chat = isinstance(prompt, list) and isinstance(row[column], str)
            shaped[column] = [{"role": "assistant", "content": row[column]}] if chat else row[column]
        result.append(shaped)
    return result


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """The rows in an order that depends on their number and the seed alone."""
    import numpy as np

    return [rows[index] for index in np.random.default_rng([seed, len(rows)]).permutation(len(rows))]


def prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Tokens of a prompt up to where the completion begins."""
    shaped = as_messages(prompt, tokenizer)
    if isinstance(shaped, str):
        return list(tokenizer(shaped)["input_ids"])
    return list(
        tokenizer.apply_chat_template(shaped, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    )


def conversation_ids(prompt: Prompt, completion: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt and its completion together, ended as in training."""
    shaped = as_messages(prompt, tokenizer)
    if isinstance(shaped, str):
        text, end = shaped + completion, tokenizer.eos_token or ""
        return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])
    messages = [*shaped, {"role": "assistant", "content": completion}]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def say_what_fits(
    context: Context, dataset: Any, sides: tuple[tuple[str, ...], ...], max_length: int, *, already_cut: bool = False
) -> None:
    """Say how many rows were dropped or cut because of `max_length`.

    Args:
        dataset: The trainer's own, after tokenizing and dropping.
        sides: For each sequence of a row, the token columns that make it up.
        already_cut: The trainer has cut them, so that the longest are `max_length` long.

    Raises:
        DataError: No row is left.
    """
    import numpy as np
    import pyarrow.compute as pc

    rows, kept = len(context.rows), len(dataset)
    what = context.row_kind
    if not kept:
        raise DataError(
            f"{context.method.name}: none of the {rows} {what} fits in max_length={max_length} tokens; "
            f"raise max_length, or take a model with a longer context"
        )
    if kept < rows:
        context.emit.notice(
            "rows_dropped",
            f"{rows - kept} of {rows} {what} do not fit in max_length={max_length} tokens and were dropped",
            "warning",
        )
    table = dataset.with_format("arrow")[:]
    lengths = np.max(
        [sum(pc.list_value_length(table[column]).to_numpy() for column in columns) for columns in sides], axis=0
    )
    if cut := int((lengths >= max_length + (not already_cut)).sum()):
        context.emit.notice(
            "rows_cut", f"{cut} of {rows} {what} reach max_length={max_length} tokens; what is beyond is cut", "warning"
        )
    if kept < context.method.batch_size:
        context.emit.notice(
            "few_rows",
            f"{kept} of {what} for batch_size={context.method.batch_size}: every step sees the same rows",
            "warning",
        )
