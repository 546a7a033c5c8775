"""An extension of griffe: docstrings in the Markdown of the site.

In the sources, formulas and references are in Sphinx syntax, which editors know. The functions of
the core take the array namespace `xp` first, which each adapter binds.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Docstrings in Markdown, and signatures without `xp`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Convert the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Remove `xp` from a function of the core, as `focal.core.bind` does."""
        if func.path.startswith("focal.core.") and "xp" in func.parameters:
            del func.parameters["xp"]


def markdown(text: str) -> str:
    """Sphinx's directives and roles in Markdown."""
    text = re.sub(
        r"^( *)\.\. math::(.*\n(?:\1 .*\n)*)",
        lambda m: f"{m[1]}$${' '.join(m[2].split())}$$\n",
        text + "\n",
        flags=re.M,
    )
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r":(?:func|class|meth|mod):`~?([^`]+)`", r"`\1`", text)
    # Types come from the signature: the words before a colon are text, not a type.
    text = re.sub(
        r"^Returns:\n(?:(?: .*)?\n)+",
        lambda m: "Returns:" + re.sub(r":(?= )", "&#58;", m[0][len("Returns:") :]),
        text + "\n",
        flags=re.M,
    )
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    return re.sub(r"^Source: ", "**Source**: ", text, flags=re.M).rstrip("\n")
