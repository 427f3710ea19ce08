"""`Workspace`: where labels, data, models and runs are kept."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_nb.errors import AttachError, ElsewhereError, NotFoundError, RlhfError, SpecError, did_you_mean
from rlhf_nb.protocol.events import AnyEvent
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import BlobData, FunctionReward, RunSpec
from rlhf_nb.run_index import RunIndex
from rlhf_nb.verbs import Verbs

if TYPE_CHECKING:
    from rlhf_nb.compute.client import AttachInfo, Client, Subscription
    from rlhf_nb.data.dataset import Dataset
    from rlhf_nb.run import Run
    from rlhf_nb.stages.tables import Table
    from rlhf_nb.store import Store

DEFAULT_TARGET = "rlhf-workspace"
RETRY_S = 30.0
"""Between two tries to reach a compute that is lost: each may wait for the network."""


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
        self._attach_flags, self._standby = "", True
        self._detached = False
        """By a person, who then wants no kernel to come back by itself."""
        self._retry_at = 0.0
        self._orphans: list[Subscription] = []
        """Of the compute that was let go, for the one attached next: a panel goes on."""
        self._lock = threading.RLock()
        self._starting, self._reaching = threading.Lock(), threading.Lock()
        """Held while local compute is started, or a lost one reached; `_lock` never waits for either."""
        self._closed = False
        self._runs: dict[str, Run] = {}
        self.run_index = RunIndex(self)
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
        self._closed = True
        self.detach()
        self.store.close()

    def __repr__(self) -> str:
        return f"<Workspace {self.location} · {self.attached or 'nothing attached'}>"

    # -- compute ------------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> AttachInfo | None:
        """What is attached. None also where it is lost: `unattached` then says which it was."""
        client = self._client
        return client.info if client is not None and client.alive else None

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

        def free() -> None:
            if (info := self.attached) is not None and not replace:
                raise AttachError(
                    f"{info.name} is attached already and stays; "
                    "%rlhf attach ... --replace (replace=True) takes another, and its runs go on"
                )

        free()
        return self._attach(target, launch, standby, free).info

    def _attach(self, target: Any, launch: str, standby: bool, free: Callable[[], None]) -> Client:
        """Connect, which may wait long for the network, and only then take the place that `free` still finds free."""
        from rlhf_nb.stages.attach import attach, described

        client = attach(self, target, launch=launch, standby=standby)
        try:
            with self._lock:
                free()
                before = self._let_go()
                self._client, self._attach_flags, self._standby = client, launch, standby
                self._detached = False
                client.adopt(self._orphans)
                self._orphans = []
        except AttachError:
            client.close()
            raise
        if before is not None:
            before.close()
        info = {"launcher": described(client.launcher), "launch": launch, "who": self.who, "host": platform.node()}
        self.store.add_attach(client.info.name, info)
        self.audit("attach", client.info.name, {"launch": launch})
        self.run_index.match(client)
        return client

    def detach(self) -> None:
        """Let go of the attached compute, until `attach`. Runs go on; an idle standby ends."""
        with self._lock:
            self._detached = True
            before = self._let_go()
        if before is not None:
            before.close()

    def _let_go(self) -> Client | None:
        """What was attached, to be closed without the lock: a server that does not answer makes that slow."""
        before, self._client = self._client, None
        if before is not None:
            self._orphans += before.release()
        return before

    @property
    def client(self) -> Client:
        """The attached compute: what was lost, attached again. After a kernel restart a directory workspace attaches
        local again by itself, to steer, unless something else was attached last, or all was detached.

        Raises:
            AttachError: Nothing is attached, or what is lost cannot be reached, or somebody is about to reach it.
        """
        client = self._client
        if client is None:
            client = self._local_again()
        elif not client.alive:
            if not self._reaching.acquire(blocking=False):
                raise AttachError(self.unattached)
            try:
                client = self._reach_again(client)
            finally:
                self._reaching.release()
        return client

    def _local_again(self) -> Client:
        last = self._last_attach()
        elsewhere = last is not None and last["launcher"]["kind"] != "local"
        if self._detached or self.directory is None or not self.run_ids() or elsewhere:
            raise AttachError(self.unattached)
        # Of several panels that ask at once the first starts the kernel, and the others wait for it.
        with self._starting:
            return self._client or self._instead_of(None, "local", last["launch"] if last else "", standby=False)

    def _reach_again(self, lost: Client) -> Client:
        """Never another compute in its place: what is trained there would be trained here without a word."""
        if self._client is not lost:
            return self.client  # another thread was a moment faster
        if time.monotonic() < self._retry_at:
            raise AttachError(self.unattached)
        try:
            return self._instead_of(lost, lost.launcher, self._attach_flags, self._standby)
        except (RlhfError, OSError) as error:
            if self._client is not lost:
                raise  # attached again: it is the database that cannot be written
            self._retry_at = time.monotonic() + RETRY_S
            raise AttachError(f"{self.unattached} ({error})") from None

    def _instead_of(self, lost: Client | None, target: Any, launch: str, standby: bool) -> Client:
        """Attach again; what somebody attached or let go meanwhile stays so."""

        def free() -> None:
            if self._client is not lost or self._closed:
                raise AttachError(self.unattached)

        try:
            return self._attach(target, launch, standby, free)
        except AttachError:
            # Another answer came first, whether or not this one came at all.
            if (client := self._client) is not None and client is not lost and client.alive:
                return client
            raise

    def _last_attach(self) -> dict[str, Any] | None:
        """The launcher and flags of this person's newest attach, in whichever process; those from this host first."""
        who, host = self.who, platform.node()
        mine = [one.info for one in self.store.attaches() if one.info.get("who", who) == who]
        # A laptop or a container changes its name: what was attached under the old one is still better known than not.
        newest = ([info for info in mine if info.get("host", host) == host] or mine)[-1:]
        return newest[0] if newest and "launcher" in newest[0] else None

    @property
    def unattached(self) -> str:
        """Why nothing is attached, and what attaches it; one line."""
        from rlhf_nb.stages.attach import described, line

        if (lost := self._client) is not None:
            again = line(described(lost.launcher), self._attach_flags)
            return f"{lost.launcher.name} is lost, and runs there go on; {again} attaches it again"
        last = self._last_attach()
        if last is None or last["launcher"]["kind"] == "local":
            return "nothing is attached; %rlhf attach local starts compute here"
        again = line(last["launcher"], last["launch"])
        return f"nothing is attached; {again} attaches what was last, %rlhf attach local starts compute here"

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
        return self.run_index.ids()

    def spec(self, run_id: str) -> RunSpec:
        return self.run_index.spec(run_id)

    def submit(self, spec: RunSpec) -> Run:
        """Send a finished spec and its rows to the attached compute."""
        client = self.client
        blobs = {
            d.content_hash: self.store.get_encoded(d.content_hash) for d in spec.data_sets if isinstance(d, BlobData)
        }
        # Before it is sent: on a compute that is not here nobody would find a run of which only that side knows.
        self.run_index.remember(spec, client)
        try:
            client.submit(spec, blobs)
        except RlhfError:
            self.run_index.forget_unless_there(spec, client)
            raise
        # Another process that attached meanwhile may have taken it for one that never came there.
        self.run_index.remember(spec, client)
        self.audit("submit", spec.run_id, {"method": spec.method, "title": spec.title, "config": spec.config})
        self.run_index.link(spec)
        return self.run(spec.run_id)

    def state_of(self, run_id: str, fold: RunFold) -> str:
        """The state, from the events and, where they do not say, from the supervisor's phase."""
        return self.client.state(run_id, fold)

    def store_state(self, run_id: str) -> str:
        """The state the index last saw."""
        return self.run_index.state(run_id)

    def index(self, run: Run, fold: RunFold, events: list[AnyEvent]) -> None:
        """Keep what was just read of a run."""
        self.run_index.refill(run, fold, events, self._client)

    def elsewhere(self, run_id: str) -> ElsewhereError:
        """What is said of a run that the attached compute does not have."""
        client = self._client
        return self.run_index.elsewhere(run_id, client if client is not None and client.alive else None)

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
