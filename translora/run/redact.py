"""What may be written and shown: no key, token or password, and no control characters of names that others chose."""

from __future__ import annotations

import os
import re
from typing import Any

SHORTEST_SECRET = 8
"""A shorter value of a variable that is named like a secret may be any word, and stays."""
# Names of settings, not of amounts: max_new_tokens and save_token_counts are no secrets.
_SECRET_KEY = re.compile(
    r"(^|_)((api|access|secret|private)_?key|secret|passw(or)?d|credentials?|token)$", re.IGNORECASE
)
# user:password@ and user@ before a host. A password may hold a slash (keys of object stores do), a port may not.
_URL_PASSWORD = re.compile(r"(?<=://)(?:[^/@\s:]*:(?!\d+/)[^@\s]+|[^/@\s]+)@")
_URL_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|signature|sig|password|credential)=)[^&\s'\"]+", re.IGNORECASE
)


def without_secrets(value: Any) -> Any:
    """A copy of a config with what looks like a key, token or password blanked, in URLs too."""
    if isinstance(value, dict):
        return {
            key: "***" if item and _SECRET_KEY.search(str(key)) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact(text: str) -> str:
    """The text without passwords in URLs, and without the values of environment variables that are named like secrets.

    What a library puts into its error messages is not ours to choose.
    """
    text = _URL_QUERY.sub(r"\1***", _URL_PASSWORD.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and value in text and _SECRET_KEY.search(name):
            text = text.replace(value, "***")
    return text


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an error's message, of `most` characters; the name of its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:most] if text else type(error).__name__


def printable(text: str, keep: str = "") -> str:
    r"""The text with control characters spelt out (a newline as `\n`), so that a terminal obeys none of them.

    Unicode's own are among them: those that turn the direction of writing, and line separators. `keep` stay as they
    are.
    """
    if text.isprintable():
        return text
    shown = (char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text)
    return "".join(shown)
