"""How a run dies, and that it says so: real signals to real workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlhf_nb.compute.client import Client
from rlhf_nb.compute.rundir import RunDir
from rlhf_nb.compute.transports.local import LocalKernel
from rlhf_nb.protocol.events import Failed
from rlhf_nb.protocol.spec import Launch

from .conftest import BLOBS, end_all, ended, first_metric, new_root, toy_spec, until


def failed(client: Client, run_id: str) -> Failed:
    last = ended(client, run_id)
    assert isinstance(last, Failed)
    assert "\n" not in last.reason
    row = client.status(run_id)
    assert (row["state"], row["reason"]) == ("failed", last.reason)
    where = RunDir(Path(client.info.runs_root) / run_id)
    until(lambda: not where.alive(), 10, "every process of the run has left")
    seqs = [event.seq for event in client.events(run_id)]
    assert seqs == list(range(1, len(seqs) + 1))
    return last


def started_pids(client: Client, run_id: str) -> list[int]:
    first_metric(client, run_id)
    return next(event for event in client.events(run_id) if event.kind == "started").rank_pids


def test_a_killed_worker_is_a_failed_run_with_its_signal(attached_client: Client) -> None:
    spec = toy_spec(max_steps=100_000)
    attached_client.submit(spec, BLOBS)
    (pid,) = started_pids(attached_client, spec.run_id)
    os.kill(pid, signal.SIGKILL)
    last = failed(attached_client, spec.run_id)
    assert (last.signal, last.code, last.rank, last.out_of_memory) == ("SIGKILL", None, 0, False)
    assert last.reason == "rank 0 was ended by SIGKILL; no sign of an out-of-memory kill was found"


@pytest.mark.parametrize(
    ("die", "code", "signal_name", "reason"),
    [
        ("error", 1, None, "ValueError: the probe was told to fail"),
        ("exit", 3, None, "SystemExit: 3"),
        ("segv", None, "SIGSEGV", "rank 0 was ended by SIGSEGV"),
        ("leave", 0, None, "every rank left with exit code 0 but training had not ended; see its log"),
    ],
)
def test_a_worker_that_falls_says_how(
    attached_client: Client, die: str, code: int | None, signal_name: str | None, reason: str
) -> None:
    spec = toy_spec(die=die, step_s=0)
    attached_client.submit(spec, BLOBS)
    last = failed(attached_client, spec.run_id)
    assert (last.code, last.signal, last.reason) == (code, signal_name, reason)
    assert (last.rank, last.step) == (0, 3)


def test_a_memory_error_is_named_as_out_of_memory(attached_client: Client) -> None:
    spec = toy_spec(die="memory", step_s=0)
    attached_client.submit(spec, BLOBS)
    last = failed(attached_client, spec.run_id)
    assert last.out_of_memory
    assert last.oom_evidence == "MemoryError"
    assert last.reason == "MemoryError; out of memory (MemoryError): lower batch_size or max_length"
    assert any("MemoryError" in line for line in last.log_tail)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Client]:
    root = new_root()
    client = Client(LocalKernel(), runs_root=str(root), launch=Launch.parse("--num_processes 2"))
    try:
        yield client
    finally:
        client.close()
        end_all(root)


def test_two_ranks_are_two_ranks(two_ranks: Client) -> None:
    spec = toy_spec(max_steps=5, launch="--num_processes 2")
    two_ranks.submit(spec, BLOBS)
    assert ended(two_ranks, spec.run_id).kind == "finished"
    started = next(event for event in two_ranks.events(spec.run_id) if event.kind == "started")
    assert started.world_size == 2
    assert len(set(started.rank_pids)) == 2
    assert started.warm


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_rank_is_killed_all_end_and_it_is_named(two_ranks: Client, rank: int) -> None:
    spec = toy_spec(max_steps=100_000, launch="--num_processes 2")
    two_ranks.submit(spec, BLOBS)
    pids = started_pids(two_ranks, spec.run_id)
    os.kill(pids[rank], signal.SIGKILL)
    last = failed(two_ranks, spec.run_id)
    assert (last.rank, last.signal) == (rank, "SIGKILL")
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_error_on_the_second_rank_is_the_reason_though_the_first_falls_too(two_ranks: Client) -> None:
    spec = toy_spec(die="error", die_rank=1, launch="--num_processes 2")
    two_ranks.submit(spec, BLOBS)
    last = failed(two_ranks, spec.run_id)
    assert (last.rank, last.code) == (1, 1)
    assert last.reason == "rank 1: ValueError: the probe was told to fail"


def test_what_cannot_be_launched_has_failed_and_is_not_tried_for_ever(cold_client: Client) -> None:
    # As a file written by hand says it: `Launch.parse` refuses it.
    spec = toy_spec().model_copy(update={"launch": Launch(flags=("--num_processes", "two"))})
    cold_client.submit(spec, BLOBS)
    assert failed(cold_client, spec.run_id).reason.startswith("launch='--num_processes two' starts no process: invalid")


def test_a_world_of_another_size_fails_at_its_start(cold_client: Client, tmp_path: Path) -> None:
    # A configuration file for several CPU processes makes accelerate start one.
    config = tmp_path / "accelerate.yaml"
    lines = ("compute_environment: LOCAL_MACHINE", "distributed_type: MULTI_CPU", "num_processes: 2", "use_cpu: true")
    config.write_text("\n".join(lines))
    spec = toy_spec(launch=f"--config_file {config} --num_processes 2")
    cold_client.submit(spec, BLOBS)
    last = failed(cold_client, spec.run_id)
    assert last.reason.startswith("launch: 2 ranks were asked for and accelerate started 1; use --multi_gpu")
    assert not any(event.kind in ("started", "metric") for event in cold_client.events(spec.run_id))


def test_a_flag_that_accelerate_refuses_is_quoted(cold_client: Client) -> None:
    spec = toy_spec(launch="--no_such_flag")
    cold_client.submit(spec, BLOBS)
    last = failed(cold_client, spec.run_id)
    assert last.reason.startswith("accelerate launch ended with code")
    assert "no_such_flag" in last.reason
