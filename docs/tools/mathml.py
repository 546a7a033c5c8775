r"""A hook of mkdocs that converts formulas to MathML, which browsers render without a script.

pymdownx.arithmatex marks each formula as `\(...\)` or `\[...\]`.
"""

from __future__ import annotations

import html as escapes
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
SIGN = re.compile(r"(<mo[^>]*>(?:&#x00028;|&#x0005B;|&#x0003D;)</mo>)<mo>(?=&#x02212;)")
"""A minus after a bracket or an equals sign, which is a prefix and not a difference."""


def on_page_content(html: str, page: Any, **_: Any) -> str:
    r"""Replace every marked formula of a page; a line of several is split at each `\qquad`."""

    def mathml(match: re.Match[str]) -> str:
        kind, latex = match[1], escapes.unescape(match[2])
        parts = latex.split(r"\qquad") if kind == "div" else [latex]
        shown = "\n".join(convert(part, display="inline") for part in parts)
        if "\\" in shown:  # the converter leaves unknown commands as they are
            raise PluginError(f"{page.file.src_uri}: no MathML for {latex}")
        shown = SIGN.sub(r'\1<mo form="prefix">', shown)
        return f'<{kind} class="arithmatex">{shown}</{kind}>'

    return MARKED.sub(mathml, html)
