"""Rows and their types, the data-set handle, importers, exporters and conversions. Heavy readers load at first use."""

from __future__ import annotations

from rlhf_nb.data.rows import COLUMNS, KINDS, Row, canonical_json, content_hash, to_trl

__all__ = ["COLUMNS", "KINDS", "Row", "canonical_json", "content_hash", "to_trl"]
