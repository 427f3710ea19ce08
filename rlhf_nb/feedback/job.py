"""The row job of a judge: what it holds open is closed however the job ends."""

from __future__ import annotations

from rlhf_nb.training.row_job import RowJob


class JudgedJob(RowJob):
    def train(self) -> None:
        try:
            super().train()
        finally:
            self.maker.judge.close()  # type: ignore[attr-defined]
