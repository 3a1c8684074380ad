"""The command-line parser: aliases of options, help by group, and usage errors in one line."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.config.legacy_options import OPTION_ALIASES
from engine.config.option_types import PATH_METAVARS, OptionType, ValueList, boolean, path
from engine.errors import UserError, suggest_closest


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose options can be written with underscores or hyphens.

    read() returns only the options that were typed. Their defaults are in `defaults`, so that a recipe or a checkpoint
    can fill in the others. prog: name of the program. positional: what --help calls the arguments without an option
    name, if the program takes any; its switches then have no value, because an optional value would swallow one.
    """

    def __init__(self, description: str, prog: str | None = None, positional: str = ""):
        super().__init__(
            prog=prog,
            usage=f"%(prog)s {positional} [options]" if positional else "%(prog)s [options]",
            description=description,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        )
        self.defaults: dict[str, object] = {}
        self.positional = positional
        self._groups: dict[str, dict[argparse.Action, str]] = {}  # title -> options and their help texts
        self._topics: dict[str, set[str]] = {}  # title -> words with which --help shows the group
        self._folded: list[str] = []
        self.group("options")
        self._group.add_argument(
            "-h",
            "--help",
            action=ShowHelp,
            nargs=0 if positional else "?",
            metavar="GROUP",
            help="show this help (defaults are in brackets)"
            + ("" if positional else ", the options of one group, or all options"),
        )

    def group(self, title: str, folded: bool = False, topics: Sequence[str] = ()) -> None:
        """Start a group of options with this title in --help. Only `--help TITLE` shows a folded group.

        topics: further words in place of TITLE; a word may stand for several groups.
        """
        self._group, self._title = self.add_argument_group(title), title
        self._topics[title] = {title, *title.split(", "), *topics}
        self._groups.setdefault(title, {})
        if folded:
            self._folded.append(title)
            self.epilog = f"More options: --help GROUP, where GROUP is one of {', '.join(self._folded)}, or all."

    def get_option_names(self, *titles: str) -> set[str]:
        """Return the names of the options in these groups."""
        return {action.dest for title in titles for action in self._groups[title]}

    def option(
        self, name: str, *aliases: str, default=None, shown="", help: str = "", hidden: bool = False, **kwargs
    ) -> None:
        """Add an option to the current group. shown: what --help shows as its default if the default is None."""
        kind, metavar = kwargs.get("type"), kwargs.get("metavar")
        if kind is None and isinstance(metavar, str) and metavar.split(".")[0] in PATH_METAVARS:
            kwargs["type"] = path
        if kind is boolean and self.positional:
            kwargs = {"action": "store_true"}
        elif kind is boolean:
            kwargs |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif isinstance(kind, OptionType) and "metavar" not in kwargs:
            kwargs["metavar"] = kind.metavar
            help = "; ".join(filter(None, [*([", ".join(kind.names)] if kind.metavar == "NAME" else []), help]))
        text = shown if default is None else " ".join(map(str, default)) if isinstance(default, list) else default
        note = "" if text in (None, "") else f" [{str(text).lower() if isinstance(text, bool) else text}]"
        text = argparse.SUPPRESS if hidden else (help + note).replace("%", "%%")
        action = self._group.add_argument(name, *aliases, help=text, **kwargs)
        self.defaults[action.dest] = default
        self._groups[self._title][action] = text
        if self._title in self._folded:
            action.help = argparse.SUPPRESS

    def hidden_options(self, declarations: dict[str, dict]) -> None:
        """Add options to the current group that --help never shows. declarations: name -> arguments of option()."""
        for name, declaration in declarations.items():
            self.option(f"--{name}", hidden=True, **declaration)

    def show_help(self, title: str | None) -> None:
        """Print the help and exit.

        title: a group (any word of its title, or a topic) or `all`. None: all groups except the folded ones.
        """
        if title and title != "all":
            found = {name for name in self._groups if title in self._topics[name]}
            if not found:
                names = [*self._groups, "all"]
                self.error(
                    f"--help {title}: no such group{suggest_closest(title, names)} (choose from {', '.join(names)})"
                )
            for action in self._actions:
                action.help = argparse.SUPPRESS
        else:
            found = self._folded if title else ()
        for action, text in (item for name in found for item in self._groups[name].items()):
            action.help = text
        self.print_help()
        self.exit()

    def find_aliases(self) -> dict[str, str]:
        """Return other spellings of the options -> their names, both with leading hyphens."""
        own = {option.removeprefix("--") for option in self._option_string_actions}
        found = {alias: name for name, aliases in OPTION_ALIASES.items() if name in own for alias in aliases}
        return {f"--{alias}": f"--{name}" for alias, name in found.items() if alias not in own}

    def read(self, argv: list[str] | None = None) -> dict[str, object]:
        """Return the options in argv (default: the command line). An error prints one line and exits with code 2."""
        words, aliases = [], self.find_aliases()
        for word in map(str, sys.argv[1:] if argv is None else argv):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = "--" + name[2:].replace("-", "_")
                word = aliases.get(name, name) + equals + value
            words.append(word)
        typed, unknown = self.parse_known_args(words)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(f"unexpected argument {unknown[0]}; see --help")
            names = [*self._option_string_actions, *aliases]
            hint = suggest_closest(unknown[0].partition("=")[0], names)
            self.error(f"unknown option {unknown[0]}{hint or '; see --help'}")
        return {key: join_values(value) for key, value in vars(typed).items()}

    @contextmanager
    def usage_errors(self, option: str = "") -> Iterator[None]:
        """Turn a ValueError of the code inside into a usage error. option: prefix of the message."""
        try:
            yield
        except ValueError as error:
            self.error(f"{option}: {error}" if option else str(error))

    def error(self, message: str):
        """Print the message in one line and exit with code 2. Of several processes, one per machine prints it."""
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)


