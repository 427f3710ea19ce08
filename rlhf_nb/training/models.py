"""From a model reference to a local directory.

Models pass between stages as saved directories, never as objects in memory: TRL's DPO reloads its reference from where
a model was loaded, and after an in-memory SFT that is the pre-SFT model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.compute.rundir import storage_errors
from rlhf_nb.errors import ComputeError, NotFoundError, SpecError, did_you_mean
from rlhf_nb.protocol.spec import HubModel, ModelRef, NamedModel, PathModel, RunModel

if TYPE_CHECKING:
    from rlhf_nb.training.context import Emitter

# Weights as safetensors only: a pickle in a stranger's repository runs code when it is read.
_WANTED_FROM_HUB = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


ENSEMBLE = "ensemble.json"
"""In the directory of several reward models that were trained together; see training/ensemble.py."""

FOUR_BIT_DEVICES = ("cuda",)
"""bitsandbytes 0.50 runs on CPUs too, with a kernel that has no backward pass."""


def cache_dir() -> Path:
    """Where models that are built once live: $RLHF_NB_CACHE, by default ~/.cache/rlhf_nb."""
    return Path(os.environ.get("RLHF_NB_CACHE") or Path.home() / ".cache" / "rlhf_nb").expanduser()


def resolver(runs_root: Path, emit: Emitter) -> Callable[[ModelRef], str]:
    """A function from reference to directory, as `Context.model_path`."""

    def path_of(reference: ModelRef) -> str:
        match reference:
            case NamedModel(name="toy"):
                return _existing(toy_path(), "toy")
            case NamedModel(name="toy-sft"):
                return str(toy_sft(emit))
            case NamedModel(name=name):
                known = ["toy", "toy-sft"]
                raise NotFoundError(
                    f'model "{name}" does not exist{did_you_mean(name, known)}  known: {", ".join(known)}'
                )
            case RunModel(run_id=run_id):
                return _existing(runs_root / run_id / "model", f"run {run_id}")
            case PathModel(path=path):
                return _full_model(Path(path).expanduser(), emit)
            case HubModel(repo_id=repo_id, revision=revision):
                return _from_hub(repo_id, revision, emit)
        raise TypeError(f"{reference!r} is no model reference")

    return path_of


def toy_path() -> Path:
    from rlhf_nb.toy import model_path

    return model_path()


def _existing(path: Path, name: str) -> str:
    if not (path / "config.json").exists():
        raise NotFoundError(f"{name} has no saved model at {path}; train it first, or name another model")
    return str(path)


def _from_hub(repo_id: str, revision: str | None, emit: Emitter) -> str:
    from huggingface_hub import snapshot_download

    emit.stage(f"fetching {repo_id}")
    try:
        path = snapshot_download(repo_id, revision=revision, allow_patterns=_WANTED_FROM_HUB)
    except Exception as error:  # noqa: BLE001 - the hub client raises many kinds; all mean that the model is not here
        first = (str(error).strip().splitlines() or [""])[0]
        at = f" at {revision}" if revision else ""
        raise NotFoundError(
            f'model "{repo_id}"{at} cannot be fetched ({type(error).__name__}: {first}); '
            f"check its name, or give a directory"
        ) from None
    return _full_model(Path(path), emit)


# --- adapters -------------------------------------------------------------------------------------------------------


def _full_model(path: Path, emit: Emitter) -> str:
    """The directory itself, or, for a bare adapter, its base with the adapter merged in."""
    if (path / "config.json").exists() or not (path / "adapter_config.json").exists():
        return _existing(path, f'"{path.name}"')
    settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path") or ""
    if (Path(base) / "config.json").exists():
        base_path = base
    elif base and not base.startswith(("/", ".", "~")):
        base_path = _from_hub(base, settings.get("revision"), emit)
    else:
        raise NotFoundError(
            f'adapter "{path.name}" was trained on "{base}", which is not here; set base_model_name_or_path in '
            f"{path / 'adapter_config.json'} to the base model's directory"
        )
    key = hashlib.sha256(f"{base_path}\n{content_hash(path)}".encode()).hexdigest()[:16]
    target = cache_dir() / f"merged-{key}"
    with once(target) as scratch:
        if scratch is not None:
            from rlhf_nb.training import adapters

            emit.stage(f"merging adapter {path.name}")
            adapters.merge(Path(base_path), path, scratch)
    return str(target)


@contextmanager
def once(target: Path) -> Iterator[Path | None]:
    """Make a directory once, whoever asks first, over all processes.

    Gives a scratch directory to fill, which becomes `target` at the end; None where `target` exists already.
    """
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f"{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                yield None
                return
            # We hold the lock: whoever left these was killed.
            for abandoned in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(abandoned, ignore_errors=True)
            scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            scratch.mkdir()
            try:
                yield scratch
                os.replace(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


# --- the toy world's SFT model --------------------------------------------------------------------------------------


def toy_sft_path() -> Path:
    """Where `toy-sft` lies or will lie; another base, data generator or recipe is another model."""
    import rlhf_nb.toy
    from rlhf_nb.toy import SFT_RECIPE

    digest = hashlib.sha256(json.dumps(dict(SFT_RECIPE), sort_keys=True).encode())
    for source in sorted(Path(rlhf_nb.toy.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(content_hash(toy_path()).encode())
    return cache_dir() / f"toy-sft-{digest.hexdigest()[:16]}"


def toy_sft(emit: Emitter) -> Path:
    """`toy-sft`, trained from `toy` the first time anybody asks, by its recipe."""
    _existing(toy_path(), "toy")
    target = toy_sft_path()
    if target.exists():
        return target
    with once(target) as scratch:
        if scratch is not None:
            emit.stage("training toy-sft once, it is kept for later runs")
            # A process of its own: this one may be a rank of a world, and its random state belongs to its own run.
            ours = (
                "RANK",
                "WORLD_SIZE",
                "LOCAL_",
                "MASTER_",
                "ACCELERATE_",
                "TORCHELASTIC_",
                "GROUP_",
                "ROLE_",
                "OMP_",
            )
            env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
            # So small a model gains little by a second thread, loses minutes where another process has the core, and is
            # another model with each number of threads.
            env["OMP_NUM_THREADS"] = "1"
            done = subprocess.run(
                [sys.executable, "-m", "rlhf_nb.training.toy_sft", str(scratch)],
                env=env,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                raise ComputeError(
                    f"toy-sft could not be trained (exit {done.returncode}): {(lines or ['no output'])[-1]}"
                )
    return target


# --- reading and writing --------------------------------------------------------------------------------------------


def load_model(path: str, architecture: Any = None, *, quantize: str = "none", **kwargs: Any) -> Any:
    """A model of a directory, in float32 on the CPU unless told otherwise. Code that it carries is never run.

    Args:
        quantize: `4bit` puts the linear layers into NF4 as they are read, on the accelerator where there is one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    refuse_ensemble(path)
    kwargs.setdefault("dtype", torch.float32)
    if quantize == "4bit":
        kwargs |= in_4_bit(kwargs["dtype"])
    return (architecture or AutoModelForCausalLM).from_pretrained(
        path, trust_remote_code=False, use_safetensors=True, **kwargs
    )


