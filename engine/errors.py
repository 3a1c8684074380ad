"""Exceptions that any package may raise, and suggestions for mistyped names."""

import difflib
import os
import re
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The message gives cause and remedy in one or two lines; the exit code is 1."""


class Terminated(Exception):
    """SIGTERM stopped the program after it saved its state. The message says where; the exit code is 143."""


def suggest_closest(word: str, names: Iterable[str]) -> str:
    """Return '; did you mean x?' for the closest of the names, or '' if none is close to the word.

    Leading hyphens of options do not count: they would make each option similar to any other.
    """
    word, bare = word.lstrip("-"), {name.lstrip("-"): name for name in names}
    matches = difflib.get_close_matches(word, list(bare), 3, 0.55)
    best = max(matches, key=lambda name: len(os.path.commonprefix([word, name])), default=None)
    return f"; did you mean {bare[best]}?" if best else ""


def explain_missing(name: str | os.PathLike, otherwise: str = "no such file") -> str:
    """Return why nothing has this name and what can be done, for a URL, `-` and a name of the hub; else `otherwise`."""
    name = os.fspath(name)
    if re.match(r"(timm[/.]|hf[-_]hub:)", name):
        return (
            "names of the hub are not read; give timm:NAME for a network of timm with its weights, or download the "
            "file and give timm:NAME=FILE"
        )
    if re.match(r"[A-Za-z][\w+.-]+:/", name):
        return "URLs are not opened; download the file, for example with curl -LO URL, and give its path"
    return "standard input is not read; save it to a file and give its path" if name == "-" else otherwise


def get_first_error_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def get_compile_error(error: Exception) -> str:
    """Return the telling line of an error of torch.compile: the first error of a compiler, else the first line, without
    those that only name the backend.
    """
    cause = getattr(error, "inner_exception", error)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return next((line.strip() for line in lines if "error: " in line), lines[0])[:200]
