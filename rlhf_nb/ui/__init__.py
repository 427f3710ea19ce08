"""Python halves of the widgets: traits and message handlers. Bokeh and anywidget load when a widget is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_nb.labelling.session import LabelSession
    from rlhf_nb.run import Run


def show(run: Run) -> None:
    """Display a run's live panel, and below it, in an output of its own, the static picture that needs no kernel."""
    from IPython.display import display

    from rlhf_nb import registry
    from rlhf_nb.ui.static_picture import follow

    if not registry.methods.get(run.spec.method).trains:
        # There is nothing to draw: what it measures or makes is read from its handle.
        print(repr(run)[1:-1])
        return
    display(run.panel())
    follow(run)


def show_labeller(session: LabelSession) -> None:
    """Display the labelling view of a session."""
    from IPython.display import display

    from rlhf_nb.ui.labeller import Labeller

    display(Labeller(session))
