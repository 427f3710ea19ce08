"""The run spec: everything that decides what a run computes, as plain JSON.

A spec is written once, to `spec.json` in the run directory, before anything starts. Models, data and rewards are
*references*, resolved beside the accelerator when the job starts: an unfinished run can stand for the model it saves.
"""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rlhf_nb.errors import SpecError

SPEC_VERSION = 1


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedModel(Frozen):
    """A model that always resolves: `toy` or `toy-sft`."""

    kind: Literal["named"] = "named"
    name: str


class RunModel(Frozen):
    """The model a run saves when it finishes, or when its user stops it."""

    kind: Literal["run"] = "run"
    run_id: str


class PathModel(Frozen):
    """A saved directory on the compute host: safetensors, a config and a tokenizer."""

    kind: Literal["path"] = "path"
    path: str


class HubModel(Frozen):
    kind: Literal["hub"] = "hub"
    repo_id: str
    revision: str | None = None


ModelRef = Annotated[NamedModel | RunModel | PathModel | HubModel, Field(discriminator="kind")]


RowKind = Literal["demonstrations", "pairs", "rankings", "thumbs", "prompts", "completions"]


class NamedData(Frozen):
    """Data the toy world writes: `toy-pairs` and its like. Generated where it is used, equal everywhere."""

    kind: Literal["named"] = "named"
    name: str


class BlobData(Frozen):
    """Rows that travelled by content hash. The blob is `<content_hash>.jsonl` in the compute host's blob folder."""

    kind: Literal["blob"] = "blob"
    content_hash: str
    row_kind: RowKind
    n: int
    name: str = ""
    converted: str = ""
    """What they were made of and what was left out, where they were of another kind; said at the start of the run."""


class RunData(Frozen):
    """The rows a run makes, when it finishes or its user stops it. They stay where they were made."""

    kind: Literal["run"] = "run"
    run_id: str
    row_kind: RowKind


OneData = Annotated[NamedData | BlobData | RunData, Field(discriminator="kind")]


class DataPart(Frozen):
    data: OneData
    weight: float = Field(gt=0, allow_inf_nan=False)
    """Its share of what is drawn, against the other parts' weights and whatever its size."""


class MixedData(Frozen):
    """Prompts of several data sets, drawn in fixed shares."""

    kind: Literal["mixed"] = "mixed"
    parts: tuple[DataPart, ...] = Field(min_length=2)


DataRef = Annotated[NamedData | BlobData | RunData | MixedData, Field(discriminator="kind")]


def data_parts(data: Any) -> tuple[DataPart, ...]:
    """The data sets that a reference stands for, with their weights; none for None."""
    if data is None:
        return ()
    return data.parts if isinstance(data, MixedData) else (DataPart(data=data, weight=1.0),)


class ModelJudge(Frozen):
    """A chat model beside the accelerator."""

    kind: Literal["model"] = "model"
    model: ModelRef


VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Names of environment variables that may hold a token. Capitals: what is accepted is written down and shown, and a
token given in the name's place would be, too."""


class Endpoint(Frozen):
    """A chat model behind an OpenAI-compatible address; vLLM's server is one."""

    kind: Literal["endpoint"] = "endpoint"
    url: str
    """Up to `/chat/completions`, which is added: `http://127.0.0.1:8000/v1`. It holds no secret: it is written down."""
    model: str
    """As it is called there."""
    token_env: str = ""
    """Name of the environment variable that holds the token, where the job runs."""
    timeout_s: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Seconds for one answer."""
    retries: int = Field(4, ge=0)
    """How often a question is asked again that got no answer."""
    at_once: int = Field(16, gt=0)
    """Questions under way at a time."""


class NamedJudge(Frozen):
    """A judge of the toy world with known faults."""

    kind: Literal["named"] = "named"
    name: str
    config: dict[str, float] = {}


JudgeRef = Annotated[ModelJudge | Endpoint | NamedJudge, Field(discriminator="kind")]
_JUDGE: TypeAdapter[JudgeRef] = TypeAdapter(JudgeRef)


def judge_ref(value: dict[str, Any]) -> JudgeRef:
    """A judge from its JSON, as it stands among a reward's options."""
    return _JUDGE.validate_python(value)


