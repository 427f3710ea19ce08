"""`Store`: a workspace's database, all parts together."""

from __future__ import annotations

from rlhf_nb.store.audit import Audit
from rlhf_nb.store.datasets import Datasets
from rlhf_nb.store.labels import Labels
from rlhf_nb.store.models import Models
from rlhf_nb.store.runs import Runs


class Store(Datasets, Runs, Models, Labels, Audit):
    """The truth of labels and data sets, and an index of runs and models.

    Several processes and threads may hold the same workspace open. Each call is one transaction, durable when it
    returns; everything is append-only except the index of runs.

        with Store.open("rlhf-workspace") as store:
            store.add_dataset("hh", "pairs", rows, source="hh.jsonl.gz")
    """
