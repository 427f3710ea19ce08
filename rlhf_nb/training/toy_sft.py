"""Train `toy-sft` from `toy` by its recipe, in a process of its own: `python -m rlhf_nb.training.toy_sft DIRECTORY`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from rlhf_nb.compute.rundir import RunDir
from rlhf_nb.methods.sft import SFT
from rlhf_nb.protocol.spec import NamedData, NamedModel, RunSpec
from rlhf_nb.toy import SFT_RECIPE


def method() -> SFT:
    """The recipe as a method: the very `%rlhf sft` a person would type."""
    return SFT(
        max_steps=SFT_RECIPE["max_steps"],
        learning_rate=SFT_RECIPE["learning_rate"],
        batch_size=SFT_RECIPE["per_device_train_batch_size"],
        lr_scheduler=SFT_RECIPE["lr_scheduler_type"],
        warmup_steps=SFT_RECIPE["warmup_steps"],
        seed=SFT_RECIPE["seed"],
        sample_every=0,
    )


def main(target: Path) -> None:
    from rlhf_nb.training import job

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    recipe = method()
    with tempfile.TemporaryDirectory(prefix="toy-sft-") as scratch:
        root = Path(scratch)
        place = RunDir(root / "toy-sft")
        place.create(
            RunSpec(
                run_id="toy-sft",
                workspace_id="",
                method=recipe.name,
                config=recipe.model_dump(),
                policy=NamedModel(name="toy"),
                data=NamedData(name=SFT_RECIPE["data"]),
                created=time.time(),
            )
        )
        job.run(place.path, blobs=root, runs_root=root, rank=0, world_size=1, warm=False, attempt=1, resume_from=None)
        for path in place.model.iterdir():
            shutil.move(str(path), target / path.name)


def _end_with_parent(parent: int) -> None:
    """Nobody is left to take the model: the run that asked for it was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