class NamedReward(Frozen):
    """A reward in the registry, `toy-true` for one, with its knobs."""

    kind: Literal["named"] = "named"
    name: str
    config: dict[str, Any] = {}


Over = Literal["mean", "min", "mean_minus_std"]


class ModelReward(Frozen):
    """A reward model: a sequence classifier with one output, or an ensemble of them."""

    kind: Literal["model"] = "model"
    model: ModelRef
    over: Over = "mean"
    """How the members of an ensemble become one score: their mean, the worst, or the mean − std_coef × their spread."""
    std_coef: float = Field(1.0, ge=0, allow_inf_nan=False)


class FunctionReward(Frozen):
    """`f(prompts, completions, **columns) -> list[float]` as source, its imports inside."""

    kind: Literal["function"] = "function"
    name: str
    source: str


OneReward = Annotated[NamedReward | ModelReward | FunctionReward, Field(discriminator="kind")]


class RewardPart(Frozen):
    reward: OneReward
    weight: float = Field(1.0, allow_inf_nan=False)
    """What its scores are multiplied by, at the start; live as `reward_weight/NAME`."""
    called: str = ""
    """Its name where another part has the same by itself: one check with other options is another reward."""

    @property
    def name(self) -> str:
        return self.called or describe(self.reward)


class CombinedReward(Frozen):
    """Several rewards as one. How they become one number is a knob of the method."""

    kind: Literal["combined"] = "combined"
    parts: tuple[RewardPart, ...] = Field(min_length=2)


RewardRef = Annotated[NamedReward | ModelReward | FunctionReward | CombinedReward, Field(discriminator="kind")]


def reward_parts(reward: Any) -> tuple[RewardPart, ...]:
    """The rewards that a reference stands for, with their weights; none for None."""
    if reward is None:
        return ()
    return reward.parts if isinstance(reward, CombinedReward) else (RewardPart(reward=reward),)


def parents_of(reward: RewardRef | None) -> tuple[str, ...]:
    """Runs whose model a reward asks."""
    models = [_asked(part.reward) for part in reward_parts(reward)]
    return tuple(model.run_id for model in models if isinstance(model, RunModel))


def _asked(reward: OneReward) -> ModelRef | None:
    if isinstance(reward, NamedReward) and isinstance(judge := reward.config.get("judge"), dict):
        reference = judge_ref(judge)
        return reference.model if isinstance(reference, ModelJudge) else None
    return reward.model if isinstance(reward, ModelReward) else None


class LoRA(Frozen):
    """Train a low-rank adapter instead of all weights. Hu et al. 2021, arXiv:2106.09685."""

    r: int = Field(16, gt=0)
    """Rank of the update."""
    alpha: float = Field(32.0, gt=0)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    quantize: Literal["none", "4bit"] = "none"
    """4bit: the base's linear layers in NF4, a quarter of their bytes (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
    Needs CUDA and bitsandbytes. The saved model is the base in full with the adapter merged in."""


class Launch(Frozen):
    """Flags for `accelerate launch`, as the user wrote them."""

    flags: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Launch:
        """Split as a shell would.

        Raises:
            SpecError: A quote is left open, the number of ranks is none, or it stands in a file that is read elsewhere.
        """
        try:
            launch = cls(flags=tuple(shlex.split(text)))
        except ValueError as error:
            raise SpecError(f"launch={text!r}: {error}; close the quote") from None
        file = launch.option("config_file")
        if file is not None and launch.option("num_processes") is None:
            raise SpecError(
                f"launch: the number of ranks in --config_file {file} is not seen from here; say it beside: "
                f"--config_file {file} --num_processes 2"
            )
        ranks = launch.option("num_processes")
        if ranks is not None and not (ranks.isascii() and ranks.isdigit() and int(ranks) > 0):
            raise SpecError(f"launch: --num_processes {ranks!r} is no number of ranks; give 1 or more")
        return launch

    def option(self, name: str) -> str | None:
        """Value of `--name value` or `--name=value`, or None. Dashes and underscores are the same to accelerate."""
        want = name.replace("-", "_")
        for position, flag in enumerate(self.flags):
            key, equals, value = flag.lstrip("-").partition("=")
            if flag.startswith("--") and key.replace("-", "_") == want:
                if equals:
                    return value
                return self.flags[position + 1] if position + 1 < len(self.flags) else ""
        return None

    @property
    def num_processes(self) -> int:
        """The world size that was asked for: ranks, over all machines."""
        return int(self.option("num_processes") or 1)


