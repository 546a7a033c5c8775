"""Tables and plots of Markdown pages.

A table between `<!-- NAME -->` and `<!-- end -->` is replaced when it is measured again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from focal.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def fill(page: str, tables: Mapping[str, str]) -> str:
    """The page with its tables replaced; the words around them are kept."""
    for name, table in tables.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = place.subn(lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", page)
        if count != 1:
            raise ValueError(f"fill: expected one place for the table {name!r}; got {count}")
    return page


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table, the first of them its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join((head, "|" + "---|" * len(rows[0]), *body))


def write_tables(path: Path, tables: Mapping[str, str]) -> None:
    """Replace the tables of a page."""
    write_atomically(path, fill(path.read_text(encoding="utf-8"), tables).encode())


def save_plot(path: Path, plot: Figure) -> None:
    """Write a plot as a PNG."""
    # Not at the top: pages without plots are written where matplotlib is not installed, too.
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from focal.retinanet.report.draw import save_image

    canvas = FigureCanvasAgg(plot)
    canvas.draw()
    save_image(path, np.asarray(canvas.buffer_rgba())[..., :3])
