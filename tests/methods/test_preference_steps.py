"""A step of plain gradient descent, as each method ships, is minus the rate times the gradient of our own maths.

The rows are one batch, so that every step sees all of them. The second step is the one that is compared: the policy has
left the reference, and every term of the losses pulls.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.maths.preference import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from rlhf_nb.toy import pairs, thumbs
from rlhf_nb.training import checkpoints
from rlhf_nb.training.data import conversation_ids, prompt_ids

RATE, BETA = 0.05, 0.4
CONFIG = {
    "max_steps": 2, "batch_size": 4, "sample_every": 0, "checkpoint_every": 1, "learning_rate": RATE, "beta": BETA,
    "optimizer": "sgd", "max_grad_norm": 0, "lr_scheduler": "constant", "max_length": 400,
}  # fmt: skip


@pytest.fixture
def job(job, tiny_model_maker):
    job.model = tiny_model_maker("still", dropout=0.0)
    return job


@dataclass
class Said:
    """Log-probabilities (B,) of completions, summed; their lengths; those of prompt and completion together."""

    logprobs: Tensor
    lengths: Tensor
    whole: Tensor
    whole_lengths: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logprobs / self.lengths


def read(model, tokenizer, rows: list[dict], side: str) -> Said:
    columns: list[list[Tensor]] = [[], [], [], []]
    for row in rows:
        start = len(prompt_ids(row["prompt"], tokenizer))
        ids = torch.tensor([conversation_ids(row["prompt"], row[side], tokenizer)])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        answer = logprobs[start - 1 :]
        numbers = (answer.sum(), torch.tensor(len(answer)), logprobs.sum(), torch.tensor(len(logprobs)))
        for column, number in zip(columns, numbers, strict=True):
            column.append(number)
    return Said(*map(torch.stack, columns))


def of_pairs(policy, reference, tokenizer, rows, seen, loss: str) -> Tensor:
    chosen, rejected = (read(policy, tokenizer, rows, side) for side in ("chosen", "rejected"))
    if loss == "simpo":
        means = (chosen.mean, rejected.mean)
        likelihood = -chosen.logprobs.sum() / chosen.lengths.sum()
        return simpo_loss(*means, beta=BETA, gamma=0.3, label_smoothing=0.1).mean() + 0.2 * likelihood
    if loss == "orpo":
        # As TRL has it, the likelihood is of the prompt too.
        likelihood = -chosen.whole.sum() / chosen.whole_lengths.sum()
        return likelihood + orpo_loss(chosen.mean, rejected.mean, beta=BETA).mean()
    with torch.no_grad():
        before = [read(reference, tokenizer, rows, side) for side in ("chosen", "rejected")]
    if loss == "ipo":
        return ipo_loss(chosen.mean, rejected.mean, before[0].mean, before[1].mean, beta=BETA).mean()
    function = {"dpo": dpo_loss, "ipo_sum": ipo_loss}[loss]
    sides = (chosen.logprobs, rejected.logprobs, before[0].logprobs, before[1].logprobs)
    return function(*sides, beta=BETA).mean()


def of_thumbs(policy, reference, tokenizer, rows, seen, loss: str) -> Tensor:
    with torch.no_grad():
        before = read(reference, tokenizer, rows, "completion").logprobs
    ratios_B = read(policy, tokenizer, rows, "completion").logprobs - before
    labels_B = torch.tensor([row["label"] for row in rows])
    # Which completions TRL mismatches for the reference point is its own; no gradient flows through it.
    point = torch.tensor(seen["kl/reference_point"])
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    return kto_loss(ratios_B, labels_B, point, beta=BETA, **weights).mean()


CASES = {
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "ipo_sum": ("dpo", {"loss_type": "ipo_sum", "learning_rate": 0.1 * RATE}),
    "kto": ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
    "orpo": ("orpo", {}),
    "simpo": ("simpo", {"gamma": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.2}),
}


@pytest.mark.parametrize("loss", CASES)
def test_a_step_is_the_gradient_of_our_own_maths(job, loss):
    method, knobs = CASES[loss]
    rows = thumbs(4) if method == "kto" else pairs(4)
    assert method != "kto" or len({row["label"] for row in rows}) == 2
    config = {**CONFIG, **knobs}
    place = job(method, rows, config=config)
    tokenizer, reference = AutoTokenizer.from_pretrained(job.model), AutoModelForCausalLM.from_pretrained(job.model)
    policy = AutoModelForCausalLM.from_pretrained(checkpoints.directory(place.path, 1))
    (seen,) = (e.values for e in place.events() if e.kind == "metric" and e.step == 2)
    ours = (of_thumbs if method == "kto" else of_pairs)(policy, reference, tokenizer, rows, seen, loss)
    assert seen["loss"] == pytest.approx(ours.item(), rel=1e-4)
    ours.backward()
    after = load_file(checkpoints.directory(place.path, 2) / "model.safetensors")
    rate, largest = config["learning_rate"], 0.0
    for name, weight in policy.named_parameters():
        moved = rate * weight.grad
        # float32 weights of order 1 hold their differences to 1e-7; the gradients themselves agree to 1e-4.
        torch.testing.assert_close(weight.detach() - after[name], moved, rtol=1e-3, atol=1e-6)
        largest = max(largest, moved.abs().max().item())
    assert largest > 1e-4
