"""The Python half of the panel: what it sends to a page, and what it makes of what a page says."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from anywidget import AnyWidget

from rlhf_nb.protocol.events import (
    CoefficientChanged,
    ControlAcknowledged,
    ControlRefused,
    Failed,
    Resumed,
    SampleItem,
    Samples,
)
from rlhf_nb.run import Run
from rlhf_nb.ui import panel as panels
from rlhf_nb.ui.panel import Panel
from rlhf_nb.workspace import Workspace

from .conftest import _Pending, learning_rate


class Page:
    """What a page hears of a panel."""

    def __init__(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.panel, self.heard = panel, []
        monkeypatch.setattr(panel, "send", lambda content, buffers=None: self.heard.append((content, buffers or [])))

    def says(self, kind: str, **content: Any) -> None:
        self.panel._on_message(None, {"kind": kind, **content}, [])

    def hello(self, name: str = "page", have: int = 0) -> None:
        frames = self.of("frame")
        self.says("hello", page=name, have=have, generation=frames[-1]["generation"] if frames else 0, figures=0)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [content for content, _ in list(self.heard) if content["kind"] == kind]

    def rows(self) -> list[float]:
        """Steps of the rows in all frames, in the order they came."""
        steps: list[float] = []
        for content, buffers in list(self.heard):
            if content["kind"] == "frame":
                block = np.frombuffer(bytes(buffers[0])).reshape(len(content["columns"]), content["n"])
                steps.extend(block[content["columns"].index("step")])
        return steps

    def wait(self, condition: Any) -> Any:
        for _ in range(400):
            if answer := condition():
                return answer
            time.sleep(0.02)
        raise AssertionError(f"never: {[content['kind'] for content, _ in self.heard]}")


@pytest.fixture
def page(run, monkeypatch):
    # On a machine that stalls, a page that is about to say hello would be taken for one that cannot.
    monkeypatch.setattr(panels, "UNASKED_S", 1e6)
    panel = Panel(run)
    yield Page(panel, monkeypatch)
    panel.close()


def test_a_page_gets_every_row_once_whatever_it_already_has(page, ppo, run, chance):
    ppo(30)
    page.hello()
    assert page.wait(lambda: len(page.rows()) >= 30) and page.rows() == list(range(1, 31))
    page.hello("another", have=25)
    assert page.rows()[30:] == list(range(26, 31))


def test_a_live_row_reaches_a_page_that_said_hello(page, ppo, run):
    ppo(3)
    page.hello()
    page.wait(lambda: page.rows() == [1, 2, 3])
    run.step(4, loss=0.1)
    assert page.wait(lambda: page.rows() == [1, 2, 3, 4])


def test_figures_stand_in_reading_order_also_when_a_metric_comes_late(page, run):
    run.start()
    run.step(1, time__step_s=0.1, optimizer__learning_rate=1e-4)
    page.hello()
    page.wait(lambda: page.of("figures"))
    run.step(2, time__step_s=0.1, optimizer__learning_rate=1e-4, loss=0.3)
    late = page.wait(lambda: [f for f in page.of("figures") if len(f["figures"]) == 3])[-1]
    assert [figure["metric"] for figure in late["figures"]] == ["loss", "optimizer/learning_rate", "time/step_s"]


def test_a_move_is_asked_then_in_effect(page, ppo, run):
    ppo(2)
    page.hello()
    page.says("set", name="learning_rate", value=3e-4, why="")
    page.wait(lambda: page.of("controls")[-1]["sliders"][0]["asked"] == 3e-4)
    assert page.of("said")[-1]["cell"] == "%rlhf set ppo-7 learning_rate=0.0003"
    run.step(3, loss=0.2)
    page.wait(lambda: page.of("controls")[-1]["sliders"][0] | {"meaning": ""})
    last = page.wait(lambda: [c for c in page.of("controls") if c["changes"]])[-1]
    assert (last["sliders"][0]["value"], last["sliders"][0]["asked"]) == (3e-4, None)
    assert last["changes"][0]["step"] == 3 and last["changes"][0]["who"] == "alice"


def test_where_a_move_would_lead_is_answered_to_the_page_and_moves_nothing(page, ppo, run):
    ppo(2)
    page.hello()
    page.says("preview", name="learning_rate", values=[1e-4, 1e-3])
    (found,) = page.wait(lambda: page.of("foreseen"))
    assert [one["value"] for one in found["predictions"]] == [1e-4, 1e-3] and found["enough"] == 4.0
    assert page.of("controls")[-1]["sliders"][0]["asked"] is None
    said = page.wait(lambda: page.of("said"))
    assert [one["cell"] for one in said] == ["%rlhf preview ppo-7 learning_rate=0.0001"]


def test_the_cell_of_a_preview_names_a_value_that_can_be_previewed(page, run):
    run.start(coefficients=[learning_rate(0.0)])
    page.hello()
    page.says("preview", name="learning_rate", values=[1e-4, 1e-3])
    assert page.wait(lambda: page.of("said"))[-1]["cell"] == "%rlhf preview ppo-7 learning_rate=0.0001"


@pytest.mark.parametrize("refusal", ["before the call returns", "later"])
def test_a_refused_preview_tells_its_slider_why(page, ppo, run, monkeypatch, refusal):
    ppo(2)
    page.hello()
    refused = ControlRefused(id="the-preview", op="preview", reason="kl_in=loss: a preview needs kl_in=reward")
    before = refusal != "later"
    monkeypatch.setattr(run, "preview", lambda *_, **__: (before and run.emit(refused)) or _Pending("the-preview"))
    page.says("preview", name="learning_rate", values=[1e-4])
    if not before:
        page.wait(lambda: page.of("said"))
        run.emit(refused)
    said = page.wait(lambda: [one for one in page.of("said") if one["level"] == "error"])
    (one,) = said
    assert (one["unforeseen"], one["text"]) == ("learning_rate", f"refused: {refused.reason}")


def test_a_preview_that_cannot_be_asked_tells_its_slider_why(page, ppo, run):
    ppo(2)
    page.hello()
    page.says("preview", name="learning_rat", values=[1e-4])
    (said,) = page.wait(lambda: page.of("said"))
    assert said["unforeseen"] == "learning_rat" and "\n" not in said["text"]


def test_a_refusal_by_the_worker_is_said_and_the_handle_goes_back(page, ppo, run):
    ppo(2)
    page.hello()
    page.says("set", name="learning_rate", value=3e-4, why="")
    page.wait(lambda: page.of("controls")[-1]["sliders"][0]["asked"])
    run.emit(ControlRefused(id="control-1", op="set", reason="learning_rate: the schedule owns it"))
    said = page.wait(lambda: [s for s in page.of("said") if s["level"] == "error"])[-1]
    assert said["text"] == "refused: learning_rate: the schedule owns it"
    page.wait(lambda: page.of("controls")[-1]["sliders"][0]["asked"] is None)


def asked(page: Page) -> float | None:
    return page.of("controls")[-1]["sliders"][0]["asked"]


def read(run: Any, control_id: str, value: float) -> None:
    run.emit(ControlAcknowledged(id=control_id, op="set", step=2, name="learning_rate", value=value))


def test_what_was_asked_elsewhere_or_before_the_panel_is_shown_as_asked(ppo, run, monkeypatch):
    ppo(2)
    read(run, "from-a-cell", 3e-4)
    panel = Panel(run)
    page = Page(panel, monkeypatch)
    page.hello()
    assert asked(page) == 3e-4
    run.emit(
        CoefficientChanged(id="from-a-cell", name="learning_rate", old=1e-4, new=3e-4, effective_step=3, who="alice")
    )
    page.wait(lambda: asked(page) is None)
    panel.close()


def test_a_move_that_another_notebook_overtakes_gives_way_to_it_and_says_so(page, ppo, run):
    ppo(2)
    page.hello()
    page.says("set", name="learning_rate", value=3e-4, why="")
    page.wait(lambda: asked(page) == 3e-4)
    read(run, "control-1", 3e-4)
    run.emit(ControlRefused(id="control-1", op="set", reason="superseded by a later set, learning_rate=0.0005 by bob"))
    read(run, "elsewhere", 5e-4)
    page.wait(lambda: asked(page) == 5e-4)
    (said,) = [one for one in page.of("said") if one["level"] == "error"]
    assert said["text"] == "refused: superseded by a later set, learning_rate=0.0005 by bob"


def test_a_move_that_the_next_move_of_the_same_slider_overtakes_is_no_news(page, ppo, run, monkeypatch):
    ppo(2)
    page.hello()
    page.says("set", name="learning_rate", value=3e-4, why="")
    page.wait(lambda: asked(page) == 3e-4)
    real = run.set

    def overtaking(name: str, value: float, why: str = "") -> _Pending:
        pending = real(name, value, why)
        # Heard before the call returns, as from a run on this machine.
        run.emit(ControlRefused(id="control-1", op="set", reason="superseded by a later set"))
        read(run, pending.id, value)
        return pending

    monkeypatch.setattr(run, "set", overtaking)
    page.says("set", name="learning_rate", value=5e-4, why="")
    page.wait(lambda: asked(page) == 5e-4 and len(page.of("said")) == 2)
    assert [one["level"] for one in page.of("said")] == ["info", "info"]


def test_every_display_of_a_run_is_a_view_of_one_panel_until_it_is_closed():
    workspace = Mock(store=None)
    workspace.spec.return_value = Mock(title="toy", method="sft")
    workspace.client.events.return_value = []
    run = Run(workspace, "sft-1")
    first = run.panel()
    assert run.panel() is first and workspace.client.subscribe.call_count == 1
    first.close()
    assert run.panel() is not first
    run.panel().close()


def test_an_error_of_the_run_is_one_line_and_not_a_traceback(page, run, ppo):
    ppo(1)
    page.hello()
    page.says("set", name="learning_rat", value=1.0, why="")
    said = page.wait(lambda: [s for s in page.of("said") if s["level"] == "error"])[-1]
    assert "\n" not in said["text"]


def test_pages_are_counted_while_they_are_there(page, ppo, run):
    ppo(1)
    page.hello("one")
    page.hello("two")
    assert page.of("status")[-1]["watching"] == 2
    page.says("bye", page="one")
    page.hello("two")
    assert page.of("status")[-1]["watching"] == 1


def test_a_dead_run_says_how_in_the_header(page, ppo, run):
    ppo(5)
    page.hello()
    run.emit(Failed(reason="rank 0 was killed by SIGKILL", signal="SIGKILL", rank=0, log_tail=["last words"]))
    status = page.wait(lambda: [s for s in page.of("status") if s["state"] == "failed"])[-1]
    assert status["failure"] == "rank 0 was killed by SIGKILL" and status["failure_log"] == ["last words"]


def test_a_run_that_was_restarted_waits_until_it_starts_and_is_not_what_it_died_of(page, ppo, run, monkeypatch):
    ppo(5)
    page.hello()
    run.emit(Failed(reason="rank 0 was killed by SIGKILL", signal="SIGKILL", rank=0, log_tail=["last words"]))
    # As the agent writes it, before there is a worker; the supervisor knows what the events do not.
    monkeypatch.setattr(type(run), "state", property(lambda self: "starting"))
    run.emit(Resumed(step=3, attempt=2, from_step=3))
    status = page.wait(lambda: [s for s in page.of("status") if s["state"] == "starting"])[-1]
    assert (status["failure"], status["failure_log"], status["attempt"], status["step"]) == ("", [], 2, 3)
    run.start(attempt=2)
    page.wait(lambda: page.of("status")[-1]["state"] == "running")
    # A worker says again from where it goes on.
    run.emit(Resumed(step=3, attempt=2, from_step=3))
    assert run.fold.state == "running"


def test_what_follows_from_a_move_is_no_move_of_its_own(page, ppo, run):
    ppo(2)
    page.hello()
    move = CoefficientChanged(id="c", name="learning_rate", old=1e-4, new=3e-4, effective_step=3, who="alice")
    run.emit(move, move.model_copy(update={"id": "c-holds", "name": "kl_controller", "follows": "c"}))
    first, second = page.wait(lambda: [c for c in page.of("controls") if len(c["changes"]) == 2])[-1]["changes"]
    assert first["follows"] == "" and first["cell"] == "%rlhf set ppo-7 learning_rate=0.0003"
    assert second["follows"] == "c" and second["cell"] == ""


def test_what_a_person_asked_for_is_shown_beside_the_runs_own_samples_and_is_not_labelled(
    ppo, run, tmp_path, monkeypatch
):
    def said(prompt: str) -> SampleItem:
        return SampleItem(prompt=prompt, completion="new", reference_completion="old")

    ppo(2)
    with Workspace(tmp_path / "w") as ws, closing(Panel(run, store=ws.store)) as panel:
        page = Page(panel, monkeypatch)
        mine, too = (
            Samples(step=2, items=[said("mine")], request_id="r"),
            Samples(step=2, items=[said("too")], request_id="s"),
        )
        run.emit(Samples(step=2, items=[said("its own")]), mine, too)
        page.hello()
        shown = page.wait(lambda: page.of("samples"))[-1]
        assert [item["prompt"] for item in shown["items"]] == ["its own", "mine", "too"]
        assert page.of("controls")[-1]["sample_steps"] == [2]
        run.emit(Samples(step=3, items=[said("hand-picked")], request_id="t"))
        page.wait(lambda: page.of("samples")[-1]["step"] == 3)
        page.says("label_start")
        queue = page.wait(lambda: page.of("label_queue"))[-1]
        assert "at step 2" in queue["title"] and queue["total"] == 1


def test_what_a_page_says_wrongly_is_answered_and_ends_nothing(page, ppo, run):
    ppo(1)
    page.says("dance")
    assert page.of("said")[-1]["level"] == "error"
    page.hello()
    assert page.wait(lambda: page.rows() == [1])


def test_a_page_that_may_listen_but_not_speak_is_sent_everything(page, ppo, monkeypatch):
    ppo(4)
    monkeypatch.setattr(panels, "UNASKED_S", 0.2)
    page.panel.send_state()
    assert page.wait(lambda: page.rows()[:4] == [1, 2, 3, 4])
    assert page.of("asset"), "it could not ask for BokehJS either"


def test_a_page_has_its_whole_second_to_say_hello_however_long_the_panel_took_to_make(run, monkeypatch):
    make, made = AnyWidget.__init__, []

    def slowly(self, **options):
        make(self, **options)
        made.append(time.monotonic())

    monkeypatch.setattr(AnyWidget, "__init__", slowly)
    with closing(Panel(run)) as panel:
        assert panel._unasked_at >= made[0] + panels.UNASKED_S
