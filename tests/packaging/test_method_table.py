"""The README's table of methods against the classes it is made from."""

from __future__ import annotations

import pytest

from rlhf_nb import registry
from rlhf_nb.methods import table
from rlhf_nb.methods.dpo import DPO


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(table.TARGET.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(table, "TARGET", path)
    return path


def test_the_readme_shows_the_methods_as_they_are(readme):
    assert table.main(["--check"]) == 0
    before = readme.read_bytes()
    assert table.main([]) == 0 and readme.read_bytes() == before


def test_a_method_that_changed_makes_the_readme_stale_until_it_is_written_again(readme, monkeypatch, capsys):
    monkeypatch.setattr(DPO, "live", DPO.live[:1])
    before = readme.read_bytes()
    assert table.main(["--check"]) == 1 and readme.read_bytes() == before
    assert capsys.readouterr().err == "README.md's methods are stale; run: python -m rlhf_nb.methods.table\n"
    assert table.main([]) == 0
    assert table.main(["--check"]) == 0
    changed = set(readme.read_text(encoding="utf-8").splitlines()) - set(before.decode().splitlines())
    assert changed == {
        "| `dpo` | pairs | policy, reference | beta | [arXiv:2305.18290](https://arxiv.org/abs/2305.18290) |"
    }


def test_every_method_that_trains_has_a_line_and_no_cell_is_empty():
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.table().splitlines()]
    shown = {cells[0].strip("`") for cells in lines}
    own = {name for name in registry.methods.names() if registry.methods.get(name).__module__.startswith("rlhf_nb.")}
    assert shown == own - {"evaluate", "export", "generate", "judge", "constitutional"}
    assert all(len(cells) == len(header) and all(cells) for cells in lines)


@pytest.mark.parametrize("broken", [table.BEGIN, table.END])
def test_a_readme_without_its_marks_is_not_written(readme, broken):
    for text in ("", broken * 2):
        readme.write_text(table.TARGET.read_text(encoding="utf-8").replace(broken, text), encoding="utf-8")
        before = readme.read_bytes()
        with pytest.raises(ValueError, match="the table stands between one"):
            table.main([])
        assert readme.read_bytes() == before
