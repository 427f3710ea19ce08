"""The scripts that views need: our own bundles, and BokehJS from the installed wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from rlhf_nb.errors import UnavailableError

STATIC = Path(__file__).parent / "static"


def bundle(name: str) -> str:
    """Text of a built bundle, `panel.js` for one.

    Raises:
        UnavailableError: A checkout whose widgets were never built.
    """
    path = STATIC / name
    if not path.is_file():
        raise UnavailableError(f"{name} is not built in this checkout; run: npm --prefix widgets run build")
    return path.read_text(encoding="utf-8")


@cache
def bokeh_script() -> tuple[str, bytes]:
    """Version and text of BokehJS; it never comes from elsewhere, so no page asks the network."""
    import bokeh
    from bokeh.settings import settings

    return bokeh.__version__, (Path(settings.bokehjs_path()) / "js" / "bokeh.min.js").read_bytes()
