"""Makes the base model `toy`: tokenizer, pretraining, Hugging Face directory.

    python -m rlhf_nb.toy.build [--out DIR] [--steps N] [--threads N]

Without `--out` it replaces the model that ships in the package. The same recipe gives the same model on the same
machine and versions; on another the last bits differ, and with them what is sampled.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_nb.toy import corpus
from rlhf_nb.toy.recipe import model_path

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
CONTEXT = 512
# Two wide layers learn the town as fast as four narrow ones (0.62 against 0.64 nats after 300 steps) and decode faster.
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
STEPS, BATCH, LENGTH, PEAK_LR, WARMUP, SEED = 1000, 32, 128, 3e-3, 100, 0
DOCUMENTS = 150_000

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""<|start|><|user|>Where is the bakery?<|assistant|>The bakery is on Bridge Road.<|end|>"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the town's language; any other text falls back to its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    roles = [f"<|{role}|>" for role in corpus.ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[corpus.PAD, corpus.START, corpus.END, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents(20_000, seed=SEED), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=corpus.PAD,
        bos_token=corpus.START,
        eos_token=corpus.END,
        additional_special_tokens=roles,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained network."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        **SHAPE,
        # A round number, so that adapters and kernels which pad the vocabulary have nothing to pad.
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        # vLLM keeps a stale copy of a tied output head after a reload of the weights.
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def training_tokens(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(N, LENGTH): the corpus, end to end."""
    import torch

    texts = list(corpus.documents(DOCUMENTS, seed=SEED))
    ids = [i for encoding in tokenizer.backend_tokenizer.encode_batch(texts) for i in encoding.ids]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def pretrain(model: LlamaForCausalLM, tokens_NT: torch.Tensor, steps: int = STEPS) -> list[float]:
    """Next-token training in place; the loss of each step, in nats per token."""
    import torch

    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    warmup = min(0.3, WARMUP / steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=warmup)
    order = torch.Generator().manual_seed(SEED)
    losses, started = [], time.perf_counter()
    model.train()
    for step in range(steps):
        batch_BT = tokens_NT[torch.randint(len(tokens_NT), (BATCH,), generator=order)]
        loss = model(input_ids=batch_BT, labels=batch_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {time.perf_counter() - started:6.1f} s", flush=True)
    return losses


def build(out: Path, steps: int = STEPS) -> Path:
    """Makes the model and writes its directory."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    tokens_NT = training_tokens(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, corpus of {tokens_NT.numel():,} tokens")
    losses = pretrain(model, tokens_NT, steps)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({"out": str(out), "last_50_losses": sum(losses[-50:]) / len(losses[-50:])}))
    return out


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    build(args.out, args.steps)


if __name__ == "__main__":
    main()
