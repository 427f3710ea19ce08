"""`RunIndex`: what a workspace knows of its runs without asking the compute they are on."""

from __future__ import annotations

import datetime
import platform
import warnings
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import ElsewhereError, NotFoundError, RlhfError
from rlhf_nb.protocol.events import TERMINAL, AnyEvent, RewardReplaced
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import RunSpec, describe, parents_of

if TYPE_CHECKING:
    from rlhf_nb.compute.client import Client
    from rlhf_nb.run import Run
    from rlhf_nb.store.records import RunRecord
    from rlhf_nb.workspace import Workspace

ARRIVES_S = 600.0
"""After so long a run that its compute does not list will not come there: longer than rows travel or clocks differ."""
_AUDITED = frozenset(
    {
        "coefficient_changed",
        "reward_replaced",
        "checkpoint_saved",
        "model_saved",
        "data_saved",
        "finished",
        "stopped",
        "failed",
    }
)


class RunIndex:
    """Rows in the store, filled again from the runs' own events wherever they were lost."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.store = workspace, workspace.store
        self._specs: dict[str, RunSpec] = {}
        self._indexed: dict[str, int] = {}

    def ids(self) -> list[str]:
        """Every run this workspace knows: its index, and directories the index may have lost."""
        ids = [record.run_id for record in self.store.runs()]
        if self.workspace.runs_root is not None and self.workspace.runs_root.is_dir():
            found = sorted(path.parent.name for path in self.workspace.runs_root.glob("*/spec.json"))
            ids += [run_id for run_id in found if run_id not in ids]
        return ids

    def spec(self, run_id: str) -> RunSpec:
        if run_id not in self._specs:
            from rlhf_nb.compute.rundir import RunDir

            try:
                kept = self.store.run(run_id).spec
            except NotFoundError:
                kept = None
            if kept is None:
                if self.workspace.runs_root is None or not (self.workspace.runs_root / run_id / "spec.json").exists():
                    raise NotFoundError(f'run "{run_id}" has no spec in this workspace; %rlhf runs lists runs')
                spec = RunDir(self.workspace.runs_root / run_id).spec()
                self.remember(spec)
                return spec
            self._specs[run_id] = RunSpec.model_validate(kept)
        return self._specs[run_id]

    def state(self, run_id: str) -> str:
        """The state the index last saw."""
        try:
            return self.store.run(run_id).state
        except NotFoundError:
            return "unknown"

    def remember(self, spec: RunSpec, client: Client | None = None, state: str = "waiting") -> None:
        self.store.add_run(
            spec.run_id,
            method=spec.method,
            spec=spec.model_dump(mode="json"),
            title=spec.title,
            state=state,
            attach=client.info.name if client else None,
            place=f"{client.info.runs_root}/{spec.run_id}" if client else None,
            summary={"host": client.info.host} if client else None,
        )
        self._specs[spec.run_id] = spec

    def forget_unless_there(self, spec: RunSpec, client: Client) -> None:
        """A run that was refused gives its row back, not its number. Where nobody can say, the row stays."""
        try:
            refused = client.spec(spec.run_id) != spec
        except NotFoundError:
            refused = True
        except RlhfError:
            refused = False
        if refused:
            self.store.forget_run(spec.run_id)
            del self._specs[spec.run_id]

    def link(self, spec: RunSpec) -> None:
        for parent in spec.model_parents:
            self.store.add_lineage(spec.run_id, parent, "model")
        for data in spec.data_sets:
            self.store.add_lineage(spec.run_id, describe(data), "data")

    def match(self, client: Client) -> None:
        """Enter runs of this workspace that only the compute knows; take back those that never came there."""
        known = set(self.ids())
        # Read before the compute is asked: of a run that is sent in between, it would know nothing yet.
        waiting = self.store.runs(state="waiting")
        if self.workspace.runs_root is not None and client.launcher.is_local:
            there = {path.parent.name for path in self.workspace.runs_root.glob("*/spec.json")}
        else:
            try:
                rows = client.runs()
                for row in rows:
                    if row["workspace_id"] == self.workspace.id and row["run_id"] not in known:
                        spec = RunSpec.model_validate(row["spec"])
                        self.remember(spec, client, row["state"])
                        self.link(spec)
            except (RlhfError, ValueError) as error:
                # A run that a newer version began, say: what is attached is attached all the same.
                said = str(error).splitlines()[0]
                warnings.warn(f"{client.info.name} is attached; its runs could not be listed: {said}", stacklevel=3)
                return
            there = {row["run_id"] for row in rows}
        until = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ARRIVES_S)
        for record in waiting:
            late = datetime.datetime.fromisoformat(record.created) <= until
            if late and record.run_id not in there and record.last_seq < 0 and self._was_sent_to(record, client):
                self.store.forget_run(record.run_id)

    def refill(self, run: Run, fold: RunFold, events: list[AnyEvent], client: Client | None) -> None:
        """A run's row, models and audit from events just read; idempotent on (run, seq).

        Args:
            client: Of the compute on which they were read, for a run whose row is lost.
        """
        done = self._indexed.get(run.id)
        if done is None:
            spec = run.spec  # an index that was lost gets its row back
            try:
                done = self.store.run(run.id).last_seq
            except NotFoundError:
                self.remember(spec, client)
                done = self.store.run(run.id).last_seq
        fresh = [event for event in events if event.seq > done]
        if not fresh:
            self._indexed[run.id] = done
            return
        kept = [event.model_dump(mode="json") for event in fresh if event.kind not in ("metric", "samples")]
        audited = {
            e.seq: (
                e.kind,
                getattr(e, "who", "") or self.workspace.who,
                e.model_dump(mode="json", exclude={"log_tail"}),
            )
            for e in fresh
            if e.kind in _AUDITED
        }
        # All that may be done twice comes first: once the events are kept nobody comes back to them.
        for event in fresh:
            for parent in parents_of(event.new) if isinstance(event, RewardReplaced) else ():
                self.store.add_lineage(run.id, parent, "model")
        summary: dict[str, Any] = {"step": fold.step, "max_steps": fold.max_steps}
        if fold.rows:
            summary["metrics"] = fold.rows[-1].values
        changes: dict[str, Any] = {"state": fold.state, "summary": summary}
        if fold.model is not None:
            self.store.add_model(run.id, fold.model.path, run_id=run.id, content_hash=fold.model.content_hash)
        if fold.state in TERMINAL:
            ended = fold.ended_at or 0.0
            changes["finished"] = datetime.datetime.fromtimestamp(ended, datetime.UTC).isoformat()
        try:
            self.store.update_run(run.id, **changes)
        except NotFoundError:
            # Its row was taken back, and here are its events.
            self.remember(run.spec, client)
            self.store.update_run(run.id, **changes)
        self.store.add_events(run.id, kept, audited=audited, last_seq=fresh[-1].seq)
        self._indexed[run.id] = fresh[-1].seq

    def elsewhere(self, run_id: str, client: Client | None) -> ElsewhereError:
        """What is said of a run that the attached compute, if there is one, does not have."""
        from rlhf_nb.stages.attach import line

        name = client.info.name if client is not None else "what is attached"
        try:
            record = self.store.run(run_id)
        except NotFoundError:
            return ElsewhereError(f"{run_id} is not on {name}, and this workspace does not know where it is")
        seen = f"{run_id} is not on {name}, the attached compute; it was last seen {record.state}"
        if record.attach is None:
            return ElsewhereError(seen)
        host = record.summary.get("host")
        if record.attach == name and client is not None:
            if host in (None, client.info.host) or self._was_sent_to(record, client):
                return ElsewhereError(f"{seen} there, and its directory {record.place} is gone")
            return ElsewhereError(f"{seen} on {record.attach} of {host}, and what is attached is on {client.info.host}")
        at = [one.info for one in self.store.attaches() if one.target == record.attach and "launcher" in one.info]
        way = line(at[-1]["launcher"], at[-1]["launch"]) if at else "%rlhf attach ..."
        local = bool(at) and at[-1]["launcher"]["kind"] == "local" and self.workspace.runs_root is None
        if local and host not in (None, platform.node()):
            return ElsewhereError(f"{seen} on {record.attach} of {host}; {way} there attaches that")
        return ElsewhereError(f"{seen} on {record.attach}; {way} --replace attaches that")

    def _was_sent_to(self, record: RunRecord, client: Client) -> bool:
        """Whether a run was sent to the compute that is attached; `local` has one name on every host."""
        if (record.attach, record.place) != (client.info.name, f"{client.info.runs_root}/{record.run_id}"):
            return False
        beside = self.workspace.runs_root is not None and client.launcher.is_local
        return beside or record.summary.get("host") == client.info.host
