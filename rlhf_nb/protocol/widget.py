"""What a widget's kernel half and its views say to each other, discriminated by `kind`.

These may change together with the JavaScript bundle: both halves ship in one wheel. `widgets/src/lib/protocol.ts` is
generated from here. Metric rows travel beside a `frame` as one buffer of float64, column after column, NaN where a row
lacks a metric.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rlhf_nb.protocol.events import Prediction, SampleItem, State


class Message(BaseModel):
    # What the kernel sends is complete, so a view need not know the defaults.
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


# -- the panel, kernel to view -----------------------------------------------------------------------------------------


class Status(Message):
    """The header line, and what the buttons may do."""

    kind: Literal["status"] = "status"
    run_id: str
    title: str
    method: str
    state: State
    stage: str = ""
    step: int = 0
    max_steps: int | None = None
    steps_per_s: float | None = None
    eta_s: float | None = None
    seconds: float | None = None
    """Run time, from its start to its end or to now."""
    attempt: int = 1
    device: str = ""
    world_size: int | None = None
    warm: bool = False
    watching: int = 0
    """Browser pages that hold this panel."""
    has_reference: bool = False
    failure: str = ""
    """How it died, one line."""
    failure_log: list[str] = []
    trouble: str = ""
    """Why the kernel cannot reach the run just now, one line."""
    notices: list[str] = []
    checkpoint_step: int | None = None
    model_saved: bool = False
    rows: int = 0
    """Metric rows the kernel holds; a view with fewer is behind."""
    generation: int = 0
    now: float = 0.0
    """Unix seconds at the kernel, so that "ago" does not depend on two clocks."""


class Slider(Message):
    name: str
    low: float
    high: float
    scale: Literal["linear", "log"]
    unit: str = ""
    meaning: str = ""
    value: float
    """In effect."""
    asked: float | None = None
    """Asked of the run and not yet in effect."""
    unavailable_reason: str | None = None
    can_preview: bool = False


class Change(Message):
    """A coefficient that a person moved."""

    id: str
    name: str
    old: float
    new: float
    step: int
    """First optimizer step that used the new value."""
    who: str = ""
    why: str = ""
    t: float = 0.0
    cell: str = ""
    """The same as a cell; empty where it followed from another."""
    follows: str = ""
    """The change it came with: kl_coef set by hand switches its controller off."""


class HumanPoint(Message):
    """Blind labels of policy against reference, drawn at one step's samples."""

    step: int
    win_rate: float
    low: float
    high: float
    n: int


class Controls(Message):
    kind: Literal["controls"] = "controls"
    sliders: list[Slider]
    changes: list[Change]
    human: list[HumanPoint] = []
    sample_steps: list[int] = []
    """Optimizer steps at which samples were taken."""
    can_label: bool = False


class Figure(Message):
    """A Bokeh figure for one metric, or for the tether view (`metric` is then empty)."""

    id: str
    metric: str = ""
    label: str = ""
    glossary: str = ""
    unit: str = ""
    series: dict[str, list[str]] = {}
    """For a figure of several metrics: the part each plays, and its candidates, best first."""
    item: dict[str, Any]


class Figures(Message):
    """All figures so far; a view adds those it does not have."""

    kind: Literal["figures"] = "figures"
    figures: list[Figure]


class Frame(Message):
    """Metric rows `first` … `first + n − 1` of a generation. The first column is `step`."""

    kind: Literal["frame"] = "frame"
    generation: int
    first: int
    n: int
    columns: list[str]


class Asset(Message):
    """A script of an installed wheel, as a buffer; asked for once per page."""

    kind: Literal["asset"] = "asset"
    name: Literal["bokeh"]
    version: str


class ShownSamples(Message):
    kind: Literal["samples"] = "samples"
    step: int
    items: list[SampleItem]


class Foreseen(Message):
    """Where the run would settle at other values of a coefficient, each a row of equal place."""

    kind: Literal["foreseen"] = "foreseen"
    name: str
    step: int
    now: float
    reward: float
    kl: float
    samples: int
    """Completions of each prompt."""
    enough: float
    """Effective completions below which a row is no prediction."""
    predictions: list[Prediction]


