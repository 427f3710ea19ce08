"""A trained model as a directory that other programs load, and on the hub if wanted.

Models   none, unless an adapter is to be taken off.
Result   the directory: weights as safetensors, configuration, tokenizer and a card with the model's lineage. `merged`:
         the whole model, for plain transformers and vLLM. `adapter`: the adapter alone, with the name of its base.
         `base`: the whole model with its adapter taken off again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rlhf_nb.compute.rundir import write_json
from rlhf_nb.errors import SpecError
from rlhf_nb.methods.base import LiveCoefficient, Method, Trainer
from rlhf_nb.protocol.events import Result

if TYPE_CHECKING:
    from rlhf_nb.protocol.spec import RunSpec
    from rlhf_nb.training.context import Context

Form = Literal["merged", "adapter", "base"]


class Export(Method):
    """Write a model where other programs find it."""

    name: ClassVar[str] = "export"
    title: ClassVar[str] = "Export"
    rows: ClassVar[str] = ""
    trains: ClassVar[bool] = False
    live: ClassVar[tuple[LiveCoefficient, ...]] = ()

    directory: str = ""
    """On the compute host. Empty: in the run's own directory."""
    form: Form = "merged"
    push: str = ""
    """Hub repository, owner/name. The token is the one that huggingface_hub finds on the compute host."""
    private: bool = True
    """Of a repository that does not exist yet."""
    base: str = ""
    """Of form=adapter: what its base is called on the hub. Empty: where it lies."""
    card: str = Field("", repr=False)
    """Text of README.md."""

    def check(self, spec: RunSpec) -> None:
        if not self.directory and not self.push:
            raise SpecError("export: no directory and no repository; give a directory, or push=OWNER/NAME")
        if self.push and self.push.count("/") != 1:
            raise SpecError(f"export: push={self.push!r} is no repository; write OWNER/NAME")
        if self.push and self.form == "adapter" and not self.base:
            raise SpecError(
                "export: the adapter's base is not on the hub, so nobody else could use it; push form=merged instead"
            )

    def build_trainer(self, context: Context) -> Trainer:
        return Exporter(self, context)


class Exporter:
    step = 0

    def __init__(self, method: Export, context: Context) -> None:
        self.method, self.context = method, context

    def train(self) -> None:
        """Write the directory whole or not at all, push it, and emit the result.

        Raises:
            SpecError: The directory holds something, there is no adapter, or no token to push with.
            ComputeError: The hub refuses.
        """
        from rlhf_nb.training import export

        method, context = self.method, self.context
        context.control.bind([])
        context.control.boundary(1)
        if context.control.stopping or not context.is_main:
            return
        path = Path(method.directory).expanduser() if method.directory else context.run_dir / "export"
        if not path.is_absolute():
            raise SpecError(f"export: directory={method.directory!r} is relative to nothing there; give a whole path")
        token = export.token() if method.push else None
        done = context.run_dir / "written.json"
        if not done.exists():
            context.emit.stage(f"writing {path}")
            source = export.sources(context)
            export.write(source, path, form=method.form, base=method.base, card=method.card)
            # A push that failed is taken up again without writing over what stands there.
            write_json(done, {"directory": str(path)})
        files = sorted(one for one in path.rglob("*") if one.is_file())
        url = ""
        if method.push:
            context.emit.stage(f"pushing to {method.push}")
            assert token is not None
            url = export.push(path, method.push, token=token, private=method.private)
        size = sum(one.stat().st_size for one in files)
        detail = {
            "directory": str(path),
            "form": method.form,
            "url": url,
            "files": [str(f.relative_to(path)) for f in files],
        }
        context.emit.event(Result(name="export", value=float(size), n=len(files), detail=detail))

    def save_model(self, directory: str) -> None:
        raise TypeError("an export trains no model")
