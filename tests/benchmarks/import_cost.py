"""What `%load_ext rlhf_nb` costs, against `import pandas`, each in a fresh interpreter as a notebook's kernel is.

IPython and ipykernel are imported before the clock starts, because a kernel has them. Must: half of pandas at most,
and none of torch, pandas, bokeh, SQLAlchemy, Alembic imported by it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from common import interleave, parser, ratios, report, scratch, summary, text

HEAVY = ("torch", "transformers", "trl", "pandas", "bokeh", "sqlalchemy", "alembic", "datasets", "numpy", "anywidget")
FORBIDDEN = ("torch", "pandas", "bokeh", "sqlalchemy", "alembic")

CHILD = """
import json, sys, time
import ipykernel.ipkernel
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
before = set(sys.modules)
wall, cpu = time.perf_counter(), time.process_time()
shell.run_cell(sys.argv[1], store_history=False).raise_error()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
new = sorted({name for name in set(sys.modules) - before if "." not in name})
print(json.dumps({"wall": wall, "cpu": cpu, "new": new, "modules": len(set(sys.modules) - before)}))
"""


def measure(cell: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, cell], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = parser(__doc__).parse_args()
    repeats = args.repeats or (3 if args.quick else 15)
    arms = {"load_ext": lambda: measure("%load_ext rlhf_nb"), "pandas": lambda: measure("import pandas")}
    with scratch():
        for arm in arms.values():
            arm()  # bytecode and the page cache are warm for both
        found = interleave(repeats, arms, args.calm)
    walls = {name: [one["wall"] for one in results] for name, results in found.items()}
    cpus = {name: [one["cpu"] for one in results] for name, results in found.items()}
    wall, cpu = ratios(walls["load_ext"], walls["pandas"]), ratios(cpus["load_ext"], cpus["pandas"])
    heavy = [name for name in HEAVY if name in found["load_ext"][0]["new"]]
    forbidden = [name for name in heavy if name in FORBIDDEN]
    lines = [
        f"%load_ext rlhf_nb   wall {text(summary(walls['load_ext']))} · CPU {text(summary(cpus['load_ext']))}",
        f"import pandas       wall {text(summary(walls['pandas']))} · CPU {text(summary(cpus['pandas']))}",
        f"ratio               wall {text(wall, '')} · CPU {text(cpu, '')}",
        f"heavy modules imported by %load_ext: {', '.join(heavy) or 'none'} "
        f"({found['load_ext'][0]['modules']} modules in all; top level: {' '.join(found['load_ext'][0]['new'])})",
    ]
    met = {"wall ratio at most 0.5": wall["median"] <= 0.5, "none of " + ", ".join(FORBIDDEN): not forbidden}
    seconds = {name: {"wall": summary(walls[name]), "cpu": summary(cpus[name])} for name in arms}
    report("import_cost", args, lines, met, seconds=seconds, ratio_wall=wall, ratio_cpu=cpu, heavy=heavy)


if __name__ == "__main__":
    main()
