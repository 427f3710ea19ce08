"""A saved model as a directory for other programs, and from there to the hub."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.compute.rundir import storage_errors
from rlhf_nb.errors import ComputeError, SpecError
from rlhf_nb.protocol.spec import PathModel, RunModel
from rlhf_nb.training import adapters, models

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context

WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""What a model directory is copied of. No pickles, no optimizer state."""


@dataclass(frozen=True)
class Source:
    """Where the parts of a model lie."""

    whole: Path
    adapter: Path | None
    """The adapter that is merged in the whole; None where all weights were trained."""


def sources(context: Context) -> Source:
    """The model that the run names. A bare adapter is merged into its base for the whole."""
    reference = context.spec.policy
    whole = Path(context.model_path(reference))
    if isinstance(reference, PathModel):
        given = Path(reference.path)
        if (given / "adapter_config.json").exists():
            return Source(whole, given)
    adapter = whole / "adapter"
    made_here = isinstance(reference, RunModel | PathModel)
    return Source(whole, adapter if made_here and (adapter / "adapter_config.json").exists() else None)


def write(source: Source, target: Path, *, form: str, base: str = "", card: str = "") -> None:
    """Fill a directory that does not exist yet, or is empty.

    Args:
        base: For an adapter, the name under which its base is found; empty keeps the one it has.

    Raises:
        SpecError: Something is there already, an adapter is wanted of a model that has none, or the model is an
            ensemble: its weights lie in a directory each, and no other program puts them together.
    """
    models.refuse_ensemble(str(source.whole))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SpecError(f"export: {target} holds something already; give another directory")
    if form != "merged" and source.adapter is None:
        raise SpecError(
            f"export: {source.whole.name} was trained in all its weights and has no adapter; use form=merged"
        )
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with storage_errors(target):
        scratch.mkdir(parents=True)
        try:
            if form == "merged":
                _copy(source.whole, scratch)
            elif form == "adapter":
                assert source.adapter is not None
                _copy(source.adapter, scratch)
                models.load_tokenizer(str(source.whole)).save_pretrained(scratch)
                if base:
                    _name_base(scratch, base)
            else:
                assert source.adapter is not None
                adapters.unmerge(source.whole, source.adapter, scratch)
            if card:
                (scratch / "README.md").write_text(card, encoding="utf-8")
            if target.exists():
                target.rmdir()
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in WEIGHTS:
            shutil.copyfile(path, target / path.name)


def _name_base(directory: Path, base: str) -> None:
    repo, _, revision = base.partition("@")
    for name, changes in (
        ("adapter_config.json", {"base_model_name_or_path": repo, "revision": revision or None}),
        (adapters.NOTE, {"name": base}),
    ):
        if (directory / name).exists():
            held = json.loads((directory / name).read_text(encoding="utf-8"))
            (directory / name).write_text(json.dumps({**held, **changes}, indent=2), encoding="utf-8")


def token() -> str:
    """The hub's token on this machine, from its environment or its login. It is written nowhere.

    Raises:
        SpecError: There is none.
    """
    from huggingface_hub import get_token

    found = get_token()
    if not found:
        raise SpecError("export: push needs a token on the compute host: set HF_TOKEN there, or `hf auth login`")
    return found


def push(directory: Path, repo_id: str, *, token: str, private: bool) -> str:
    """Upload a directory to the hub and give the address of its commit.

    Raises:
        ComputeError: The hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done: Any = api.upload_folder(folder_path=directory, repo_id=repo_id, commit_message="Upload from rlhf_nb")
    except Exception as error:  # noqa: BLE001 - the hub client raises many kinds; all mean that it is not there
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        said = f"{type(error).__name__}: {first}".replace(token, "•••")
        raise ComputeError(
            f"export: {repo_id} could not be pushed ({said}); the directory {directory} is whole"
        ) from None
    return str(done.commit_url)
