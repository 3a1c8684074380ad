"""Exceptions that any package may raise, and suggestions for mistyped names."""

import difflib
import os
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The message gives cause and remedy in one or two lines; the exit code is 1."""


class Terminated(Exception):
    """SIGTERM stopped the program after it saved its state. The message says where; the exit code is 143."""


def suggest_closest(word: str, names: Iterable[str]) -> str:
    """Return '; did you mean x?' for the closest of the names, or '' if none is close to the word."""
    matches = difflib.get_close_matches(word, list(names), 3, 0.5)
    best = max(matches, key=lambda name: len(os.path.commonprefix([word, name])), default=None)
    return f"; did you mean {best}?" if best else ""
