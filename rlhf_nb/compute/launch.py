"""The `accelerate launch` command of a run, its environment, and what this host offers."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from rlhf_nb.protocol.spec import Launch

# Flags that already say how the ranks are spread; beside them `--multi_gpu` is refused or wrong.
_SPREADS = ("multi_gpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "tpu", "config_file", "use_parallelism_config")
_DEFAULTS = (("num_machines", "1"), ("mixed_precision", "no"), ("dynamo_backend", "no"), ("main_process_port", "0"))
VERSIONS = ("torch", "trl", "transformers", "accelerate", "peft", "rlhf-nb")


def command(launch: Launch, arguments: list[str]) -> list[str]:
    """`accelerate launch` with the user's flags, then what they left open, then the worker."""
    asked = launch.num_processes
    flags = list(launch.flags)
    if asked > 1:
        # With `--cpu`, accelerate starts one process whatever num_processes says; the environment asks for the CPU.
        flags = [flag for flag in flags if flag != "--cpu"]
        if not any(_has(launch, name) for name in _SPREADS):
            flags.append("--multi_gpu")
    if not _has(launch, "num_processes"):
        flags += ["--num_processes", str(asked)]
    for name, value in _DEFAULTS:
        if not _has(launch, name):
            flags += [f"--{name}", value]
    if not _has(launch, "num_cpu_threads_per_process"):
        flags += ["--num_cpu_threads_per_process", str(threads(asked))]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "rlhf_nb.compute.worker", *arguments]


def environment(launch: Launch) -> dict[str, str]:
    env = dict(os.environ)
    # An inline backend of the notebook's kernel does not exist in a worker. MKL and JPY variables belong to the agent.
    for name in ("MPLBACKEND", "JPY_PARENT_PID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env.update(HF_HUB_DISABLE_TELEMETRY="1", PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false")
    # Accelerate sets this itself, with a warning, where it was left open.
    env["OMP_NUM_THREADS"] = launch.option("num_cpu_threads_per_process") or str(threads(launch.num_processes))
    if _has(launch, "cpu") or not gpus():
        env["ACCELERATE_USE_CPU"] = "true"
    return env


def _has(launch: Launch, name: str) -> bool:
    return launch.option(name) is not None


def cores() -> int:
    """CPU cores this process may use: affinity, and the container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    try:
        quota, period = open("/sys/fs/cgroup/cpu.max").read().split()
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, allowed)


def threads(ranks: int) -> int:
    """CPU threads a rank gets: what OMP_NUM_THREADS says, else the cores shared evenly."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) > 0 else max(1, cores() // max(1, ranks))


@functools.cache
def gpus() -> tuple[str, ...]:
    """`NVIDIA H200 139 GiB` for each visible GPU, without importing torch or opening a CUDA context."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    tool = shutil.which("nvidia-smi")
    if tool is None or (visible is not None and visible.strip() in ("", "-1")):
        return ()
    query = [tool, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[part.strip() for part in line.split(",")] for line in lines if line.count(",") == 3]
    if visible is not None:
        asked = [part.strip() for part in visible.split(",")]
        rows = [row for one in asked for row in rows if one == row[0] or row[1].startswith(one)]
    return tuple(f"{name} {int(float(mebibytes) / 1024)} GiB" for _, _, name, mebibytes in rows)


def device() -> str:
    """One phrase: `NVIDIA H200 139 GiB`, `2 × NVIDIA A100 80 GiB` or `CPU, 2 threads`."""
    found = gpus()
    if not found:
        return f"CPU, {threads(1)} thread{'s' if threads(1) != 1 else ''}"
    return found[0] if len(found) == 1 else f"{len(found)} × {found[0]}"


def versions() -> dict[str, str]:
    """Installed versions of what trains, read from metadata; a package that is missing is left out."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def host() -> dict[str, Any]:
    return {
        "device": device(),
        "versions": versions(),
        "threads": threads(1),
        "host": platform.node(),
        "memory_free": psutil.virtual_memory().available,
    }
