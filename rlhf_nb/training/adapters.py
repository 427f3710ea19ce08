"""Adapters on disk: which base one belongs to, and how it is put on, merged and taken off again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhf_nb.compute.rundir import write_json
from rlhf_nb.errors import SpecError
from rlhf_nb.training import models

NOTE = "base.json"
"""Beside an adapter's weights: what its base is called, and a fingerprint of the base's weights."""
ENDS = 1 << 20


def fingerprint(directory: Path | str) -> str:
    """SHA-256 over the beginning and the end of every weights file and its size: cheap on a model of any size.

    Told apart are models, not single weights: training moves them all.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(directory).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as handle:
            digest.update(handle.read(ENDS))
            handle.seek(max(0, size - ENDS))
            digest.update(handle.read(ENDS))
    return digest.hexdigest()


def note_base(adapter: Path, name: str, base: Path | str) -> None:
    """Write down which base an adapter was trained on."""
    if (adapter / "adapter_config.json").exists():
        write_json(adapter / NOTE, {"name": name, "fingerprint": fingerprint(base)})


def check_base(adapter: Path, base: Path | str) -> None:
    """See that an adapter stands on the base it was trained on, where that was noted.

    Raises:
        SpecError: It was another; both are named.
    """
    if not (adapter / NOTE).exists():
        return
    noted = json.loads((adapter / NOTE).read_text(encoding="utf-8"))
    if noted["fingerprint"] != fingerprint(base):
        raise SpecError(
            f'adapter "{adapter.name}" was trained on "{noted["name"]}" and the base here, {base}, has other weights; '
            f"put it on {noted['name']}"
        )


def on_base(base: Path | str, adapter: Path, like: Any) -> Any:
    """The adapter on its base in full, of the same kind as a model that holds the base in fewer bits."""
    from peft import PeftModel

    held = like.get_base_model()
    # A sequence classifier has two labels unless told otherwise, and its head comes with the adapter.
    labels = {"num_labels": held.num_labels} if hasattr(held, "num_labels") else {}
    return PeftModel.from_pretrained(models.load_model(str(base), type(held), **labels), str(adapter))


def merge(base: Path, adapter: Path, target: Path) -> None:
    """Write the base with the adapter merged in, W + (α/r)·BA, and a tokenizer.

    Raises:
        SpecError: The adapter was trained on another base; both are named.
    """
    from peft import PeftModel

    check_base(adapter, base)
    model = models.load_model(str(base))
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        # torch lists every mismatched tensor on its own line; the first says enough.
        first = next(
            (line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error).splitlines()[0]
        )
        raise SpecError(
            f'adapter "{adapter.name}" does not fit its base "{base.name}" ({first[:160]}); '
            f"it was trained on another base"
        ) from None
    merged.save_pretrained(target)
    tokenizer_from = adapter if (adapter / "tokenizer_config.json").exists() else base
    models.load_tokenizer(str(tokenizer_from)).save_pretrained(target)


def unmerge(merged: Path, adapter: Path, target: Path) -> None:
    """Write what a merged model was before: each weight less (α/r)·BA, equal to the base up to rounding.

    Raises:
        SpecError: The adapter changed more than (α/r)·BA, and what was there cannot be told from it.
    """
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import Linear, LoraLayer, LoraModel

    config: Any = PeftConfig.from_pretrained(str(adapter))
    if whole := getattr(config, "modules_to_save", None):
        raise _not_undone(adapter, f"trained {', '.join(whole)} whole")
    start = getattr(config, "init_lora_weights", True)
    # These begin with a part of the base, and take it out of there.
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq")):
        raise _not_undone(adapter, f"began as a part of its base ({start})")
    model = PeftModel.from_pretrained(models.load_model(str(merged)), str(adapter))
    if not isinstance(model.base_model, LoraModel):
        raise _not_undone(adapter, f"is of the kind {type(model.base_model).__name__}")
    if config.bias != "none" or config.trainable_token_indices:
        raise _not_undone(adapter, "trained biases or tokens of the base")
    for where, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # DoRA is a variant of the plain layer.
            if not isinstance(module, Linear) or module.lora_variant:
                raise _not_undone(adapter, f"is more than a product of two matrices at {where}")
            for name in module.lora_A:
                module.get_base_layer().weight.data -= module.get_delta_weight(name)
    model.unload().save_pretrained(target)
    models.load_tokenizer(str(merged)).save_pretrained(target)


def _not_undone(adapter: Path, why: str) -> SpecError:
    return SpecError(
        f'adapter "{adapter.name}" {why}, and what it replaced cannot be told from it; take the base itself'
    )
