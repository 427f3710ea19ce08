"""The published implementation details of RLHF with PPO, one by one: where each is tested, or why it is not done.

BLOG   Huang, Liu, von Werra 2023, "The N Implementation Details of RLHF with PPO", which reproduces OpenAI's code of
       2019.
PAPER  Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO: A Case Study on TL;DR Summarization",
       arXiv:2403.17031.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_nb.training import online

CONFIG = {
    "max_steps": 1, "rollout_batch_size": 4, "batch_size": 4, "num_ppo_epochs": 1, "max_new_tokens": 6,
    "max_length": 80, "sample_every": 0, "learning_rate": 1e-3,
}  # fmt: skip
TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Detail:
    source: str
    what: str
    test: str = ""
    """`folder/file.py::test` in which it would be missed."""
    instead: str = ""
    """Why it is not done, or what is done in its place."""


DETAILS = (
    Detail("blog", "reward model and value head read prompt and completion together",
           "rewards/test_model.py::test_it_scores_the_last_token_of_the_conversation"),
    Detail("blog", "prompts are padded with a token that is masked; too long ones do not enter",
           "methods/test_ppo.py::test_prompts_that_leave_no_room_are_dropped_and_counted",
           instead="dropped and counted, where OpenAI's code truncated: a cut prompt is another question"),
    Detail("blog", "position indices start after the padding",
           "maths/test_logprobs.py::test_positions_start_at_zero_after_left_padding"),
    Detail("blog", "completions have a fixed length, the end token does not stop them",
           instead="a completion ends at its end token: nothing is drawn that is then thrown away, and the KL is of "
           "what the policy says"),
    Detail("blog", "the learning rate is annealed",
           "methods/test_ppo.py::test_the_learning_rate_falls_to_zero_on_a_linear_schedule",
           instead="a choice, lr_scheduler; constant by default, since a person moves the rate while the run goes on"),
    Detail("blog", "each process draws with a seed of its own",
           "methods/test_ppo_rollout.py::test_a_row_s_chance_does_not_depend_on_which_rows_are_drawn_with_it",
           instead="chance is keyed by the global row, so that one process and eight draw the same"),
    Detail("blog", "the reward stands on the last token only",
           "maths/test_advantages.py::"
           "test_score_stands_on_the_last_token_that_counts_and_a_row_sums_to_score_minus_beta_kl"),
    Detail("blog", "the reward model's head starts at N(0, 1/√(d+1))",
           instead="transformers' own start (σ=0.02): it is the published checkpoints' and the tests' parity with TRL"),
    Detail("blog", "scores are normalised before and after fitting the reward model",
           "methods/test_ppo_knobs.py::test_scores_are_normalised_by_all_that_were_seen",
           instead="score_normalisation=running in the run itself; a reward model stays as it was fitted"),
    Detail("blog", "logits are divided by the sampling temperature wherever they are read",
           "methods/test_ppo_rollout.py::test_the_trained_module_reads_the_logprobs_that_the_sampler_gave"),
    Detail("blog", "the value head starts at zero",
           "methods/test_ppo.py::test_the_first_value_loss_is_half_the_mean_squared_return"),
    Detail("blog", "prompts have one length",
           "methods/test_ppo_rollout.py::test_tokens_and_logprobs_are_those_of_each_row_decoded_alone",
           instead="padding on the left changes nothing, so any lengths share a batch"),
    Detail("blog", "a completion without its end is given a fixed low score",
           "methods/test_ppo.py::test_a_length_penalty_and_a_missing_end_are_taken_off_the_score",
           instead="missing_eos_penalty is taken off the score, so that cut completions still differ"),
    Detail("blog", "γ = 1", "fidelity/test_ppo_exact.py::test_ppo_reaches_the_gibbs_policy"),
    Detail("blog", "rollout, minibatch and micro-batch are three sizes",
           "methods/test_ppo.py::test_micro_batches_change_nothing_but_memory"),
    Detail("blog", "the KL is taken off the reward at each token",
           "methods/test_ppo.py::test_the_policy_starts_at_the_reference_and_its_reward_is_score_minus_beta_kl"),
    Detail("blog", "rewards are whitened without their mean, advantages with it",
           "maths/test_masked.py::test_whitening_without_the_shift_only_divides",
           instead="over the rollout, not the minibatch: a small minibatch's statistics are noise. Rewards are divided "
           "only: OpenAI's code adds the mean back after that, which pays for length"),
    Detail("blog", "the policy's ratio is clipped",
           "maths/test_policy_gradient.py::test_gradient_vanishes_exactly_where_a_token_is_counted_as_clipped"),
    Detail("blog", "values are clipped", "maths/test_policy_gradient.py::test_value_loss_worked_example"),
    Detail("blog", "a controller adapts the KL coefficient",
           "methods/test_ppo_knobs.py::"
           "test_the_controller_moves_kl_coef_by_its_formula_and_the_run_says_what_it_used"),
    Detail("both", "Adam's ε is 1e-5",
           "methods/test_ppo_details.py::test_adam_has_the_epsilon_that_keeps_its_first_steps_small",
           instead="torch's placement of ε; TensorFlow's differs in the first steps only"),
    Detail("paper", "the prompt ends where the completion begins, with nothing between",
           "maths/test_logprobs.py::test_completion_tokens_are_predicted_one_position_earlier"),
    Detail("paper", "pads are no end tokens, and the end token is learnt from",
           "methods/test_ppo_rollout.py::test_the_end_token_counts_where_it_is_also_the_pad_token"),
    Detail("paper", "the reward is read at the end token",
           "fidelity/test_ppo_exact.py::test_a_score_one_token_after_the_end_is_seen"),
    Detail("paper", "the reward model's scores are shifted to mean 0 on demonstrations",
           instead="a constant shift cancels in the advantage; score_normalisation=running does it where it matters"),
    Detail("paper", "dropout is off",
           "methods/test_ppo_instruments.py::test_a_sound_run_hears_nothing_from_the_doctor"),
    Detail("paper", "the value model starts as the reward model",
           instead="it starts as the policy: a reward may be a function, an ensemble or have another tokenizer, and "
           "can be replaced in flight"),
    Detail("paper", "whitening of rewards and of advantages can be switched",
           "fidelity/test_ppo_exact.py::test_it_leaves_the_optimum_where_it_is"),
    Detail("paper", "the end-token trick: completions without an end are penalised",
           "methods/test_ppo.py::test_a_length_penalty_and_a_missing_end_are_taken_off_the_score"),
)  # fmt: skip


def defined(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("detail", DETAILS, ids=lambda detail: detail.what[:40])
def test_a_detail_is_held_by_a_test_or_left_out_for_a_reason(detail):
    assert detail.test or detail.instead, detail.what
    if detail.test:
        file, name = detail.test.split("::")
        assert name in defined(file), f"{detail.what}: no {name} in {file}"


def test_adam_has_the_epsilon_that_keeps_its_first_steps_small(ppo, monkeypatch):
    seen = []
    update = online.OnlineTrainer.update

    def watched(self, *arguments, **named):
        seen.extend((group["eps"], group["weight_decay"]) for group in self.optimizer.param_groups)
        return update(self, *arguments, **named)

    monkeypatch.setattr(online.OnlineTrainer, "update", watched)
    ppo()
    assert set(seen) == {(1e-5, 0.0)}
