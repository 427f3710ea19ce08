"""`Workspace`: where labels, data, models and runs are kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import AttachError, NotFoundError, RlhfError, SpecError, did_you_mean
from rlhf_nb.protocol.events import TERMINAL, AnyEvent, RewardReplaced
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import BlobData, FunctionReward, RunSpec, describe, parents_of
from rlhf_nb.verbs import Verbs

if TYPE_CHECKING:
    from rlhf_nb.compute.client import AttachInfo, Client
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.run import Run
    from rlhf_nb.stages.tables import Table
    from rlhf_nb.store import Store

DEFAULT_TARGET = "rlhf-workspace"
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


class Workspace(Verbs):
    """A directory with its database, or a PostgreSQL URL a team shares. A context manager.

        with rl.Workspace("project") as ws:
            ws.attach("local")
            run = ws.train(rl.SFT(), base="toy", data="toy-demonstrations")
            run.wait()

    Closing it leaves the runs going: they are beside the accelerator, not here.
    """

    def __init__(self, target: str | Path = DEFAULT_TARGET) -> None:
        from rlhf_nb.store import Store

        self.store: Store = Store.open(target)
        self.directory: Path | None = self.store.directory
        self.id: str = self.store.workspace_id
        self.reward_functions: dict[str, FunctionReward] = {}
        self._client: Client | None = None
        self._attach_flags = ""
        self._lock = threading.RLock()
        self._runs: dict[str, Run] = {}
        self._specs: dict[str, RunSpec] = {}
        self._indexed: dict[str, int] = {}
        self._load_reward_functions()

    @property
    def who(self) -> str:
        """The person, for provenance: the hub's user name where there is one."""
        from rlhf_nb.store.database import default_who

        return os.environ.get("JUPYTERHUB_USER") or default_who()

    @property
    def location(self) -> str:
        return self.store.location

    @property
    def runs_root(self) -> Path | None:
        """Where a local attach keeps runs; None for a database URL, where the compute host decides."""
        return self.directory / "runs" if self.directory is not None else None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach and close the database. Runs go on."""
        self.detach()
        self.store.close()

    def __repr__(self) -> str:
        return f"<Workspace {self.location} · {self.attached or 'nothing attached'}>"

    # -- compute ------------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> AttachInfo | None:
        return self._client.info if self._client is not None else None

    def attach(
        self, target: Any = "local", *, launch: str = "", standby: bool = True, replace: bool = False
    ) -> AttachInfo:
        """Start or find the Jupyter kernel beside the accelerator, and keep one warm worker there.

        Args:
            target: "local", `rl.Server(...)` or `rl.KernelFile(...)`.
            launch: Flags for `accelerate launch`, for every run of this attach: `--num_processes 2`.
            standby: Keep a worker that has imported everything, so that a run starts at once.
            replace: Take the place of what is attached now. Runs there go on.

        Raises:
            AttachError: Something is attached already, or the kernel did not come up.
        """
        from rlhf_nb.stages.attach import attach

        with self._lock:
            if self._client is not None and not replace:
                raise AttachError(
                    f"{self._client.info.name} is attached already and stays; "
                    "%rlhf attach ... --replace (replace=True) takes another, and its runs go on"
                )
            client = attach(self, target, launch=launch, standby=standby)
            if self._client is not None:
                self._client.close()
            self._client, self._attach_flags = client, launch
        self.audit("attach", client.info.name, {"launch": launch})
        return client.info

    def detach(self) -> None:
        """Let go of the attached compute. Runs go on; an idle standby ends."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    @property
    def client(self) -> Client:
        """The attached compute. After a kernel restart a directory workspace attaches again by itself, to steer."""
        with self._lock:
            if self._client is not None and not self._client.alive:
                self._client.close()
                self._client = None
            if self._client is None:
                if self.directory is None or not self.run_ids():
                    raise AttachError("nothing is attached; %rlhf attach local starts compute here")
                self.attach("local", standby=False)
            assert self._client is not None
            return self._client

    @property
    def launch_flags(self) -> str:
        return self._attach_flags

    # -- data ---------------------------------------------------------------------------------------------------------

    def import_data(
        self, source: str | Path, *, name: str, kind: str | None = None, split: str | None = None
    ) -> Dataset:
        """Read pairs, rankings, thumbs, prompts or demonstrations from a file, a saved data set or a hub id.

        The format is detected and said; unusable rows are dropped and counted. Of several splits, `split` names one;
        without it "train" is read where there is one.
        """
        from rlhf_nb.stages.import_data import import_data

        return import_data(self, source, name=name, kind=kind, split=split)

    def add_data(self, rows: Iterable[Mapping[str, Any]], *, name: str, kind: str, source: str = "") -> Dataset:
        """Keep rows made in Python under a name."""
        from rlhf_nb.stages.import_data import add_data

        return add_data(self, rows, name=name, kind=kind, source=source)

    def dataset(self, name: str) -> Dataset:
        """A data set by name: the workspace's, the toy world's, or the answers of a labelling queue.

        Raises:
            NotFoundError: No such name; the message suggests the nearest.
        """
        from rlhf_nb.stages.import_data import dataset

        return dataset(self, name)

    def keep_rows(
        self, rows: Iterable[Mapping[str, Any]], kind: str, name: str, *, origin: Dataset | None = None
    ) -> BlobData:
        """Rows by content hash, ready to travel. The data set that they are of, or were made from, is remembered."""
        rows = list(rows)
        kept = BlobData(content_hash=self.store.put_rows(rows), row_kind=kind, n=len(rows), name=name)
        if origin is not None:
            from rlhf_nb.stages.lineage import note_origin

            note_origin(self, name, kept.content_hash, origin)
        return kept

    # -- runs ---------------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        """A run's handle by id, from any process.

        Raises:
            NotFoundError: No such run; the message suggests the nearest.
        """
        from rlhf_nb.run import Run

        with self._lock:
            if run_id not in self._runs:
                known = self.run_ids()
                if run_id not in known:
                    raise NotFoundError(
                        f'run "{run_id}" does not exist{did_you_mean(run_id, known)}  %rlhf runs lists them'
                    )
                self._runs[run_id] = Run(self, run_id)
            return self._runs[run_id]

    def run_ids(self) -> list[str]:
        """Every run this workspace knows: its index, and directories the index may have lost."""
        ids = [record.run_id for record in self.store.runs()]
        if self.runs_root is not None and self.runs_root.is_dir():
            found = sorted(path.parent.name for path in self.runs_root.glob("*/spec.json"))
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
                if self.runs_root is None or not (self.runs_root / run_id / "spec.json").exists():
                    raise NotFoundError(f'run "{run_id}" has no spec in this workspace; %rlhf runs lists runs')
                spec = RunDir(self.runs_root / run_id).spec()
                self._remember(spec)
                return spec
            self._specs[run_id] = RunSpec.model_validate(kept)
        return self._specs[run_id]

    def submit(self, spec: RunSpec) -> Run:
        """Send a finished spec and its rows to the attached compute."""
        client = self.client
        blobs = {
            d.content_hash: self.store.get_encoded(d.content_hash) for d in spec.data_sets if isinstance(d, BlobData)
        }
        client.submit(spec, blobs)
        self._remember(spec)
        self.audit("submit", spec.run_id, {"method": spec.method, "title": spec.title, "config": spec.config})
        for parent in spec.model_parents:
            self.store.add_lineage(spec.run_id, parent, "model")
        for data in spec.data_sets:
            self.store.add_lineage(spec.run_id, describe(data), "data")
        return self.run(spec.run_id)

    def _remember(self, spec: RunSpec) -> None:
        self._specs[spec.run_id] = spec
        self.store.add_run(
            spec.run_id, method=spec.method, spec=spec.model_dump(mode="json"), title=spec.title, state="waiting"
        )

    def state_of(self, run_id: str, fold: RunFold) -> str:
        """The state, from the events and, where they do not say, from the supervisor's phase."""
        return self.client.state(run_id, fold)

    def store_state(self, run_id: str) -> str:
        """The state the index last saw."""
        try:
            return self.store.run(run_id).state
        except NotFoundError:
            return "unknown"

    def index(self, run: Run, fold: RunFold, events: list[AnyEvent]) -> None:
        """Refill the workspace's index of a run from events just read; idempotent on (run, seq)."""
        done = self._indexed.get(run.id)
        if done is None:
            run.spec  # noqa: B018 - an index that was lost gets its row back
            done = self.store.run(run.id).last_seq
        fresh = [event for event in events if event.seq > done]
        if not fresh:
            self._indexed[run.id] = done
            return
        kept = [event.model_dump(mode="json") for event in fresh if event.kind not in ("metric", "samples")]
        # First, since it may be done twice: once the events are kept nobody comes back to them.
        for event in fresh:
            for parent in parents_of(event.new) if isinstance(event, RewardReplaced) else ():
                self.store.add_lineage(run.id, parent, "model")
        audited = {
            e.seq: (e.kind, getattr(e, "who", "") or self.who, e.model_dump(mode="json", exclude={"log_tail"}))
            for e in fresh
            if e.kind in _AUDITED
        }
        self.store.add_events(run.id, kept, audited=audited)
        summary: dict[str, Any] = {"step": fold.step, "max_steps": fold.max_steps}
        if fold.rows:
            summary["metrics"] = fold.rows[-1].values
        changes: dict[str, Any] = {"state": fold.state, "last_seq": fresh[-1].seq, "summary": summary}
        if fold.model is not None:
            self.store.add_model(run.id, fold.model.path, run_id=run.id, content_hash=fold.model.content_hash)
        if fold.state in TERMINAL:
            import datetime

            ended = fold.ended_at or 0.0
            changes["finished"] = datetime.datetime.fromtimestamp(ended, datetime.UTC).isoformat()
        self.store.update_run(run.id, **changes)
        self._indexed[run.id] = fresh[-1].seq

    def audit(self, action: str, subject: str, detail: dict[str, Any]) -> None:
        self.store.append_audit(action, subject, detail, self.who)

    # -- rewards ------------------------------------------------------------------------------------------------------

    def reward_function(self, name: str, function: Callable[..., Any] | str) -> FunctionReward:
        """Keep a reward under a name: a function, or its source.

        Raises:
            SpecError: It cannot travel: a lambda, a closure, a name it does not import. Or a registered reward has its
                name.
        """
        from rlhf_nb import registry
        from rlhf_nb.stages.resolve import function_reward, reward_from_source

        if name in registry.rewards:
            raise SpecError(f"reward-function {name}: a registered reward is called so; give another name")
        reward = reward_from_source(function, name) if isinstance(function, str) else function_reward(function, name)
        self.reward_functions[name] = reward
        if self.directory is not None:
            folder = self.directory / "rewards"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.py").write_text(reward.source, encoding="utf-8")
        self.audit("reward-function", name, {"source": reward.source})
        return reward

    def _load_reward_functions(self) -> None:
        if self.directory is None or not (self.directory / "rewards").is_dir():
            return
        for path in sorted((self.directory / "rewards").glob("*.py")):
            self.reward_functions[path.stem] = FunctionReward(name=path.stem, source=path.read_text(encoding="utf-8"))

    # -- tables -------------------------------------------------------------------------------------------------------

    def status(self) -> Table:
        """What is attached, which workspace, its runs and their state: what `%rlhf` prints."""
        from rlhf_nb.stages.tables import status

        return status(self)

    def runs(self) -> Table:
        from rlhf_nb.stages.tables import runs

        return runs(self)

    def models(self) -> Table:
        from rlhf_nb.stages.tables import models

        return models(self)

    def datasets(self) -> Table:
        from rlhf_nb.stages.tables import datasets

        return datasets(self)


_current: Workspace | None = None


def current() -> Workspace:
    """The workspace the magics use: the one set last, or `./rlhf-workspace/`, opened at first use."""
    global _current
    if _current is None:
        _current = Workspace(DEFAULT_TARGET)
    return _current


def opened() -> Workspace | None:
    """The current workspace if one is open; opens none."""
    return _current


def use(workspace: Workspace | None) -> None:
    """Make a workspace current, closing the one before."""
    global _current
    if _current is not None and _current is not workspace:
        try:
            _current.close()
        except RlhfError:
            pass  # a workspace whose disk is gone must not keep the next one from opening
    _current = workspace