class RunSpec(Frozen):
    version: int = SPEC_VERSION
    run_id: str
    workspace_id: str
    method: str
    """Registry name: sft, reward, dpo, ppo … or evaluate."""
    config: dict[str, Any]
    """The method's knobs, complete: defaults are written out, so that a later default changes no old run."""
    policy: ModelRef | None = None
    """The model that is trained (or evaluated). `base=` fills the same place for SFT and reward models."""
    data: DataRef | None = None
    """Rows to train on; for online methods, the prompts."""
    held_out: OneData | None = None
    pretraining: OneData | None = None
    """Demonstrations whose likelihood is kept up beside (PPO-ptx)."""
    reward: RewardRef | None = None
    gold: RewardRef | None = None
    """A reward that is only plotted, never optimised."""
    judge: JudgeRef | None = None
    """Who compares, criticises or revises, where a job asks for that."""
    adapter: LoRA | None = None
    launch: Launch = Launch()
    label_as: str = ""
    """Free title a person gave the run."""
    who: str = ""
    created: float
    """Unix seconds."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Runs whose model or rows this run needs, each once, in the order of the spec."""
        made = (data.run_id for data in self.data_sets if isinstance(data, RunData))
        return tuple(dict.fromkeys((*self.model_parents, *made)))

    @property
    def model_parents(self) -> tuple[str, ...]:
        """Runs whose model this run needs."""
        models = (self.policy, self.judge.model if isinstance(self.judge, ModelJudge) else None)
        own = [model.run_id for model in models if isinstance(model, RunModel)]
        return tuple(dict.fromkeys((*own, *parents_of(self.reward), *parents_of(self.gold))))

    @property
    def data_sets(self) -> tuple[NamedData | BlobData | RunData, ...]:
        """Every data set that the run reads."""
        kept = (self.data, self.held_out, self.pretraining)
        return tuple(part.data for data in kept for part in data_parts(data))

    @property
    def title(self) -> str:
        """`toy-sft → rm-2`: what is trained, on what, towards what."""
        parts = [describe(self.policy)]
        if self.data is not None and self.reward is None:
            parts.append(describe(self.data))
        if self.reward is not None:
            parts.append(describe(self.reward))
        if self.judge is not None:
            parts.append(describe(self.judge))
        return " → ".join(part for part in parts if part)

    def as_code(self) -> str:
        """The cell that reproduces the run: Python in the public words, given the workspace as `ws`."""
        from rlhf_nb.protocol.code import as_code

        return as_code(self)


def describe(reference: Any) -> str:
    """The shortest name a person would use for a reference."""
    match reference:
        case None:
            return ""
        case NamedReward(name=name, config={"judge": _, "principle": str(words)}) if words:
            # One judge under several principles is several rewards, each with a weight of its own.
            return f"{name}-{'-'.join(re.findall(r'[a-z0-9]+', words.lower()))[:32].strip('-')}"
        case NamedModel() | NamedData() | NamedReward() | FunctionReward() | NamedJudge():
            return reference.name
        case RunModel() | RunData():
            return reference.run_id
        case PathModel():
            return reference.path.rstrip("/").rsplit("/", 1)[-1]
        case HubModel():
            return reference.repo_id
        case BlobData():
            return reference.name or reference.content_hash[:8]
        case ModelReward() | ModelJudge():
            return describe(reference.model)
        case Endpoint():
            return reference.model
        case CombinedReward():
            return " + ".join(part.name for part in reference.parts)
        case MixedData():
            return " + ".join(describe(part.data) for part in reference.parts)
    raise TypeError(f"{type(reference).__name__} is no reference")
