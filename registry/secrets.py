"""What must not be written or shown: passwords in addresses, tokens, keys, and how they are hidden.

    concealed("http://me:pw@host/?token=7")    'http://me:***@host/?token=***'

A secret is known by where it stands (before the @ of an address, after `token=`, in an
Authorization header), by its form (a token of Hugging Face or GitHub), or because a variable of the
environment holds it whose name says so (HF_TOKEN, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD).

Every text passes through `concealed` where it leaves the program: in the recorder, in the writer of
whole files, on the way to MLflow, and at the streams of the console. Secrets themselves are kept in
the environment alone, which the processes that this one starts inherit; `revealed` finds them
there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import quote, unquote

HIDDEN = "***"
KEPT = "OBJECTIVE_ZOO_SECRET_"  # begins the names of the variables that `keep` sets

# Each begins at the beginning of a word, so that a long text takes time by its length only.
_ADDRESS = re.compile(r"((?<![\w+.-])[A-Za-z][\w+.-]*://[^\s/?#@:'\"]*:)([^\s/?#'\"]*)(@)")
# A password with an unquoted / ? or #; what begins with a port is none.
_UNQUOTED = re.compile(
    r"((?<![\w+.-])[A-Za-z][\w+.-]*://[^\s/?#@:'\"]+:)(?!\d{1,5}(?:[/?#]|$))"
    r"([^\s'\"<>]{0,100}[/?#][^\s'\"<>]{0,100})(@)"
)
_NAMED = (
    r"[\w.-]*(?:token|password|passwd|pwd|secret|signature|credential|api[_-]?key|access[_-]?key)"
)
_PATTERNS = (
    _ADDRESS,
    _UNQUOTED,
    re.compile(r"(https?://)([^\s/?#@:'\"]{16,})(@)"),  # a token in the place of a user's name
    re.compile(rf"(?i)([?&;](?:{_NAMED}[\w-]{{0,40}}|sig|key|auth)=)([^\s&;#'\"]+)()"),
    re.compile(
        r"(?i)\b((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|token|digest)\s+)?)"
        r"([^\s\"',}\])]+)()"
    ),
    re.compile(r"(?i)\b(bearer\s+)(?=[\w.~+/=-]*\d)([\w.~+/=-]{8,})()"),
    re.compile(r"(?i)\b((?:set-)?cookie[\"']?\s*:\s*[\"']?)([^\"'\n]+)()"),
    re.compile(
        r"(?i)\b((?:x-[\w-]*(?:key|token)|private-token|api-key)[\"']?\s*[:=]\s*[\"']?)([^\s\"',}]+)()"
    ),
    re.compile(
        r"\b([A-Z][A-Z0-9_]*(?:PASSWORD|PASSWD|_PWD|TOKEN|SECRET|API_?KEY|ACCESS_KEY)=[\"']?)"
        r"([^\s\"']+)()"
    ),
    re.compile(r"(?i)\b((?:password|passwd|pwd)=[\"']?)([^\s\"',)&;]+)()"),
    re.compile(r"(?i)((?<![\w-])--(?:[\w-]+-)?(?:password|token|api-key|secret)[ =])(\S+)()"),
    re.compile(
        r"()\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
        r"|xox[abprs]-[\w-]{10,}|sk-(?:proj-)?[A-Za-z0-9_]{20,}|dapi[0-9a-f]{32}"
        r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)()"
    ),
)
_SECRET_VARIABLE = re.compile(
    r"(?i)(?:PASSWORD|PASSWD|_PWD|PASSPHRASE|TOKEN|SECRET|_KEY|APIKEY|CONNECTION_STRING)(?:_\d+)?$"
)
_SECRET_FIELD = re.compile(
    r"(?:\w+_)?(?:password|passwd|passphrase|secret|api_?key|access_key|secret_key|private_key)$"
)


def concealed(text: str) -> str:
    """The text with `***` in the place of every secret."""
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}\3", text)
    literals = _literals(tuple(os.environ.items()))
    return literals.sub(HIDDEN, text) if literals else text


def holds_secret(field: str, text: str) -> bool:
    """Whether the text of this field of a part holds a secret, or the `***` in its place."""
    if text and (_SECRET_FIELD.search(field) or (field == "token" and _is_literal(text))):
        return True
    return concealed(text) != text or any(pattern.search(text) for pattern in _PATTERNS)


def keep(text: str) -> str:
    """The concealed text, by which `revealed` finds the whole one, in child processes too."""
    hidden = concealed(text)
    if hidden != text:
        os.environ[KEPT + hashlib.sha256(hidden.encode()).hexdigest()[:12].upper()] = text
    return hidden


def revealed(text: str, password: str) -> str | None:
    """The text with its secrets; None where the environment does not hold them.

    A variable may hold the whole text. Else the variable `password` may hold what stands for the
    only `***` in it.
    """
    if HIDDEN not in text:
        return text
    for value in os.environ.values():
        if value != text and "://" in value and concealed(value) == text:
            return value
    if text.count(HIDDEN) == 1 and (found := os.environ.get(password)):
        return text.replace(HIDDEN, quote(found, safe=""))
    return None


def forget(known: frozenset[str]) -> None:
    """Drop what `keep` has put into the environment, except these variables."""
    for name in kept() - known:
        del os.environ[name]


def kept() -> frozenset[str]:
    """The variables that `keep` has set."""
    return frozenset(name for name in os.environ if name.startswith(KEPT))


@lru_cache(maxsize=4)
def _literals(environment: tuple[tuple[str, str], ...]) -> re.Pattern[str] | None:
    """Matches the secrets that the environment holds; None where it holds none."""
    found = {form for secret in _secrets(environment) for form in (secret, quote(secret, safe=""))}
    if not (ordered := sorted(found, key=len, reverse=True)):
        return None
    # A plain word is a secret only where it stands alone.
    return re.compile(
        "|".join(rf"\b{re.escape(s)}\b" if s.isalpha() else re.escape(s) for s in ordered)
    )


def _secrets(environment: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for name, value in environment:
        inside = [match[2] for p in (_ADDRESS, _UNQUOTED) for match in p.finditer(value)]
        candidates = [*inside, *map(unquote, inside)]
        if _SECRET_VARIABLE.search(name):
            candidates.append(value)
        yield from filter(_is_literal, candidates)


def _is_literal(value: str) -> bool:
    """Whether a value can be told from ordinary text; a path to a key is no secret."""
    if value.startswith("/") or HIDDEN in value:
        return False
    return len(value) >= 8 or (len(value) >= 6 and not value.isalpha() and not value.isdigit())