def freeze_beside_text(model: Any) -> None:
    """Freeze what of a model that also sees or hears is not its text decoder: of text alone it gets no gradient, for
    which processes that share gradients would wait."""
    from transformers import PreTrainedModel

    # Adapters and ensembles have the models inside them.
    for held in model.modules():
        if isinstance(held, PreTrainedModel) and held.config.get_text_config() is not held.config:
            inside = {id(parameter) for parameter in held.get_decoder().parameters()}
            for parameter in held.base_model.parameters():
                if id(parameter) not in inside:
                    parameter.requires_grad_(False)


def refuse_ensemble(path: str) -> None:
    """Several reward models are no model that trains or answers.

    Raises:
        SpecError: The directory holds an ensemble.
    """
    if (Path(path) / ENSEMBLE).exists():
        members = json.loads((Path(path) / ENSEMBLE).read_text(encoding="utf-8"))["members"]
        raise SpecError(
            f"model {Path(path).parent.name}/{Path(path).name} is an ensemble of {len(members)} reward models, which "
            f"only scores; use it with --reward, or start from the model that it began with"
        )


def in_4_bit(dtype: Any) -> dict[str, Any]:
    """What `from_pretrained` takes to read a model's linear layers into NF4, on this rank's accelerator.

    Raises:
        SpecError: Without bitsandbytes, or on a device where no gradient goes through its layers.
    """
    import torch
    from transformers import BitsAndBytesConfig

    require_bitsandbytes("adapter quantize=4bit", "use quantize=none")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type not in FOUR_BIT_DEVICES:
        raise SpecError(
            f"adapter quantize=4bit: no gradient goes through bitsandbytes' 4-bit layers on {device.type}; it needs "
            f"CUDA, or use quantize=none"
        )
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": device}}


def require_bitsandbytes(what: str, otherwise: str) -> Any:
    """The package, or one line that says what needs it.

    Raises:
        SpecError: It is not installed here.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise SpecError(
            f"{what}: bitsandbytes cannot be imported beside the accelerator ({error}); install it there, or "
            f"{otherwise}"
        ) from None
    return bitsandbytes


def load_tokenizer(path: str, emit: Emitter | None = None) -> Any:
    """The tokenizer of a model directory, with a pad token: the end token where it has none of its own.

    Raises:
        SpecError: It has neither, so that batches cannot be padded.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SpecError(
                f"tokenizer of {Path(path).name}: no pad token and no end token; "
                f"set pad_token in its tokenizer_config.json, so that batches can be padded"
            )
        tokenizer.pad_token = tokenizer.eos_token
        if emit is not None:
            emit.notice(
                "pad_is_eos",
                f"tokenizer of {Path(path).name} has no pad token; its end token {tokenizer.eos_token} pads",
            )
    return tokenizer


def context_length(path: str) -> int | None:
    """The most tokens the model was built for, where its configuration says so."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def max_length(path: str, wanted: int, emit: Emitter) -> int:
    """The knob `max_length`, or the model's context where that is shorter, said once."""
    there_is = context_length(path)
    if there_is is None or wanted <= there_is:
        return wanted
    emit.notice(
        "context", f"max_length={wanted} is more than the model's context of {there_is} tokens; {there_is} is used"
    )
    return there_is


def content_hash(directory: Path) -> str:
    """SHA-256 over names and bytes of what decides a model's outputs: weights, configuration, tokenizer."""
    digest = hashlib.sha256()
    # The adapter that a merged model keeps beside decides nothing; members of an ensemble do.
    inside = [f for f in directory.rglob("*") if "adapter" not in f.relative_to(directory).parts[:-1] and f.is_file()]
    for path in sorted(inside):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
            with open(path, "rb") as handle:
                while block := handle.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