class LogLines(Message):
    kind: Literal["log"] = "log"
    lines: list[str]


class Said(Message):
    """An answer to something a person did: what was asked, or why not; with the cell that does the same."""

    kind: Literal["said"] = "said"
    level: Literal["info", "error"] = "info"
    text: str
    cell: str = ""
    unforeseen: str = ""
    """The coefficient whose preview is refused by this; empty for all else."""


# -- labelling, kernel to view -----------------------------------------------------------------------------------------


class PairShown(Message):
    """A pair whose sides the kernel has already randomised; the view never learns which is which."""

    task_id: int
    prompt: str
    a: str
    b: str


class LabelQueue(Message):
    """Where an annotator stands in a queue."""

    kind: Literal["label_queue"] = "label_queue"
    title: str
    annotator: str
    done: int
    total: int
    seconds_per_label: float | None = None
    can_undo: bool = False
    task: PairShown | None = None
    """None when the queue is done."""
    summary: str = ""
    """One line for the end of the queue."""


class LabelSaved(Message):
    """The answer is committed; the queue goes on."""

    kind: Literal["label_saved"] = "label_saved"
    client_id: str
    queue: LabelQueue


class LabelFailed(Message):
    """Nothing was written; sending the same `client_id` again is safe."""

    kind: Literal["label_failed"] = "label_failed"
    client_id: str
    text: str


KernelMessage = Annotated[
    Status
    | Controls
    | Figures
    | Frame
    | Asset
    | ShownSamples
    | Foreseen
    | LogLines
    | Said
    | LabelQueue
    | LabelSaved
    | LabelFailed,
    Field(discriminator="kind"),
]


# -- view to kernel ----------------------------------------------------------------------------------------------------


class Hello(Message):
    """A page holds this widget and `have` rows of a generation; the answer is everything it lacks."""

    kind: Literal["hello"] = "hello"
    page: str
    have: int = 0
    generation: int = -1
    figures: int = 0
    """Figures it has."""


class Alive(Message):
    """Still there: `watching` counts the pages that said so lately."""

    kind: Literal["alive"] = "alive"
    page: str


class Bye(Message):
    kind: Literal["bye"] = "bye"
    page: str


class WantAsset(Message):
    kind: Literal["want_asset"] = "want_asset"
    name: Literal["bokeh"]


class WantLog(Message):
    kind: Literal["want_log"] = "want_log"
    lines: int = 200


class WantSamples(Message):
    kind: Literal["want_samples"] = "want_samples"
    step: int | None = None
    """None for the newest."""


class SetAsked(Message):
    kind: Literal["set"] = "set"
    name: str
    value: float
    why: str = ""


class PreviewAsked(Message):
    """Where would other values lead? Nothing is changed."""

    kind: Literal["preview"] = "preview"
    name: str
    values: list[float]


class Command(Message):
    kind: Literal["command"] = "command"
    op: Literal["pause", "resume", "stop", "checkpoint"]


class LabelStart(Message):
    """Draw blind pairs from the newest samples, or go on with those drawn."""

    kind: Literal["label_start"] = "label_start"


class LabelSubmitted(Message):
    kind: Literal["label_submitted"] = "label_submitted"
    task_id: int
    client_id: str
    choice: Literal["a", "b", "tie", "skip"]
    ms: float
    """From the pair's display to the answer."""
    rubric: list[str] = []


class LabelUndone(Message):
    """Take back the newest answer and show its pair again."""

    kind: Literal["label_undone"] = "label_undone"
    client_id: str


ViewMessage = Annotated[
    Hello
    | Alive
    | Bye
    | WantAsset
    | WantLog
    | WantSamples
    | SetAsked
    | PreviewAsked
    | Command
    | LabelStart
    | LabelSubmitted
    | LabelUndone,
    Field(discriminator="kind"),
]

KERNEL_MESSAGES: TypeAdapter[KernelMessage] = TypeAdapter(KernelMessage)
VIEW_MESSAGES: TypeAdapter[ViewMessage] = TypeAdapter(ViewMessage)


def parse_view_message(content: dict[str, Any]) -> ViewMessage:
    return VIEW_MESSAGES.validate_python(content)
