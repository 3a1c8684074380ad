"""Command lines: a parser that takes every spelling users know, and one place where errors become one line and an exit
code.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError, suggest_closest

YES, NO = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


def boolean(text: str) -> bool:
    if text.lower() in YES | NO:
        return text.lower() in YES
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def int_at_least(minimum: int = 0) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return convert


def positive_or_minus_one(text: str) -> int:
    return -1 if text == "-1" else int_at_least(1)(text)


def fraction_or_off(text: str) -> float:
    return 0.0 if text.lower() in NO else float_in_range(0, 1)(text)


class ValueList(list):
    """Values that came in one word, as "8 16"; Parser.read joins them with those of the next word."""


def int_list(text: str) -> ValueList:
    """Positive whole numbers."""
    return ValueList(int_at_least(1)(word) for word in text.replace(",", " ").split())


def choices(names: Iterable[str], aliases: dict[str, str] | None = None) -> Callable[[str], ValueList]:
    """As one_of(), for one or more names in a word."""
    convert = choice(names, aliases)
    return lambda text: ValueList(convert(word) for word in text.split())


def float_in_range(minimum: float = 0.0, maximum: float = float("inf")) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not minimum <= value <= maximum:
            limits = f"at least {minimum:g}" if maximum == float("inf") else f"between {minimum:g} and {maximum:g}"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return convert


def pixel_fraction(text: str) -> float:
    """A distance between pixels in 0..1, as --eps takes it: `8/255`, `0.03`, `0`."""
    above, slash, below = text.partition("/")
    try:
        value = float(above) / (float(below) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255, got {text!r}") from None
    if not 0 <= value <= 1:
        remedy = f"; write {text.strip()}/255" if not slash and 1 < value <= 255 else ""
        raise argparse.ArgumentTypeError(f"pixels are in 0..1, got {text!r}{remedy}")
    return value


def choice(names: Iterable[str], aliases: dict[str, str] | None = None) -> Callable[[str], str]:
    """One of `names`, or of the aliases, whatever the case. The error lists the names and the closest one."""
    names, aliases = list(names), aliases or {}

    def convert(text: str) -> str:
        word = text.lower()
        if word in names or word in aliases:
            return aliases.get(word, word)
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(names)}{suggest_closest(word, [*names, *aliases])}"
        )

    return convert


class Parser(argparse.ArgumentParser):
    """Options with underscores that hyphens reach too; it keeps apart what was typed and what is a default.

    `read` gives only what was typed, `defaults` holds the rest, so that a recipe or a checkpoint can fill in between.
    prog: how it is called. positional: words without an option's name follow, which an optional value would swallow:
    so switches take none.
    """

    def __init__(self, description: str, prog: str | None = None, positional: bool = False):
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        )
        self.defaults: dict[str, object] = {}
        self.positional = positional
        self._group = None
        self._title = ""
        self._members: dict[str, set[str]] = {}

    def group(self, title: str) -> None:
        """The options that follow stand under this title in --help."""
        self._group, self._title = self.add_argument_group(title), title

    def group_of(self, *titles: str) -> set[str]:
        """The options of these groups."""
        return set().union(*(self._members[title] for title in titles))

    def option(
        self, name: str, *aliases: str, default=None, shown: str | None = None, help: str = "", **kwargs
    ) -> None:
        """Add `name` and its aliases. shown: what --help says of the default where that is not its plain value."""
        key = kwargs.pop("dest", name.lstrip("-"))
        if kwargs.get("type") is boolean and self.positional:
            kwargs = {"action": "store_true"}
        elif kwargs.get("type") is boolean:
            kwargs |= {"nargs": "?", "const": True, "metavar": "true|false"}
        if name.startswith("-"):
            kwargs["dest"] = key
        text = shown if shown is not None else " ".join(map(str, default)) if isinstance(default, list) else default
        note = "" if text in (None, "") else f" [{str(text).lower() if isinstance(text, bool) else text}]"
        text = help if help == argparse.SUPPRESS else (help + note).replace("%", "%%")
        (self._group or self).add_argument(name, *aliases, help=text, **kwargs)
        self.defaults[key] = default
        self._members.setdefault(self._title, set()).add(key)

    def read(self, argv: list[str] | None = None) -> dict[str, object]:
        """The options given in argv (default: the command line), by canonical name. Exit code 2 with one line on an
        error.
        """
        words = []
        for word in sys.argv[1:] if argv is None else argv:
            name, equals, value = str(word).partition("=")
            words.append("--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else str(word))
        typed, unknown = self.parse_known_args(words)
        if unknown:
            names = [option for action in self._actions for option in action.option_strings]
            hint = suggest_closest(unknown[0].partition("=")[0], names)
            self.error(f"unknown option {unknown[0]}{hint or '; --help lists them all'}")
        return {key: join_values(value) for key, value in vars(typed).items()}

    @contextmanager
    def usage_errors(self, option: str = "") -> Iterator[None]:
        """Around code that raises ValueError for bad values: it becomes a usage error. option: named before it."""
        try:
            yield
        except ValueError as error:
            self.error(f"{option}: {error}" if option else str(error))

    def error(self, message: str):
        """End with one line and exit code 2; of several processes, started alike, the first of each machine says it."""
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)


def join_values(value):
    """[Several(8), Several(16)] -> [8, 16]; anything else as it is."""
    if isinstance(value, list) and value and isinstance(value[0], ValueList):
        return [one for part in value for one in part]
    return value


def read_config(path: str, kind: str = "classifier") -> dict[str, object]:
    """The options in the config.json of an earlier run that trained such a thing. Raises UserError for another file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        options, held = content["options"], content.get("kind", "classifier")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--config {path}: not the config.json of a run ({type(error).__name__}: {error})") from error
    if held != kind:
        raise UserError(f"--config {path}: of a run that trained a {held}\nhere one of a {kind} is wanted")
    return options


def check_output_path(parser: "Parser", option: str, file: Path) -> None:
    """End with a usage error where the file could not be written after the work."""
    file = file.absolute()
    if not file.parent.is_dir():
        parser.error(f"{option} {file}: there is no folder {file.parent}")
    if file.is_dir():
        parser.error(f"{option} {file}: a folder; name a file in it")
    if not os.access(file.parent, os.W_OK):
        parser.error(f"{option} {file}: no permission to write in {file.parent}")
