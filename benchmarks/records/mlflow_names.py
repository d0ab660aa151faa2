"""Names as MLflow takes them: one name of ours is one name there, and no two become the same.

MLflow takes letters, digits, spaces and `_ - . : /`, at most 250 of them, and nothing that looks
like a path which is absolute, goes up or has empty parts. Any other character becomes its code, so
that `AR@100` is `AR_x40_100`. The `_` before what looks like such a code becomes its code, too. A
name that is too long is cut, and ends in a part of the SHA-256 of the whole name.
"""

from __future__ import annotations

import hashlib
import posixpath
import re

MAX_NAME_LENGTH = 250
_EMPTY = "_x110000_"  # the code after the last character
_TAKEN = re.compile(r"[\w.\- :/]\Z")
_LIKE_A_CODE = re.compile(r"_(?=x[0-9a-f]+_)")


def stored_name(name: str) -> str:
    """The name under which MLflow has a param, a tag or a metric of ours."""
    text = _LIKE_A_CODE.sub(_code("_"), name)
    text = "".join(c if _TAKEN.match(c) else _code(c) for c in text)
    if posixpath.normpath(text) != text or text.startswith(("/", "..")):
        text = text.replace("/", _code("/"))
    if text == "." or text.startswith(".."):
        text = _code(".") + text[1:]
    if len(text) > MAX_NAME_LENGTH:
        end = f"_x{hashlib.sha256(name.encode()).hexdigest()[:16]}_"
        text = text[: MAX_NAME_LENGTH - len(end)] + end
    return text or _EMPTY


def _code(character: str) -> str:
    return f"_x{ord(character):x}_"
