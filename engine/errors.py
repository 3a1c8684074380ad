"""Errors that any package may raise, and the suggestion for a mistyped name."""

import difflib
import os
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what and how, in one or two lines; the exit code is 1."""


class Terminated(Exception):
    """The work was stopped by SIGTERM and is kept. The message says where it stands; the exit code is 143."""


def suggest_closest(word: str, names: Iterable[str]) -> str:
    """'; did you mean x?' where one of the names is near, else nothing."""
    found = difflib.get_close_matches(word, list(names), 3, 0.5)
    best = max(found, key=lambda name: len(os.path.commonprefix([word, name])), default=None)
    return f"; did you mean {best}?" if best else ""
