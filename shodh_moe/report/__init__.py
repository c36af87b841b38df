"""The report of a run: reads its run folder, writes one self-contained page and the pictures beside it.

Files: `load` reads, `fields`, `routing_pictures` and `curves` draw, `tables` and `page` hold numbers and words, `html`
assembles.
"""

from __future__ import annotations

from shodh_moe.report.html import write_report
from shodh_moe.report.tables import summary_table

__all__ = ["summary_table", "write_report"]
