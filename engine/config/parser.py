"""The command-line parser: every spelling that users know, help by group, and usage errors in one line."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config.legacy_options import OPTION_ALIASES
from engine.config.option_types import OptionType, ValueList, boolean
from engine.errors import UserError, suggest_closest


class Parser(argparse.ArgumentParser):
    """Options with underscores that hyphens reach too.

    `read` returns only what was typed and `defaults` holds the rest, so that a recipe or a checkpoint can fill in
    between. prog: how the program is called. positional: the program takes words without an option name. An optional
    value would swallow them, so switches take none.
    """

    def __init__(self, description: str, prog: str | None = None, positional: bool = False):
        super().__init__(
            prog=prog,
            usage="%(prog)s DATA [options]" if positional else "%(prog)s [options]",
            description=description,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        )
        self.defaults: dict[str, object] = {}
        self.positional = positional
        self._groups: dict[str, dict[argparse.Action, str]] = {}  # title -> its options, with their help texts
        self._folded: list[str] = []
        self.group("options")
        self._group.add_argument(
            "-h",
            "--help",
            action=ShowHelp,
            nargs=0 if positional else "?",
            metavar="GROUP",
            help="show this help" + ("" if positional else ", the options of one group, or all"),
        )

    def group(self, title: str, folded: bool = False) -> None:
        """The options that follow stand under this title in --help. A folded group is only shown by `--help TITLE`."""
        self._group, self._title = self.add_argument_group(title), title
        self._groups.setdefault(title, {})
        if folded:
            self._folded.append(title)
            self.epilog = f"More options: --help GROUP, where GROUP is one of {', '.join(self._folded)}, or all."

    def get_option_names(self, *titles: str) -> set[str]:
        """The options of these groups."""
        return {action.dest for title in titles for action in self._groups[title]}

    def option(
        self, name: str, *aliases: str, default=None, shown="", help: str = "", hidden: bool = False, **kwargs
    ) -> None:
        """Add an option to the current group. shown: what --help says of the default where that is None."""
        kind = kwargs.get("type")
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
        """Options of the current group that --help never shows. declarations: name -> arguments of `option`."""
        for name, declaration in declarations.items():
            self.option(f"--{name}", hidden=True, **declaration)

    def show_help(self, title: str | None) -> None:
        """Print the options of one group (any word of its title), of `all`, or, without a title, of all but the folded
        groups, and exit.
        """
        if title and title != "all":
            found = {name for name in self._groups if title in (name, *name.split(", "))}
            if not found:
                names = [*self._groups, "all"]
                self.error(f"--help {title}: the groups are {', '.join(names)}{suggest_closest(title, names)}")
            for action in self._actions:
                action.help = argparse.SUPPRESS
        else:
            found = self._folded if title else ()
        for action, text in (one for name in found for one in self._groups[name].items()):
            action.help = text
        self.print_help()
        self.exit()

    def find_aliases(self) -> dict[str, str]:
        """Other names of the options -> their names, as they are typed."""
        own = {option.removeprefix("--") for option in self._option_string_actions}
        found = {alias: name for name, aliases in OPTION_ALIASES.items() if name in own for alias in aliases}
        return {f"--{alias}": f"--{name}" for alias, name in found.items() if alias not in own}

    def read(self, argv: list[str] | None = None) -> dict[str, object]:
        """The options given in argv (default: the command line). An error ends with one line, exit code 2."""
        words, aliases = [], self.find_aliases()
        for word in map(str, sys.argv[1:] if argv is None else argv):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = "--" + name[2:].replace("-", "_")
                word = aliases.get(name, name) + equals + value
            words.append(word)
        typed, unknown = self.parse_known_args(words)
        if unknown:
            names = [*self._option_string_actions, *aliases]
            hint = suggest_closest(unknown[0].partition("=")[0], names)
            self.error(f"unknown option {unknown[0]}{hint or '; see --help'}")
        return {key: join_values(value) for key, value in vars(typed).items()}

    @contextmanager
    def usage_errors(self, option: str = "") -> Iterator[None]:
        """Around code that raises ValueError for bad values: it becomes a usage error. option: named before it."""
        try:
            yield
        except ValueError as error:
            self.error(f"{option}: {error}" if option else str(error))

    def error(self, message: str):
        """End with one line and exit code 2. Of several processes, the first one of each machine prints it."""
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)


class ShowHelp(argparse.Action):
    """-h, --help [GROUP]: print help and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.show_help(values or None)


def join_values(value):
    """[ValueList(8), ValueList(16)] -> [8, 16]; anything else as it is."""
    if isinstance(value, list) and value and isinstance(value[0], ValueList):
        return [one for part in value for one in part]
    return value


def read_config(path: str, kind: str = "classifier") -> dict[str, object]:
    """The options in the config.json of an earlier run of this kind. Raises UserError for another file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        options, held = content["options"], content.get("kind", "classifier")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--config {path}: not the config.json of a run ({type(error).__name__}: {error})") from error
    if held != kind:
        raise UserError(f"--config {path}: of a run that trained a {held}\nhere one of a {kind} is wanted")
    return options


def check_output_path(parser: Parser, option: str, file: Path) -> None:
    """End with a usage error if `file` could not be written, before the work rather than after it."""
    file = file.absolute()
    if not file.parent.is_dir():
        parser.error(f"{option} {file}: there is no folder {file.parent}")
    if file.is_dir():
        parser.error(f"{option} {file}: a folder; name a file in it")
    if not os.access(file.parent, os.W_OK):
        parser.error(f"{option} {file}: no permission to write in {file.parent}")
