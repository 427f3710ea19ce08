from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.errors import DataError, SpecError
from rlhf_nb.methods.sft import SFT
from rlhf_nb.protocol.spec import LoRA
from rlhf_nb.toy import demonstrations

CONFIG = {"max_steps": 3, "batch_size": 2, "sample_every": 0, "learning_rate": 1e-2, "max_length": 400}


def logits(model, ids=((5, 6, 7, 8),)):
    model.eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


def test_the_saved_model_is_plain_safetensors_with_its_tokenizer(job):
    place = job("sft", demonstrations(4), config=CONFIG)
    names = {path.name for path in place.model.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth"))}
    trained = AutoModelForCausalLM.from_pretrained(place.model)
    base = AutoModelForCausalLM.from_pretrained(job.model)
    assert not torch.equal(logits(trained), logits(base))
    assert (
        AutoTokenizer.from_pretrained(place.model).chat_template
        == AutoTokenizer.from_pretrained(job.model).chat_template
    )


def test_lora_saves_merged_weights_that_plain_transformers_loads_and_the_adapter_beside(job):
    from peft import PeftModel

    place = job("sft", demonstrations(4), config=CONFIG, adapter=LoRA(r=4, alpha=8))
    merged = AutoModelForCausalLM.from_pretrained(place.model)
    base = AutoModelForCausalLM.from_pretrained(job.model)
    assert type(merged) is type(base)
    before = logits(base).clone()
    with_adapter = PeftModel.from_pretrained(base, place.model / "adapter")
    torch.testing.assert_close(logits(merged), logits(with_adapter))
    assert (logits(merged) - before).abs().max() > 1e-4


def test_lora_reference_completions_come_from_the_base(job):
    config = {**CONFIG, "sample_every": 3, "sample_tokens": 6}
    place = job("sft", demonstrations(4), config=config, adapter=LoRA(r=4))
    (samples,) = [e for e in place.events() if e.kind == "samples"]
    assert all(item.reference_completion is not None for item in samples.items)
    assert any(abs(item.kl) > 1e-3 for item in samples.items)


def test_the_loss_counts_completion_tokens_only(job, trace):
    rows = demonstrations(2)
    config = {**CONFIG, "max_steps": 1, "learning_rate": 0.0}
    only = trace(job("sft", rows, name="only", config=config), "loss")[1]
    everything = trace(job("sft", rows, name="all", config={**config, "completion_only": False}), "loss")[1]
    assert only != everything


def test_one_row_trains_and_says_that_every_step_sees_it(job, trace):
    place = job("sft", demonstrations(1), config=CONFIG)
    assert len(trace(place, "loss")) == 3
    (notice,) = [e for e in place.events() if e.kind == "notice"]
    assert notice.code == "few_rows"
    assert "batch_size=2" in notice.text


def test_rows_longer_than_max_length_are_cut_and_counted(job):
    rows = [*demonstrations(4), {"prompt": "Tell me.", "completion": "word " * 90}]
    place = job("sft", rows, config={**CONFIG, "max_length": 300, "max_steps": 1})
    (notice,) = [e for e in place.events() if e.kind == "notice" and e.code == "rows_cut"]
    assert notice.text.startswith("1 of 5 demonstrations reach max_length=300 tokens")


def test_prompts_longer_than_max_length_are_dropped_and_counted_and_all_of_them_is_an_error(job):
    long = {"prompt": "why " * 110, "completion": "So."}
    place = job("sft", [*demonstrations(2), long], config={**CONFIG, "max_steps": 1})
    (notice,) = [e for e in place.events() if e.kind == "notice" and e.code == "rows_dropped"]
    assert notice.text == "1 of 3 demonstrations do not fit in max_length=400 tokens and were dropped"
    with pytest.raises(
        DataError, match=r"none of the 1 demonstrations fits in max_length=400 tokens; raise max_length"
    ):
        job("sft", [long], name="none", config=CONFIG)


def test_more_than_the_models_context_is_not_used_and_said(job):
    place = job("sft", demonstrations(4), config={**CONFIG, "max_length": 4096, "max_steps": 1})
    (notice,) = [e for e in place.events() if e.kind == "notice" and e.code == "context"]
    assert notice.text == "max_length=4096 is more than the model's context of 512 tokens; 512 is used"


def test_a_batch_that_does_not_split_over_micro_batches_is_refused(job):
    with pytest.raises(
        SpecError, match=r"batch_size=2 does not split over 1 ranks × 3 micro-batches; use a multiple of 3"
    ):
        job("sft", demonstrations(4), config={**CONFIG, "gradient_accumulation": 3})


def test_accumulating_two_halves_is_one_step_of_the_whole(job, trace, tiny_model_maker):
    job.model = tiny_model_maker("no-dropout", dropout=0.0)
    whole = job("sft", demonstrations(8), name="whole", config={**CONFIG, "batch_size": 4})
    halves = job(
        "sft", demonstrations(8), name="halves", config={**CONFIG, "batch_size": 4, "gradient_accumulation": 2}
    )
    assert trace(halves, "loss") == pytest.approx(trace(whole, "loss"), rel=1e-5)
    assert [e.step for e in halves.events() if e.kind == "metric"] == [1, 2, 3]


def test_chat_prompts_without_a_chat_template_are_refused_and_plain_ones_train(job, tiny_model_maker):
    job.model = tiny_model_maker("plain")
    (job.model / "chat_template.jinja").unlink()
    job("sft", demonstrations(4), name="text", config={**CONFIG, "max_steps": 1})
    chat = [{"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello."}]
    with pytest.raises(DataError, match="tokenizer of plain has no chat template"):
        job("sft", chat, name="chat", config=CONFIG)


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"learning_rate": -1}, "sft: learning_rate=-1: should be greater than or equal to 0"),
        ({"max_step": 3}, 'sft: "max_step" is no knob of sft; did you mean "max_steps"?'),
        ({"lr_scheduler": "warp"}, "sft: lr_scheduler='warp'"),
    ],
)
def test_a_knob_that_cannot_be_is_one_line_with_its_value(knobs, line):
    with pytest.raises(SpecError) as caught:
        SFT.create(**knobs)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_is_shown_as_such(job):
    # Steps this large overflow float32 within a few steps; the Trainer's own filter would show a running mean instead.
    place = job(
        "sft",
        demonstrations(4),
        config={**CONFIG, "learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 0.0, "lr_scheduler": "constant"},
    )
    losses = [e for e in place.events() if e.kind == "metric"]
    assert losses[-1].values["loss"] is None
    assert losses[-1].not_finite["loss"] in ("nan", "inf")


def test_packed_rows_see_nothing_of_each_other_and_give_the_loss_they_give_alone(job, trace, tiny_model_maker):
    job.model = tiny_model_maker("still", dropout=0.0)
    rows = [{"prompt": f"Say {i}.", "completion": "yes " * (i + 1)} for i in range(4)]
    one_step = {"max_steps": 1, "learning_rate": 0.0, "max_length": 200, "sample_every": 0}
    apart = job("sft", rows, name="apart", config={**one_step, "batch_size": 4})
    packed = job("sft", rows, name="packed", config={**one_step, "batch_size": 1, "packing": True})
    assert trace(packed, "loss") == pytest.approx(trace(apart, "loss"), rel=1e-5)
