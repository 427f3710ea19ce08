"""The workspace's database: labels, data sets, models, lineage, the index of runs and the audit chain.

`from rlhf_nb.store import Store` loads SQLAlchemy; importing this package does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_nb.store.store import Store

__all__ = ["Store"]


def __getattr__(name: str) -> Any:
    if name == "Store":
        from rlhf_nb.store.store import Store

        return Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
