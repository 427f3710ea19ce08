"""quickstart: the notebooks that ship inside, copied where a person may edit them."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from rlhf_nb.compute.rundir import storage_errors
from rlhf_nb.errors import NotFoundError, StorageError
from rlhf_nb.stages.tables import Table


def notebooks() -> list[Path]:
    """The shipped chapters, in order."""
    package = Path(str(resources.files("rlhf_nb")))
    # In a wheel they lie in the package; in a checkout beside it.
    for folder in (package / "notebooks", package.parent / "notebooks"):
        found = sorted(folder.glob("*.ipynb"))
        if found:
            return found
    raise NotFoundError("this installation carries no notebooks; reinstall rlhf-nb")


def quickstart(directory: str | Path = ".") -> Table:
    """Copy each notebook to `directory`; one that is there already is left as it is."""
    target = Path(directory)
    rows = []
    with storage_errors(target):
        try:
            target.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise StorageError(f"{target}: no directory can be made there ({error.strerror}); give another") from None
        for source in notebooks():
            there = (target / source.name).exists()
            if not there:
                shutil.copyfile(source, target / source.name)
            rows.append({"notebook": str(target / source.name), "": "left as it is" if there else "copied"})
    return Table(["notebook", ""], rows)
