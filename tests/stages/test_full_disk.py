"""A real disk that fills up under a run: the run says so in one line, and goes on once there is space."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

import rlhf_nb as rl
from rlhf_nb.compute.rundir import RunDir, append_line
from rlhf_nb.errors import RunFailedError, StorageError

pytestmark = [pytest.mark.slow]


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of the toy model and not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=26m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_run_on_a_full_disk_fails_in_one_line_and_resumes_when_there_is_space(small_disk):
    with rl.Workspace(small_disk / "project") as ws:
        ws.attach("local", standby=False)
        method = rl.SFT(max_steps=6, checkpoint_every=2, batch_size=2, sample_every=0)
        run = ws.train(method, base="toy", data="toy-demonstrations")
        with pytest.raises(RunFailedError, match="no space is left on the device") as caught:
            run.wait(timeout=120)
        assert "\n" not in str(caught.value) and "checkpoint" in str(caught.value)
        place = RunDir(small_disk / "project" / "runs" / run.id)
        assert [event.seq for event in place.events()] == list(range(1, len(place.events()) + 1))
        assert [path.name for path in (place.path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]

        subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
        assert run.resume().wait(timeout=120).state == "finished"
        assert [row.step for row in run.fold.rows] == [1, 2, 3, 4, 5, 6]
        assert (place.path / "model" / "model.safetensors").exists()
        assert [event.seq for event in place.events()] == list(range(1, len(place.events()) + 1))


def test_a_control_line_that_only_half_fits_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "control.jsonl"
    append_line(path, {"id": "first"})
    whole = path.read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    with pytest.raises(StorageError, match="no space is left") as caught:
        append_line(path, {"id": "second"})
    assert caught.value.__cause__.errno == errno.ENOSPC and path.read_bytes() == whole
