"""What an import costs, over every module there is: import contracts cannot see *when* something heavy is imported."""

from __future__ import annotations

import subprocess
import sys

# Beside the accelerator torch is at home; methods must do without it until a worker calls them.
NEEDS_TORCH = ("rlhf_nb.maths", "rlhf_nb.training", "rlhf_nb.compute.worker")

IMPORT_ALL = """
import importlib, pkgutil, sys
import rlhf_nb
names = [m.name for m in pkgutil.walk_packages(rlhf_nb.__path__, "rlhf_nb.")]
skipped = tuple(sys.argv[2:])
imported = [n for n in names if not n.startswith(skipped) and ".migrations" not in n and not n.endswith("__main__")]
heavy = set(sys.argv[1].split(","))
for name in imported:
    importlib.import_module(name)
    if found := heavy & set(sys.modules):
        sys.exit(f"importing {name} brought {sorted(found)}")
print(len(imported))
"""


def import_all(heavy: str, *skipped: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPORT_ALL, heavy, *skipped]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_no_module_of_the_notebook_side_imports_torch_transformers_or_trl() -> None:
    done = import_all("torch,transformers,trl,peft,accelerate", *NEEDS_TORCH)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_no_module_imports_pandas_or_bokeh_before_they_are_used() -> None:
    done = import_all("pandas,bokeh,datasets", *NEEDS_TORCH)
    assert done.returncode == 0, done.stderr
