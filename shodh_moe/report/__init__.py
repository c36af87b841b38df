"""Tables, figures and self-contained HTML pages, and the report of a run made from them.

`table`, `figure` and `page` are the kit that the run's report (`run/`), the audit and the CCM benchmark share; `style`
has the colours and matplotlib helpers.
"""

from __future__ import annotations

from shodh_moe.report.run.page import write_report
from shodh_moe.report.run.tables import summary_table

__all__ = ["summary_table", "write_report"]
