"""What every test gets: an offline, isolated environment, the shared public data, and a guard against leftovers.

The environment is set at import, before any test module imports datasets, transformers or Jupyter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Kept short: ipc sockets live under it, and a Unix socket's path may not exceed 107 bytes.
SCRATCH = Path(tempfile.mkdtemp(prefix="rlhf-"))

# Every process that a test starts inherits this, detached ones included, so that the guard finds what init adopted.
MARK = "RLHF_NB_TEST_SESSION"
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_XDIST_WORKER:
    os.environ[MARK] = uuid.uuid4().hex

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A developer's own Jupyter settings, kernels, profile and caches neither help nor suffer.
for variable, folder in {
    "HF_HOME": "hf",
    "IPYTHONDIR": "ipython",
    "JUPYTER_CONFIG_DIR": "config",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "run",
    "RLHF_NB_RUNS": "runs",
}.items():
    os.environ[variable] = str(SCRATCH / folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public data sets: RLHF_NB_DATA, by default ../shared/data beside the repository.

    Without it the test is skipped and says so; under CI=true it fails, so that a green run means it ran.
    """
    path = Path(os.environ.get("RLHF_NB_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not path.is_dir():
        reason = f"no public data at {path}; set RLHF_NB_DATA to a folder that holds prefs/, lm/, ..."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


deselected_gpu = pytest.StashKey[int]()
leftovers = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if torch.cuda.is_available():
        return
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.stash[deselected_gpu] = len(gpu)
    config.hook.pytest_deselected(items=gpu)


def _left_running(patience_s: float = 10.0) -> list[psutil.Process]:
    """Children of this process and processes that carry this session's mark, after giving them time to end."""
    deadline = time.monotonic() + patience_s
    while True:
        found = [process for process in _candidates() if not _is_bookkeeping(process)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _candidates() -> Iterator[psutil.Process]:
    me = psutil.Process()
    children = {child.pid for child in me.children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.pid == me.pid or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid in children or process.environ().get(MARK) == os.environ[MARK]:
                yield process
        except psutil.Error:
            continue


def _is_bookkeeping(process: psutil.Process) -> bool:
    """multiprocessing's own tracker and xdist's workers live as long as the session's interpreter."""
    try:
        return any("resource_tracker" in part or "exec(eval(sys.stdin" in part for part in process.cmdline())
    except psutil.Error:
        return True


def _describe(process: psutil.Process) -> str:
    try:
        return f"pid {process.pid}, parent {process.ppid()}: {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"pid {process.pid}"


def _minutes(reporter: pytest.TerminalReporter) -> list[tuple[str, float]]:
    """Of each folder of tests, fixtures included, the longest first."""
    took: dict[str, float] = {}
    for reports in reporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                suite = report.nodeid.split("/")[1] if "/" in report.nodeid else report.nodeid
                took[suite] = took.get(suite, 0.0) + report.duration / 60
    return sorted(took.items(), key=lambda item: -item[1])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not IS_XDIST_WORKER and (found := _left_running()):
        session.config.stash[leftovers] = [_describe(process) for process in found]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(SCRATCH, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if len(took := _minutes(terminalreporter)) > 1:
        terminalreporter.section("minutes of each suite, added over processes")
        terminalreporter.line(", ".join(f"{suite} {minutes:.1f}" for suite, minutes in took))
    if count := config.stash.get(deselected_gpu, 0):
        terminalreporter.section("GPU")
        terminalreporter.line(f"{count} gpu tests not run: torch sees no CUDA device here")
    if lines := config.stash.get(leftovers, []):
        terminalreporter.section("processes left running by tests", red=True)
        for line in lines:
            terminalreporter.line(line)
        terminalreporter.line("the session fails: end what a test starts", red=True)


# --- jobs beside the accelerator, on a model small enough to train in a second ----------------------------------------


def save_tiny_model(directory: Path, *, dropout: float = 0.1, **settings: object) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template, in ordinary Hugging Face format.

    It has dropout, so that a loss trace shows whether anything touched the random state.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<end>", "<user>", "<assistant>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% if m.role == 'assistant' %}<end>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 512, "attention_dropout": dropout,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    return save_tiny_model


@pytest.fixture
def tiny_model_maker(tmp_path: Path) -> Callable[..., Path]:
    """Makes variants: `tiny_model_maker("wide", hidden_size=64)`."""
    return lambda name, **settings: save_tiny_model(tmp_path / name, **settings)


class Job:
    """Runs a job of the worker in this process, as one rank, in a run directory under `root`."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model

    def prepare(
        self,
        method: str,
        rows: list[dict] | str,
        *,
        name: str = "run",
        kind: str = "",
        config: dict | None = None,
        **spec,
    ):
        """Write the run directory; the rows travel as a blob, as they do from a notebook."""
        from rlhf_nb import registry
        from rlhf_nb.compute.rundir import RunDir
        from rlhf_nb.data.rows import content_hash, encode_rows
        from rlhf_nb.protocol.spec import BlobData, NamedData, PathModel, RunSpec

        cls = registry.methods.get(method)
        if isinstance(rows, str):
            data = NamedData(name=rows)
        else:
            digest = content_hash(rows)
            (self.root / f"{digest}.jsonl").write_bytes(encode_rows(rows))
            data = BlobData(content_hash=digest, row_kind=kind or cls.rows, n=len(rows), name="mine")
        spec.setdefault("policy", PathModel(path=str(self.model)))
        place = RunDir(self.root / name)
        config = cls.create(**(config or {})).model_dump(mode="json")
        place.create(
            RunSpec(run_id=name, workspace_id="w", method=method, config=config, data=data, created=0.0, **spec)
        )
        return place

    def run(self, place, *, attempt: int = 1, resume_from: Path | None = None):
        from rlhf_nb.training import job

        job.run(
            place.path,
            blobs=self.root,
            runs_root=self.root,
            rank=0,
            world_size=1,
            warm=False,
            attempt=attempt,
            resume_from=resume_from,
        )
        return place

    def __call__(self, method: str, rows: list[dict] | str, **kwargs):
        return self.run(self.prepare(method, rows, **kwargs))


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Job:
    return Job(tmp_path, tiny_model)


def metric(place, name: str) -> dict[int, float]:
    """One metric by optimizer step."""
    return {e.step: e.values[name] for e in place.events() if e.kind == "metric" and name in e.values}


@pytest.fixture
def trace() -> Callable[..., dict[int, float]]:
    return metric


@pytest.fixture(scope="session")
def job_class() -> type[Job]:
    return Job
