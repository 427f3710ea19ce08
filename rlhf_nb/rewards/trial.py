"""A reward function is tried on a few samples before a run starts: in a process of its own, so that neither a loop
without end nor what it imports stays in the notebook's. It is its author's code: nothing is sandboxed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from rlhf_nb.errors import RewardError, RlhfError
from rlhf_nb.protocol.spec import FunctionReward
from rlhf_nb.rewards.functions import from_reference

COMPLETIONS = ("I do not know.", "", "Yes. First look at the question, then at the rest.\n\n1. One\n2. Two\n\n42")
"""A policy may say nothing at all, and a reward that divides by a length then fails in the middle of a run."""
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rlhf_nb.rewards.trial import serve; serve()"


def tried(reference: FunctionReward, rows: Sequence[Mapping[str, Any]], *, timeout: float) -> list[float] | None:
    """Scores of `COMPLETIONS` for the rows' prompts, with the columns that all rows have.

    Returns:
        None where it could not be tried: it has not answered in time, or imports what only the compute has.

    Raises:
        RewardError: It fails, or does not give one finite number for each; with the line of its source.
    """
    n = len(COMPLETIONS)
    chosen = list(islice(cycle(rows), n))
    shared = sorted(set.intersection(*(set(row) for row in chosen)) - {"prompt"})
    question = {
        "reference": reference.model_dump(mode="json"),
        "prompts": [row["prompt"] for row in chosen],
        "columns": {name: [row[name] for row in chosen] for name in shared},
    }
    command = [sys.executable, "-c", START, json.dumps(sys.path)]
    try:
        done = subprocess.run(command, input=json.dumps(question).encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        # It ended its process; in a run it would end the worker.
        raise RewardError(f"reward {reference.name}: it ended its process with status {done.returncode}") from None
    if "error" in answer:
        raise RewardError(f"{answer['error']}; tried on {n} completions before the run, one of them empty")
    return answer["scores"]


def serve() -> None:
    """The child: one question on standard input, one answer on standard output, whatever the function prints."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    reference = FunctionReward.model_validate(question["reference"])
    answer: dict[str, Any]
    try:
        scores = from_reference(reference)(question["prompts"], list(COMPLETIONS), **question["columns"])
        answer = {"scores": scores}
    except RlhfError as error:
        elsewhere = isinstance(error.__cause__, ImportError)
        answer = {"scores": None} if elsewhere else {"error": str(error)}
    json.dump(answer, out)
    out.close()
