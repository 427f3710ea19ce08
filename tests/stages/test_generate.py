"""Rows made beside the accelerator, as a notebook asks for them: through the real worker, once."""

from __future__ import annotations

import pytest

import rlhf_nb as rl
from rlhf_nb.data.rows import content_hash
from rlhf_nb.errors import DataError, SpecError, UnavailableError

PROMPTS = [{"prompt": f"Where is house {i}?"} for i in range(4)]
SETTINGS = {"n": 2, "max_new_tokens": 4, "launch": "--num_cpu_threads_per_process 1"}


@pytest.mark.slow
def test_an_unfinished_run_stands_for_the_rows_it_will_make(tmp_path, tiny_model):
    with rl.Workspace(tmp_path / "w") as ws:
        ws.attach("local", standby=False)
        mine = ws.add_data(PROMPTS, name="mine", kind="prompts")
        first = ws.generate(str(tiny_model), prompts=mine, **SETTINGS)
        second = ws.generate(str(tiny_model), prompts=first, seed=1, **SETTINGS)
        assert second.spec.parents == ("generate-1",)
        with pytest.raises(UnavailableError, match=r"generate-2 is \w+ and has saved no rows yet; wait for it"):
            second.data
        with pytest.raises(DataError, match="generate-1 will hold completions, and dpo trains on pairs; wait for it"):
            ws.train(rl.DPO(), policy="toy", data=first)
        made = second.wait(120).data
        assert (made.kind, len(made), made.content_hash) == ("completions", 4, content_hash(made.rows))
        assert [row["prompt"] for row in made] == [row["prompt"] for row in PROMPTS]
        assert ws.dataset("generate-1").rows != made.rows
        with pytest.raises(SpecError, match="base generate-1 trains nothing and saves no model"):
            ws.train(rl.SFT(), base="generate-1", data="toy-demonstrations")
        edges = {(edge.child, edge.parent, edge.relation) for edge in ws.store.lineage("generate-2")}
        assert edges == {("generate-2", "generate-1", "data"), ("generate-1", "mine", "data")}
        assert "generate-1" in [row["data"] for row in ws.datasets()]
        out = ws.export(str(tiny_model), tmp_path / "out", timeout=120)
        assert set(out.files) == {path.name for path in (tmp_path / "out").iterdir()} >= {"model.safetensors"}
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
        assert out.size == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    # Closed and opened again, with nothing attached, what was brought here is still here.
    with rl.Workspace(tmp_path / "w") as ws:
        assert rl.Dataset.from_store(ws.store, "generate-2").rows == made.rows


def test_a_job_of_rows_refuses_shares_and_misspelt_settings(tmp_path):
    with rl.Workspace(tmp_path / "w") as ws:
        with pytest.raises(SpecError, match='did you mean "temperature"'):
            ws.generate("toy", prompts="toy-prompts", temperatur=1)
        with pytest.raises(SpecError, match="shares mean nothing"):
            ws.generate("toy", prompts={"toy-prompts": 1, "toy-pairs": 2})
