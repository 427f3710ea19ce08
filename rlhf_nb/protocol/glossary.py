"""What every logged number means: unit, formula, estimator, and which way is good. One line a metric; imports nothing heavy.

Notation: π the policy, π_ref the reference, x a prompt, y a completion, y_w and y_l the chosen and the rejected one,
T the number of completion tokens. `step` is always an optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down", "watch"]
"""`up` and `down`: which way is better. `watch`: neither by itself; a jump or a drift is what to look for."""


@dataclass(frozen=True)
class Entry:
    name: str
    label: str
    """A few words for an axis or a legend."""
    unit: str
    formula: str
    estimator: str
    direction: Direction


_ENTRIES = (
    # Every method
    Entry("loss", "loss", "nats", "what the optimizer minimises", "mean over the step's batch, all ranks", "down"),
    Entry("optimizer/learning_rate", "learning rate", "1/step", "peak × schedule", "exact, as this step used it", "watch"),
    Entry("optimizer/grad_norm", "gradient norm", "", "‖∇loss‖₂ before clipping", "exact, over trained parameters", "watch"),
    Entry("data/epoch", "epoch", "passes", "rows seen / rows there are", "exact", "watch"),
    Entry("data/tokens", "tokens", "tokens/step", "prompt and completion tokens of the step", "exact, padding left out", "watch"),
    Entry("time/step_s", "step time", "s", "wall time of the step", "exact; pauses, samples and checkpoints left out", "down"),
    Entry("time/hooks_s", "hook time", "s", "CPU time of events and control", "exact, since the metric before", "down"),
    # Policies
    Entry("policy/entropy", "entropy", "nats/token", "−Σ_v π(v) log π(v)", "mean over completion tokens", "watch"),
    Entry("policy/token_accuracy", "token accuracy", "", "share of tokens that are π's most likely", "mean over completion tokens", "up"),
    Entry("kl/policy_reference", "KL to reference", "nats", "E_y∼π [log π(y|x) − log π_ref(y|x)]", "k1, summed over a completion's tokens, mean over samples", "watch"),
    Entry("completion/length_mean", "completion length", "tokens", "T", "mean over samples", "watch"),
    Entry("completion/length_max", "longest completion", "tokens", "max T", "exact over samples", "watch"),
    Entry("completion/ended_share", "ended by itself", "", "share that ends with the end token", "mean over samples", "watch"),
    Entry("completion/truncated_fraction", "cut at the limit", "", "share that reached max_new_tokens", "mean over samples", "down"),
    Entry("reward/score", "score", "score", "r(x, y)", "mean over samples, before any penalty", "up"),
    Entry("reward/std", "score spread", "score", "sd of r(x, y)", "sample standard deviation", "watch"),
    Entry("reward/mean", "reward", "score", "r(x, y) − penalties − β·(log π(y|x) − log π_ref(y|x))", "mean over samples: what is optimised", "up"),
    Entry("reward/disagreement", "disagreement", "score", "sd over the rewards of r_m(x, y)", "population sd, mean over samples", "watch"),
    Entry("reward/gold", "true reward", "score", "gold r*(x, y), never optimised", "mean over samples", "up"),
    # Online methods
    Entry("objective/kl_coef", "kl_coef", "score/nat", "β, price of a nat", "exact, as this rollout used it", "watch"),
    Entry("objective/beta", "beta", "score/nat", "β, price of a nat", "exact, as this rollout used it", "watch"),
    Entry("group/std", "spread within groups", "score", "sd of r(x, y) among completions of one prompt", "sample sd, mean over groups", "watch"),
    Entry("group/flat_fraction", "groups that teach nothing", "", "share of groups whose scores are all equal", "exact over all that was sampled", "down"),
    Entry("group/replaced", "groups sampled again", "groups", "flat groups that gave way to those of other prompts", "exact, a rollout", "watch"),
    Entry("group/flat_left", "flat groups left", "groups", "flat groups when the budget was spent", "exact, a rollout", "down"),
    Entry("objective/temperature", "temperature", "", "τ, logits are divided by it", "exact, as this rollout used it", "watch"),
    Entry("loss/kl", "KL in the loss", "nats/token", "ratio·k3 or k2 against the reference", "mean over the step's tokens, all ranks", "watch"),
    Entry("loss/policy", "policy loss", "", "max(−ρA, −clip(ρ, 1±ε)·A), ρ = π/π_behavior", "mean over the step's tokens, all ranks", "watch"),
    Entry("loss/pretraining", "pretraining loss", "nats/token", "−log π of pretraining rows", "mean over the step's pretraining tokens", "down"),
    Entry("loss/value", "value loss", "score²", "½·max((V − R)², (clip(V) − R)²)", "mean over the step's tokens, all ranks", "down"),
    Entry("policy/clip_fraction", "clipped tokens", "", "share of tokens whose policy gradient the clip took", "mean over the step's tokens", "watch"),
    Entry("value/clip_fraction", "clipped values", "", "share of tokens whose value gradient the clip took", "mean over the step's tokens", "watch"),
    Entry("policy/approx_kl", "KL of the update", "nats/token", "KL(π_behavior ‖ π)", "k3, mean over the step's tokens, before the step", "watch"),
    Entry("policy/update_kl", "KL of a rollout's update", "nats", "KL(π_behavior ‖ π)", "k3, summed over a completion's tokens, mean over 4 completions, after the rollout's steps", "watch"),
    Entry("optimizer/gradient_snr", "gradient signal to noise", "", "‖E g‖² / tr Cov g of a minibatch", "pairs of minibatches of one pass, 65,536 coordinates", "watch"),
    Entry("convergence/gap", "still to be gained", "score", "Var(r − β·log(π/π_ref)) / 2β", "variance within a prompt, mean over prompts; zero exactly at the optimum", "down"),
    Entry("policy/importance_weight", "importance weight", "", "min(π_trainer/π_sampler, importance_cap)", "mean over the step's tokens", "watch"),
    Entry("time/sync_s", "weights to the sampler", "s", "wall time of handing the policy's weights over", "exact, a rollout", "down"),
    Entry("rollout/logprob_mismatch", "sampler and trainer apart", "nats/token", "|log π_trainer − log π_sampler|", "mean over the tokens of a rollout's first minibatch", "down"),
    Entry("value/explained_variance", "explained variance", "", "1 − Var(R − V) / Var(R)", "over the rollout's tokens", "up"),
    Entry("time/rollout_s", "sampling time", "s", "wall time of sampling a rollout", "exact, rank 0", "down"),
    Entry("time/score_s", "scoring time", "s", "wall time of the rewards of a rollout", "exact, rank 0", "down"),
    Entry("time/reference_s", "reference time", "s", "wall time of reference and value passes", "exact, rank 0", "down"),
    Entry("time/update_s", "update time", "s", "wall time of a rollout's optimizer steps", "exact; pauses left out", "down"),
    # Reward models, on pairs or rankings
    Entry("score/mean", "score", "score", "r(x, y)", "mean over the completions of the batch", "watch"),
    Entry("score/std", "spread of scores", "score", "sd of r(x, y)", "population sd over the completions of the batch", "watch"),
    Entry("score/min", "lowest score", "score", "min r(x, y)", "exact over the batch", "watch"),
    Entry("score/max", "highest score", "score", "max r(x, y)", "exact over the batch", "watch"),
    Entry("pairs/accuracy", "pair accuracy", "", "P[r(y_w) > r(y_l)]", "mean over the strict comparisons of the batch it then trains on", "up"),
    Entry("pairs/margin", "score margin", "score", "r(y_w) − r(y_l)", "mean over the strict comparisons of the batch", "up"),
    Entry("length/correlation", "score and length", "", "ρ(r, ℓ), both less their prompt's mean", "Pearson, over the completions of a micro-batch", "watch"),
    Entry("length/term", "length explains", "nats/sd", "γ in logit = r(y_w) − r(y_l) + γ·(ℓ_w − ℓ_l)", "stochastic Newton over the last 20 steps", "watch"),
    Entry("pairs/tied", "tied pairs", "", "P[r(y₁) = r(y₂)]", "mean over the step's pairs; the first of a tied two counts as chosen", "down"),
    # Direct preference methods
    Entry("implicit_reward/chosen", "implicit reward, chosen", "nats×β", "β (log π(y_w|x) − log π_ref(y_w|x))", "mean over the batch; rescales with β", "watch"),
    Entry("implicit_reward/rejected", "implicit reward, rejected", "nats×β", "β (log π(y_l|x) − log π_ref(y_l|x))", "mean over the batch; rescales with β", "watch"),
    Entry("implicit_reward/margin", "implicit reward margin", "nats×β", "chosen − rejected", "mean over the batch; rescales with β", "up"),
    Entry("implicit_reward/accuracy", "implicit accuracy", "", "P[implicit reward of y_w > of y_l]", "mean over the batch it then trains on", "up"),
    Entry("log_ratio/chosen", "log-ratio, chosen", "nats", "log π(y_w|x) − log π_ref(y_w|x)", "mean over the batch; the same under any β", "watch"),
    Entry("log_ratio/rejected", "log-ratio, rejected", "nats", "log π(y_l|x) − log π_ref(y_l|x)", "mean over the batch; the same under any β", "watch"),
    Entry("log_ratio/margin", "log-ratio margin", "nats", "chosen − rejected", "mean over the batch; the same under any β", "up"),
    Entry("logprob/chosen", "log-probability, chosen", "nats", "log π(y_w|x)", "summed over tokens, mean over the batch", "watch"),
    Entry("logprob/rejected", "log-probability, rejected", "nats", "log π(y_l|x)", "summed over tokens, mean over the batch", "watch"),
    Entry("kl/reference_point", "reference point", "nats", "z₀ = max(0, E[log π(y′|x) − log π_ref(y′|x)])", "mean over rows with a neighbour's completion", "watch"),
    Entry("logprob_mean/chosen", "log-probability a token, chosen", "nats/token", "log π(y_w|x) / |y_w|", "mean over the batch", "watch"),
    Entry("logprob_mean/rejected", "log-probability a token, rejected", "nats/token", "log π(y_l|x) / |y_l|", "mean over the batch", "watch"),
    Entry("logprob_mean/margin", "log-probability margin a token", "nats/token", "chosen − rejected", "mean over the batch; the same under any β", "up"),
    Entry("loss/nll", "likelihood loss", "nats/token", "−log π(y_w|x) / |y_w|", "mean over chosen tokens of the batch; ORPO counts the prompt's too", "down"),
    Entry("loss/log_odds_ratio", "log σ of the odds ratio", "nats", "log σ(log odds ratio)", "mean over the batch", "up"),
    Entry("odds/log_ratio", "log odds ratio", "nats", "log(odds π(y_w|x) / odds π(y_l|x))", "mean over the batch", "up"),
    Entry("logit/chosen", "logit, chosen", "logit", "mean logit over the vocabulary", "mean over chosen completion tokens", "watch"),
    Entry("logit/rejected", "logit, rejected", "logit", "mean logit over the vocabulary", "mean over rejected completion tokens", "watch"),
)  # fmt: skip

GLOSSARY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def entry(name: str) -> Entry:
    """The line of a metric; for an unknown one, its own name and nothing claimed about it."""
    if name.startswith("reward_part/"):
        return Entry(name, name.partition("/")[2], "score", "r_m(x, y)", "mean over samples, before its weight", "up")
    return GLOSSARY.get(name) or Entry(name, name, "", "", "", "watch")
