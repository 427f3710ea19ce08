from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_nb.errors import DataError, NotFoundError, SpecError
from rlhf_nb.protocol.spec import BlobData, HubModel, LoRA, NamedModel, PathModel, RunModel
from rlhf_nb.toy import demonstrations
from rlhf_nb.training import models
from rlhf_nb.training.context import Emitter
from rlhf_nb.training.data import load_rows


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RLHF_NB_CACHE", str(tmp_path / "cache"))
    return models.resolver(tmp_path, Emitter(None))


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        (RunModel(run_id="sft-9"), "run sft-9 has no saved model at"),
        (PathModel(path="/nowhere/llama"), '"llama" has no saved model at /nowhere/llama'),
        (NamedModel(name="toy-sf"), 'model "toy-sf" does not exist; did you mean "toy-sft"?'),
        (HubModel(repo_id="no/such-model"), 'model "no/such-model" cannot be fetched'),
    ],
)
def test_a_model_that_does_not_exist_is_one_line(resolve, reference, line):
    with pytest.raises(NotFoundError) as caught:
        resolve(reference)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_toy_is_a_directory_that_plain_transformers_loads(resolve):
    assert AutoModelForCausalLM.from_pretrained(resolve(NamedModel(name="toy"))).num_parameters() <= 5_000_000


def test_a_bare_adapter_is_merged_into_its_base_once(job, resolve):
    place = job(
        "sft",
        demonstrations(4),
        config={"max_steps": 2, "batch_size": 2, "sample_every": 0, "learning_rate": 1e-2},
        adapter=LoRA(r=4),
    )
    path = Path(resolve(PathModel(path=str(place.model / "adapter"))))
    again = resolve(PathModel(path=str(place.model / "adapter")))
    assert str(path) == again
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (path, place.model))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_of_another_base_is_refused(job, resolve, tiny_model_maker):
    place = job(
        "sft", demonstrations(4), config={"max_steps": 1, "batch_size": 2, "sample_every": 0}, adapter=LoRA(r=4)
    )
    wide = tiny_model_maker("wide", hidden_size=64)
    file = place.model / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(wide)}))
    with pytest.raises(
        SpecError, match=r'adapter "adapter" was trained on "tiny" and the base here, .*wide, has other'
    ):
        resolve(PathModel(path=str(file.parent)))
    # As other programs leave adapters, without a word on whose they are.
    (file.parent / "base.json").unlink()
    with pytest.raises(SpecError, match=r'adapter "adapter" does not fit its base "wide" \(size mismatch') as caught:
        resolve(PathModel(path=str(file.parent)))
    assert "\n" not in str(caught.value)
    file.write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(NotFoundError, match=r'adapter "adapter" was trained on "/gone/base", which is not here'):
        resolve(PathModel(path=str(file.parent)))


def test_a_directory_is_made_once_by_whoever_asks_first(tmp_path):
    made: list[int] = []

    def ask(number: int) -> None:
        with models.once(tmp_path / "made") as scratch:
            if scratch is not None:
                time.sleep(0.05)
                (scratch / "file").write_text(str(number))
                made.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "made" / "file").read_text() == str(made[0])


def test_a_directory_whose_making_failed_is_made_again(tmp_path):
    with pytest.raises(RuntimeError, match="no"), models.once(tmp_path / "made") as scratch:
        (scratch / "half").touch()
        raise RuntimeError("no")
    assert not (tmp_path / "made").exists()
    with models.once(tmp_path / "made") as scratch:
        assert scratch is not None
        assert not list(scratch.iterdir())


def test_the_content_hash_sees_weights_and_names(tiny_model_maker):
    one, same = tiny_model_maker("one"), tiny_model_maker("same")
    assert models.content_hash(one) == models.content_hash(same)
    (same / "tokenizer.json").write_text("{}")
    assert models.content_hash(one) != models.content_hash(same)


def test_rows_that_are_missing_or_damaged_are_refused(tmp_path):
    digest = hashlib.sha256(b"").hexdigest()
    reference = BlobData(content_hash=digest, row_kind="pairs", n=1, name="hh")
    with pytest.raises(DataError, match=r'data "hh": its rows did not arrive'):
        load_rows(reference, tmp_path, "pairs")
    (tmp_path / f"{digest}.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r'data "hh": .*damaged'):
        load_rows(reference, tmp_path, "pairs")
    (tmp_path / f"{digest}.jsonl").write_text("")
    with pytest.raises(DataError, match=r'data "hh" holds 0 rows'):
        load_rows(reference, tmp_path, "pairs")
