"""Text of others inside Markdown: model answers, names of bases, reasons. None of it may become markup."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"[\\`*_\[\]<>|#&~$]")


def one_line(text: str) -> str:
    """The text on one line, so that it stays where it is put."""
    return " ".join(text.split())


def escape(text: str) -> str:
    """The text on one line, with a backslash before what Markdown, HTML or a table would take for markup."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))


def code(text: str) -> str:
    """The text as code in a cell of a table."""
    text = one_line(text).replace("`", "'").replace("|", r"\|")
    return f"`{text}`"
