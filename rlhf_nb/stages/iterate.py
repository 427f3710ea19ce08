"""iterate: rounds of sample → label → train, the policy of each round the start of the next.

Iterative DPO: Xu et al. 2023, arXiv:2312.16682; Yuan et al. 2024, arXiv:2401.10020; Dong et al. 2024, arXiv:2405.07863.
Each round's reference is the policy it starts from, so that the tether moves along.

Nothing of it lives in memory. The plan is kept in the workspace under the iteration's name, and a round is its runs,
known by their titles: any process finds an iteration where it is, and submits what is still missing. With a reward or a
judge all rounds are submitted at once, each run waiting for the one before, with no notebook open. Where people label,
a round stops for them.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_nb import registry
from rlhf_nb.errors import NotFoundError, SpecError, UnavailableError, did_you_mean
from rlhf_nb.feedback.constitution import Constitution
from rlhf_nb.methods.base import Method
from rlhf_nb.protocol.events import TERMINAL
from rlhf_nb.protocol.spec import (
    BlobData,
    DataRef,
    Frozen,
    JudgeRef,
    Launch,
    LoRA,
    MixedData,
    ModelRef,
    NamedData,
    RewardRef,
    RunSpec,
)
from rlhf_nb.stages.import_data import LABELS
from rlhf_nb.stages.judge import resolve_judge, resolve_principles
from rlhf_nb.stages.resolve import resolve_data, resolve_model, resolve_reward

if TYPE_CHECKING:
    from rlhf_nb.data.rows import Row
    from rlhf_nb.labelling.session import LabelSession
    from rlhf_nb.protocol.spec import RunModel
    from rlhf_nb.run import Run
    from rlhf_nb.stages.tables import Table
    from rlhf_nb.workspace import Workspace

_TITLE = "{name} · round {number} · {part}"
ROWS, LABELLED, POLICY = "rows", "labels", "policy"


class Plan(Frozen):
    """What an iteration does, with every reference resolved: another process needs nothing else to go on."""

    name: str
    method: str
    config: dict[str, Any]
    sampling: dict[str, Any]
    """Knobs of `generate`, without what a round sets."""
    policy: ModelRef
    prompts: tuple[DataRef, ...]
    """Of each round."""
    reward: RewardRef | None = None
    judge: JudgeRef | None = None
    """Neither: people label."""
    constitution: Constitution | None = None
    """As it was read at the start, with the principles that count: its file may change, and the rounds stay alike."""
    adapter: LoRA | None = None
    launch: str | None = None

    def title(self, number: int, part: str) -> str:
        return _TITLE.format(name=self.name, number=number, part=part)

    @property
    def rounds(self) -> int:
        return len(self.prompts)

    @property
    def by_people(self) -> bool:
        return self.reward is None and self.judge is None


@dataclass(frozen=True)
class Round:
    number: int
    rows: Run | None = None
    """Samples; None until it is submitted."""
    labels: Run | None = None
    """Where a judge labels: its answers, as pairs."""
    policy: Run | None = None
    """Trains on them."""


def iterate(
    workspace: Workspace,
    method: Method,
    *,
    policy: Any,
    prompts: Any,
    rounds: int = 3,
    reward: Any = None,
    judge: Any = None,
    constitution: Any = None,
    principle: str = "",
    n: int | None = None,
    prompts_per_round: int | None = None,
    adapter: LoRA | None = None,
    launch: str | None = None,
    name: str = "",
    **sampling: Any,
) -> Iteration:
    """Start an iteration, or go on with the one of that name; see `Workspace.iterate`."""
    if method.rows != "pairs":
        raise SpecError(
            f"iterate: {method.name} trains on {method.rows}, and a round makes pairs; give dpo, orpo or simpo"
        )
    if _NUMBER.fullmatch(name):
        raise SpecError(f'iterate: name="{name}" is what iterations without a name are counted by; give another')
    if rounds < 1:
        raise SpecError(f"iterate: rounds={rounds}: give 1 or more")
    for knob in ("keep", "drop_ties"):
        if knob in sampling:
            raise SpecError(f"iterate: {knob} is not yours to set: a round keeps the best and the worst of each prompt")
    if reward is not None and judge is not None:
        raise SpecError("iterate: reward and judge both order the completions; give one of them")
    if judge is None and (constitution is not None or principle):
        raise SpecError("iterate: a constitution or a principle is a judge's; give --judge")
    sampling = {"n": n if n is not None else 4 if reward is not None else 2, **sampling}
    checked = registry.methods.get("generate").create(**sampling)
    if checked.n < 2:
        raise SpecError(f"iterate: n={checked.n} completions of a prompt make no pair; give 2 or more")
    who = resolve_judge(workspace, judge, verb="iterate") if judge is not None else None
    data = resolve_data(workspace, prompts, verb="iterate", rows="prompts")
    plan = Plan(
        name=name,
        method=method.name,
        config=method.model_dump(mode="json"),
        sampling=sampling,
        policy=resolve_model(workspace, policy, verb="iterate", role="policy"),
        prompts=_shares(workspace, data, rounds, prompts_per_round, seed=checked.seed),
        reward=resolve_reward(workspace, reward, verb="iterate") if reward is not None else None,
        judge=who,
        constitution=resolve_principles(who, constitution, principle) if who is not None else None,
        adapter=adapter,
        launch=launch,
    )
    _check(workspace, method, plan)
    workspace.client  # noqa: B018 - raises where nothing is attached: no name is taken then
    return Iteration(workspace, _kept(workspace, plan)).advance()


def iteration(workspace: Workspace, name: str) -> Iteration:
    """An iteration by name, from any process; see `Workspace.iteration`."""
    names = [kept for kept in workspace.store.kept(_key("")) if not _NUMBER.fullmatch(kept)]
    if name not in names:
        raise NotFoundError(
            f'iteration "{name}" does not exist{did_you_mean(name, names)}  known: {", ".join(names) or "none"}'
        )
    return Iteration(workspace, Plan.model_validate_json(workspace.store.keep_first(_key(name), "")))


_NUMBER = re.compile(r"number \d+")
"""What is kept under these keys is which process counted so far, and no iteration."""


def _key(name: str) -> str:
    return f"iteration {name}"


def _kept(workspace: Workspace, plan: Plan) -> Plan:
    """The plan under its name: as given, or as it is kept already.

    Raises:
        SpecError: Another plan has the name.
    """
    if plan.name:
        found = Plan.model_validate_json(workspace.store.keep_first(_key(plan.name), plan.model_dump_json()))
        differing = [field for field in Plan.model_fields if getattr(found, field) != getattr(plan, field)]
        if differing:
            raise SpecError(
                f'iterate: "{plan.name}" exists with other settings ({", ".join(differing)}); give another name, or go '
                f'on with it by ws.iteration("{plan.name}")'
            )
        return found
    mine, number = uuid.uuid4().hex, 1
    # Two processes that count at once must not share a number.
    while workspace.store.keep_first(f"iteration number {number}", mine) != mine:
        number += 1
    named = plan.model_copy(update={"name": f"iterate-{number}"})
    return Plan.model_validate_json(workspace.store.keep_first(_key(named.name), named.model_dump_json()))


def _shares(
    workspace: Workspace, data: DataRef, rounds: int, each: int | None, *, seed: int
) -> tuple[NamedData | BlobData | Any, ...]:
    """The prompts of each round: all of them, or `each` in turn of one shuffled order, begun again at its end."""
    if isinstance(data, MixedData):
        raise SpecError("iterate: every prompt of a round is used once, so shares mean nothing; give one data set")
    if each is None:
        return (data,) * rounds
    if each < 1:
        raise SpecError(f"iterate: prompts_per_round={each}: give 1 or more, or leave it out to use all in each round")
    if isinstance(data, NamedData):
        rows = workspace.dataset(data.name).rows
    elif isinstance(data, BlobData):
        rows = workspace.store.get_rows(data.content_hash)
    else:
        raise SpecError("iterate: prompts_per_round needs the prompts now, and a run has yet to make them; wait for it")
    return tuple(
        workspace.keep_rows(part, "prompts", f"prompts of round {number}")
        for number, part in enumerate(take_turns(rows, rounds, each, seed=seed), start=1)
    )


def take_turns(rows: Sequence[Row], rounds: int, each: int, *, seed: int) -> list[list[Row]]:
    """`each` rows for every round, none twice before all had their turn; the prompts alone, with their columns."""
    order = list(range(len(rows)))
    random.Random(f"iterate {seed}").shuffle(order)
    each = min(each, len(order))
    return [[dict(rows[order[(k * each + i) % len(order)]]) for i in range(each)] for k in range(rounds)]


def _check(workspace: Workspace, method: Method, plan: Plan) -> None:
    """Refuse now what the training of a round would refuse after its labels were given."""
    method.check(
        RunSpec(
            run_id="",
            workspace_id=workspace.id,
            method=method.name,
            config=plan.config,
            policy=plan.policy,
            adapter=plan.adapter,
            launch=Launch.parse(workspace.launch_flags if plan.launch is None else plan.launch),
            created=0.0,
        )
    )


class Iteration:
    """A handle; it holds no truth. `ws.iteration(name)` gives it again."""

    def __init__(self, workspace: Workspace, plan: Plan) -> None:
        self.workspace, self.plan = workspace, plan

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def rounds(self) -> list[Round]:
        """Each with the runs that have been submitted."""
        found: dict[str, Run] = {}
        wanted = {
            self.plan.title(number, part): (number, part)
            for number in range(1, self.plan.rounds + 1)
            for part in (ROWS, LABELLED, POLICY)
        }
        for run_id in self.workspace.run_ids():
            title = self.workspace.spec(run_id).label_as
            if title in wanted:
                # Two processes that went on at once may have submitted it twice: the first counts.
                found.setdefault(title, self.workspace.run(run_id))
        return [
            Round(number, *(found.get(self.plan.title(number, part)) for part in (ROWS, LABELLED, POLICY)))
            for number in range(1, self.plan.rounds + 1)
        ]

    @property
    def runs(self) -> list[Run]:
        """Those submitted so far, in the order in which they run."""
        return [run for each in self.rounds for run in (each.rows, each.labels, each.policy) if run is not None]

    @property
    def model(self) -> RunModel:
        """The last round's policy, usable before it exists.

        Raises:
            UnavailableError: Its training has not been submitted yet.
        """
        last = self.rounds[-1].policy
        if last is None:
            raise UnavailableError(f"{self.name}: round {self.plan.rounds} has no policy yet: {self.state}")
        return last.model

    @property
    def state(self) -> str:
        """sampling | judging | labelling | training | finished | failed | stopped: of the first round not over."""
        for each in self.rounds:
            judged = ((each.labels, "judging"),) if self.plan.judge is not None else ()
            for run, doing in ((each.rows, "sampling"), *judged, (each.policy, "training")):
                if run is None:
                    return "labelling" if self._open_labels(each) else doing
                kept = run.state == "stopped" and (run.fold.model is not None or run.fold.data is not None)
                if run.state in ("failed", "stopped") and not kept:
                    return run.state
                if run.state not in TERMINAL:
                    return doing
        return "finished"

    def advance(self) -> Iteration:
        """Submit what can be submitted now, and no run twice. Returns at once."""
        workspace, plan = self.workspace, self.plan
        policy: Any = plan.policy
        method = registry.methods.get(plan.method).create(**plan.config)
        for each in self.rounds:
            rows = each.rows or self._sample(each.number, policy)
            trained = each.policy
            if trained is None:
                data: Any = rows
                if plan.judge is not None:
                    data = each.labels or workspace.judge(
                        rows,
                        judge=plan.judge,
                        constitution=plan.constitution,
                        launch=plan.launch,
                        title=plan.title(each.number, LABELLED),
                    )
                elif plan.by_people:
                    if self._open_labels(Round(each.number, rows)):
                        return self
                    data = workspace.dataset(rows.id + LABELS)
                trained = workspace.train(
                    method,
                    policy=policy,
                    data=data,
                    adapter=plan.adapter,
                    launch=plan.launch,
                    title=plan.title(each.number, POLICY),
                )
            policy = trained.model
        return self

    def _sample(self, number: int, policy: Any) -> Run:
        plan = self.plan
        kept = {"keep": "best_and_worst"} if plan.reward is not None else {}
        # Another round draws another chance, also of the same prompts.
        seed = int(plan.sampling.get("seed", 0)) + number - 1
        return self.workspace.generate(
            policy,
            prompts=plan.prompts[number - 1],
            reward=plan.reward,
            launch=plan.launch,
            title=plan.title(number, ROWS),
            **{**plan.sampling, **kept, "seed": seed},
        )

    # --- labels that people give --------------------------------------------------------------------------------------

    def _open_labels(self, each: Round) -> bool:
        """People have yet to compare pairs of a round, or there are none to compare yet."""
        if not self.plan.by_people or each.rows is None or each.policy is not None:
            return False
        queue = each.rows.id + LABELS
        if queue not in self.workspace.store.queues():
            return True
        answered = {label.task.id for label in self.workspace.store.labels(queue)}
        return len(answered) < len(self.workspace.store.tasks(queue))

    @property
    def rows_are_there(self) -> bool:
        """The round that waits for people has its completions."""
        waiting = next((each.rows for each in self.rounds if self._open_labels(each)), None)
        return waiting is not None and waiting.state in ("finished", "stopped")

    def label(self, annotator: str | None = None) -> LabelSession:
        """The pairs of the round that waits for people, to be compared; as `ws.label`.

        Raises:
            UnavailableError: No round waits for labels.
        """
        for each in self.rounds:
            if each.rows is not None and self._open_labels(each):
                if each.rows.state not in ("finished", "stopped"):
                    raise UnavailableError(
                        f"{self.name}: round {each.number} is still sampling ({each.rows.id} is {each.rows.state})"
                    )
                session = self.workspace.label(each.rows.id, annotator=annotator)
                self.workspace.store.add_lineage(each.rows.id + LABELS, each.rows.id, "data")
                return session
        raise UnavailableError(f"{self.name}: no round waits for labels; it is {self.state}")

    # --- the whole ----------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> Iteration:
        """Go on until it is over, or until people have to label.

        Raises:
            RunFailedError: A run failed; `resume()` goes on with it.
            WaitTimeoutError: Not over after `timeout` seconds; it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.advance()
            going = next((run for run in self.runs if run.state not in ("finished", "stopped")), None)
            if going is None:
                return self
            going.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def resume(self) -> Iteration:
        """Go on where it stopped: runs that failed continue from what they had, and what is missing is submitted."""
        for run in self.runs:
            if run.state == "failed":
                run.resume()
        return self.advance()

    def table(self) -> Table:
        """A line a round: its pairs, its policy, and what the policy it started from scored."""
        from rlhf_nb.stages.tables import Table

        rows = [self._line(each) for each in self.rounds]
        return Table(["round", "rows", "pairs", "score before", "policy", "state"], rows, lines=[repr(self)[1:-1]])

    def _line(self, each: Round) -> dict[str, Any]:
        source = each.labels if self.plan.judge is not None else each.rows
        made = source.fold.data if source is not None else None
        results = each.rows.fold.results if each.rows is not None else []
        score = next((result.value for result in results if result.detail.get("best_of") == 1), None)
        last = each.policy or each.rows
        return {
            "round": each.number,
            "rows": each.rows.id if each.rows else None,
            "pairs": made.rows if made is not None else None,
            "score before": f"{score:.3f}" if score is not None else None,
            "policy": each.policy.id if each.policy else None,
            "state": last.state if last else "not yet",
        }

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def __repr__(self) -> str:
        by = "people" if self.plan.by_people else "a judge" if self.plan.judge is not None else "a reward"
        return f"<{self.name}: {self.plan.rounds} rounds of {self.plan.method}, pairs by {by}; {self.state}>"
