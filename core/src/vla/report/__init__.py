"""Self-contained HTML reports: pages of text, tables, plots and videos, with no resource outside the file."""

from vla.report.html import Section, figure, page, table, video
from vla.report.plots import interval_bars, line_plot, small_multiples

__all__ = ["Section", "figure", "interval_bars", "line_plot", "page", "small_multiples", "table", "video"]