class ShowHelp(argparse.Action):
    """The action of -h, --help [GROUP]."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.show_help(values or None)


def join_values(value):
    """Convert [ValueList(8), ValueList(16)] to [8, 16] and [{"a": 1}, {"b": 2}] to one dictionary; return anything else
    unchanged.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {key: one for part in value for key, one in part.items()}
    if isinstance(value, list) and value and isinstance(value[0], ValueList):
        return [one for part in value for one in part]
    return value


def read_config(path: str, kind: str = "classifier") -> dict[str, object]:
    """Return the options in the config.json of an earlier run of this kind. Raises UserError for any other file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        options, saved_kind = content["options"], content.get("kind", "classifier")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--config {path}: not the config.json of a run ({type(error).__name__}: {error})") from error
    if saved_kind != kind:
        raise UserError(f"--config {path}: this is the config.json of a {saved_kind} run; expected one of a {kind} run")
    return options


def check_figure_path(parser: Parser, option: str, file: str, endings: Sequence[str]) -> None:
    """Exit with a usage error unless the name of a figure ends in one of the file types."""
    if Path(file).suffix.lower().removeprefix(".") not in endings:
        *others, last = (f".{ending}" for ending in endings)
        parser.error(f"{option} {file}: give a file name that ends in {', '.join(others)} or {last}")


def read_start(file: Path) -> bytes:
    """Return the first 100 bytes of a file; none if it cannot be read."""
    try:
        with open(file, "rb") as content:
            return content.read(100)
    except OSError:
        return b""


def check_output_path(parser: Parser, option: str, file: Path, starts: tuple[bytes, ...] = ()) -> None:
    """Exit with a usage error if `file` cannot be written, so that the run fails at its start and not at its end.

    starts: how the files that the option writes begin; another existing file, which may be the user's, is kept
    unless it is empty.
    """
    file = file.absolute()
    if not file.parent.is_dir():
        parser.error(f"{option} {file}: the folder {file.parent} does not exist")
    if file.is_dir():
        parser.error(f"{option} {file}: this is a folder; give the name of a file")
    if not os.access(file.parent, os.W_OK):
        parser.error(f"{option} {file}: no permission to write in {file.parent}")
    if starts and file.is_file() and file.stat().st_size and not read_start(file).startswith(starts):
        parser.error(f"{option} {file}: this file was not written by {option}; choose another name, or delete it")
