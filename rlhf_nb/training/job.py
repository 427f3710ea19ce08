"""One job beside the accelerator, on every rank: read the spec, resolve what it names, train, save.

`preload` is what a standby does ahead of time; `run` is the job. Errors go up as they are: the worker records one line.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_nb import registry
from rlhf_nb.compute.rundir import EventWriter, LineTail, RunDir, storage_errors
from rlhf_nb.errors import ComputeError, SpecError
from rlhf_nb.methods.base import Method
from rlhf_nb.protocol.events import CoefficientChanged, ModelSaved, Resumed, RewardReplaced, Started, TrainingEnded
from rlhf_nb.protocol.fold import RunFold
from rlhf_nb.protocol.spec import RunSpec, data_parts, describe
from rlhf_nb.training import adapters, checkpoints, distributed, models
from rlhf_nb.training.context import Context, Emitter
from rlhf_nb.training.control import ControlLoop, of
from rlhf_nb.training.data import embedded_rows, kind_of, load_rows

VERSIONS = ("rlhf-nb", "torch", "transformers", "trl", "peft", "accelerate")


def preload() -> None:
    """Import everything any method needs. Touches neither an accelerator nor a process group."""
    # Constructing a trainer would ping a server, and the progress bars of data sets have no reader.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its warning that a trainer may vanish is for whoever pins the version, and that is us.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    for module in ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors.torch"):
        importlib.import_module(module)
    for name in registry.methods.names():
        # A plugin that cannot be imported says so when a run asks for it, not in everybody's standby.
        with contextlib.suppress(ImportError, AttributeError):
            registry.methods.get(name).preload()
    from transformers.utils import logging

    logging.disable_progress_bar()
    importlib.import_module("rlhf_nb.training.trainer")
    importlib.import_module("rlhf_nb.training.sampling")


def warm_up() -> None:
    """What a standby does beyond importing: the first time of everything that is slow the first time.

    Loads the embedded model and takes a step with it on the CPU, then throws it away. Touches neither an accelerator
    nor a process group; a machine on which this fails starts its runs a second later and says nothing.
    """
    import gc

    with contextlib.suppress(Exception):
        _first_times()
    # A trainer collects garbage before its first step: what was imported need not be looked through again.
    gc.collect()
    gc.freeze()


def _first_times() -> None:
    import torch
    from datasets import Dataset

    path = str(models.toy_path())
    tokenizer, model = models.load_tokenizer(path), models.load_model(path)
    for name in ("toy-demonstrations", "toy-pairs", "toy-prompts"):
        embedded_rows(name)
    chat = [{"role": "user", "content": "Where is the mill?"}, {"role": "assistant", "content": "On Mill Lane."}]
    rows = Dataset.from_list([{"messages": chat}] * 2)
    tokens = rows.map(
        lambda row: tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True),
        new_fingerprint="warm",
    )
    ids = torch.tensor(tokens["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def run(
    run_dir: Path,
    *,
    blobs: Path,
    runs_root: Path,
    rank: int,
    world_size: int,
    warm: bool,
    attempt: int,
    resume_from: Path | None,
) -> None:
    """Do the run's job on this rank.

    Args:
        blobs: Folder of `<content_hash>.jsonl`.
        runs_root: Folder of run directories, where a parent run's model is found.
        world_size: As the launcher was told; the true one is taken from the process group.
        warm: A standby took the job.
        attempt: Counted from 1.
        resume_from: Checkpoint directory to continue from; None starts at step 1.
    """
    preload()
    import torch

    place = RunDir(run_dir)
    spec = place.spec()
    use_cpu = not torch.cuda.is_available()
    true_rank, true_world = distributed.start(use_cpu)
    writer = EventWriter(place.events_path) if true_rank == 0 else None
    try:
        method: Method = registry.methods.get(spec.method).create(**spec.config)
        emit = Emitter(writer, method.max_steps)
        before = _so_far(place, attempt)
        step = checkpoints.step_of(resume_from) if resume_from else 0
        _announce(emit, method, spec, before, step, attempt=attempt, warm=warm, world_size=true_world, use_cpu=use_cpu)
        if (true_rank, true_world) != (rank, world_size) or true_world != spec.launch.num_processes:
            raise ComputeError(
                f"launch: {spec.launch.num_processes} ranks were asked for and the process group has {true_world}; "
                f"on CPU use --multi_gpu --num_processes {spec.launch.num_processes}"
            )
        asked = _asked(place) if attempt > 1 else {}
        control = ControlLoop(
            LineTail(place.control_path) if true_rank == 0 else None,
            emit.event,
            broadcast=distributed.broadcaster(),
            seen=frozenset([*before.acknowledged, *before.refused]) - asked.keys(),
            asked=asked,
            values=_values_at(method, spec, before, step) if attempt > 1 else None,
            replay=_changes_after(place, step) if attempt > 1 else (),
        )
        context = _context(
            spec, method, place, emit, control, blobs, runs_root, true_rank, true_world, use_cpu, attempt, resume_from
        )
        _train(context, place)
    except BaseException:
        # Half a checkpoint is of no use, and on a full disk its space is what the words about the end need.
        if true_rank == 0:
            shutil.rmtree(place.checkpoints / checkpoints.SCRATCH, ignore_errors=True)
        raise
    finally:
        if writer is not None:
            writer.close()


def _so_far(place: RunDir, attempt: int) -> RunFold:
    """What earlier attempts left: the control they acted on and the values their coefficients had."""
    fold = RunFold()
    if attempt > 1:
        for event in place.events():
            fold.add(event)
    return fold


def _asked(place: RunDir) -> dict[str, int]:
    """Ids of sets that an earlier attempt read and that were not in force yet, with the step at which it first did.

    They are read again; every other line that was acknowledged or refused is done with.
    """
    events = place.events()
    made = {event.id for event in events if event.kind in ("coefficient_changed", "reward_replaced")}
    asked: dict[str, int] = {}
    for event in events:
        if event.kind == "control_acknowledged" and event.op in ("set", "set_reward"):
            asked.setdefault(event.id, event.step)
    newest: dict[tuple[Any, ...], str] = {}
    for line in LineTail(place.control_path).read():
        if line.get("id") in asked:
            # Of two sets of one coefficient at one boundary the later one came into force, and the first one never.
            newest[line.get("op"), line.get("name"), line.get("part")] = line["id"]
    return {id: asked[id] for id in newest.values() if id not in made}


def _changes_after(place: RunDir, step: int) -> list[CoefficientChanged | RewardReplaced]:
    """Changes that people asked for and that came into force after a step, each once, in their order.

    From the log itself: the fold drops them at every restart, and a second death may come before they are made again.
    """
    found: dict[str, CoefficientChanged | RewardReplaced] = {}
    last, attempt = None, 0
    for event in place.events():
        attempt = event.attempt if isinstance(event, Started) else attempt
        # A restart is announced twice: by the agent, with the number of the attempt to come, and by the attempt itself.
        restart = isinstance(last, Started) or (isinstance(event, Resumed) and event.attempt != attempt)
        if isinstance(event, Resumed) and event.from_step is not None and not restart:
            # The run went back by itself and kept what had been asked for: from then on it held at once.
            for change in found.values():
                if change.effective_step > event.from_step + 1:
                    found[change.id] = change.model_copy(update={"effective_step": event.from_step + 1})
        last = event
        if isinstance(event, CoefficientChanged | RewardReplaced) and not getattr(event, "follows", ""):
            if event.id in found:
                continue
            # Asked for after a restart, ahead of what an earlier attempt had come to: that never came back.
            overtaken = [c for c in found.values() if of(c) == of(event) and c.effective_step > event.effective_step]
            for change in overtaken:
                del found[change.id]
            found[event.id] = event
    later = (change for change in found.values() if change.effective_step > step)
    return sorted(later, key=lambda change: (change.effective_step, change.seq))


def _values_at(method: Method, spec: RunSpec, before: RunFold, step: int) -> dict[str, float]:
    """What each live coefficient was when optimizer step `step` had been taken."""
    values = method.start_values(spec)
    values.update({change.name: change.new for change in before.changes if change.effective_step <= step})
    return values


def _announce(
    emit: Emitter,
    method: Method,
    spec: RunSpec,
    before: RunFold,
    step: int,
    *,
    attempt: int,
    warm: bool,
    world_size: int,
    use_cpu: bool,
) -> None:
    values = _values_at(method, spec, before, step)
    emit.event(
        Started(
            attempt=attempt,
            world_size=world_size,
            rank_pids=distributed.rank_pids(),
            device=device_name(use_cpu),
            warm=warm,
            versions=versions(),
            max_steps=method.max_steps if method.trains else None,
            has_reference=method.has_reference,
            coefficients=[live.describe(values[live.name], method) for live in method.live_in(spec)],
        )
    )
    if attempt > 1:
        emit.event(Resumed(step=step, attempt=attempt, from_step=step))


def _context(
    spec: RunSpec,
    method: Method,
    place: RunDir,
    emit: Emitter,
    control: ControlLoop,
    blobs: Path,
    runs_root: Path,
    rank: int,
    world_size: int,
    use_cpu: bool,
    attempt: int,
    resume_from: Path | None,
) -> Context:
    if spec.data is None and method.rows:
        raise SpecError(f"{spec.method}: no data; give data=, or prompts= for a method that samples")
    emit.stage("reading rows")
    parts = data_parts(spec.data)
    row_kind = method.rows_in(kind_of(parts[0].data)) if parts else ""
    sources = [load_rows(part.data, blobs, row_kind, runs_root=runs_root) for part in parts]
    for part in parts:
        if converted := getattr(part.data, "converted", ""):
            emit.notice("rows_converted", converted)
    mixture = [(len(rows), part.weight) for rows, part in zip(sources, parts, strict=True)]
    return Context(
        spec=spec,
        method=method,
        run_dir=place.path,
        emit=emit,
        control=control,
        rows=[row for rows in sources for row in rows],
        row_kind=row_kind,
        mixture=tuple(mixture),
        model_path=models.resolver(runs_root, emit),
        held_out=load_rows(spec.held_out, blobs, "prompts", runs_root=runs_root) if spec.held_out is not None else None,
        pretraining=load_rows(spec.pretraining, blobs, "demonstrations", runs_root=runs_root)
        if spec.pretraining is not None
        else None,
        rank=rank,
        world_size=world_size,
        use_cpu=use_cpu,
        attempt=attempt,
        resume_from=resume_from,
    )


def _train(context: Context, place: RunDir) -> None:
    from transformers import set_seed

    # As a plain script does it: once, before models are made. The trainers seed again by themselves.
    set_seed(context.method.seed)
    context.emit.stage("loading models" if context.method.trains or context.method.makes else "measuring")
    trainer = context.method.build_trainer(context)
    if context.method.trains:
        context.emit.stage("training")
    trainer.train()
    step = int(getattr(trainer, "step", context.method.max_steps))
    if context.method.trains:
        context.emit.stage("saving")
        save(trainer, context, place, step)
    outcome = "stopped" if context.control.stopping else "finished"
    context.emit.event(TrainingEnded(outcome=outcome, step=step))


def save(trainer: Any, context: Context, place: RunDir, step: int) -> None:
    """Write `model/` whole or not at all."""
    scratch, spec = place.path / "model.tmp", context.spec
    if context.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
    distributed.barrier()
    with storage_errors(place.model):
        trainer.save_model(str(scratch))
        distributed.barrier()
        if not context.is_main:
            return
        if spec.adapter is not None and spec.policy is not None:
            adapters.note_base(scratch / "adapter", describe(spec.policy), context.model_path(spec.policy))
        if place.model.exists():
            shutil.rmtree(place.model)
        os.replace(scratch, place.model)
    context.emit.event(ModelSaved(step=step, path="model", content_hash=models.content_hash(place.model)))


def device_name(use_cpu: bool) -> str:
    """`NVIDIA H200 139 GiB` or `CPU, 2 threads`."""
    import torch

    if use_cpu:
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads != 1 else ''}"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} {properties.total_memory / 2**30:.0f} GiB"


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
