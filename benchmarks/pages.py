"""Tables in Markdown pages: what stands between `<!-- NAME -->` and `<!-- end -->` is replaced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


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
