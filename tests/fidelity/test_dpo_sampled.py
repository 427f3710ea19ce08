"""DPO as it ships, on TRL's trainer and sampled labels, comes to π* ∝ π_ref·exp(r/β) of a small Llama's few completions.

What sampling leaves of KL(π ‖ π*) goes as 1/(rows·β²).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_nb.maths import kl
from rlhf_nb.maths.preference import preference_probability
from rlhf_nb.protocol.spec import PathModel

WORDS = ["<end>", "a", "x", "y"]
PROMPTS = ["x y", "y x"]
COMPLETIONS = [list(words) for length in (1, 2) for words in product(range(1, len(WORDS)), repeat=length)]
"""Of one or two words, each followed by the end: what rows can say. Everything below is conditioned on them."""


def save_policy(path: Path) -> Path:
    """Random and far from uniform. The end token is also the pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(1)
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.5,
        "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<end>", eos_token="<end>").save_pretrained(path)
    return path


def distribution(path: Path) -> Tensor:
    """(P, N) log-probability of every completion, among those there are."""
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    rows = []
    for prompt in PROMPTS:
        asked = [WORDS.index(word) for word in prompt.split()]
        said = []
        for completion in COMPLETIONS:
            ids = torch.tensor([[*asked, *completion, 0]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, len(asked) - 1 : -1].log_softmax(-1)
            said.append(logprobs.gather(-1, ids[0, len(asked) :, None]).sum())
        rows.append(torch.stack(said))
    return torch.stack(rows).log_softmax(-1)


def labelled(rewards: Tensor, rows: int, generator: torch.Generator) -> list[dict]:
    """Pairs of distinct completions, drawn evenly; the label by Bradley and Terry."""
    P, N = rewards.shape
    prompt = torch.randint(P, (rows,), generator=generator)
    first = torch.randint(N, (rows,), generator=generator)
    second = (first + torch.randint(1, N, (rows,), generator=generator)) % N
    says_first = preference_probability(rewards[prompt, first] - rewards[prompt, second])
    wins = torch.rand(rows, generator=generator, dtype=torch.float64) < says_first
    texts = ["".join(f" {WORDS[token]}" for token in completion) for completion in COMPLETIONS]
    chosen, rejected = torch.where(wins, first, second).tolist(), torch.where(wins, second, first).tolist()
    return [
        {"prompt": PROMPTS[p], "chosen": texts[c], "rejected": texts[r]}
        for p, c, r in zip(prompt.tolist(), chosen, rejected, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_on_sampled_labels_comes_to_the_gibbs_policy(job, tmp_path, beta):
    rows, batch = 100_000, 250
    policy = save_policy(tmp_path / "policy")
    generator = torch.Generator().manual_seed(7)
    rewards = torch.rand(len(PROMPTS), len(COMPLETIONS), generator=generator, dtype=torch.float64)
    config = {
        "beta": beta, "max_steps": rows // batch, "batch_size": batch, "learning_rate": 1e-3, "lr_scheduler": "cosine",
        "max_length": 8, "sample_every": 0,
    }  # fmt: skip
    place = job("dpo", labelled(rewards, rows, generator), config=config, policy=PathModel(path=str(policy)))
    before, after = distribution(policy), distribution(place.model)
    star = kl.gibbs(before, rewards, beta)
    assert kl.exact(after, star).max() < 0.01
    assert kl.exact(before, star).max() > 0.05
    # It is this β's optimum, and not that of swapped labels or of no reference.
    for other in (kl.gibbs(before, -rewards, beta), torch.log_softmax(rewards / beta, -1)):
        assert (kl.exact(after, star) < 0.1 * kl.exact(after, other)).all()
