"""Command lines: a parser that takes every spelling users know, and one place where errors become one line and an exit
code.
"""

import argparse
import difflib
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

YES, NO = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


class UserError(Exception):
    """Something the user can mend. The message says what and how, in one or two lines; the exit code is 1."""


class Terminated(Exception):
    """The work was stopped by SIGTERM and is kept. The message says where it stands; the exit code is 143."""


def yes_no(text: str) -> bool:
    if text.lower() in YES | NO:
        return text.lower() in YES
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def whole(minimum: int = 0) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return convert


def whole_or_minus_one(text: str) -> int:
    return -1 if text == "-1" else whole(1)(text)


def share_or_no(text: str) -> float:
    return 0.0 if text.lower() in NO else number(0, 1)(text)


class Several(list):
    """Values that came in one word, as "8 16"; Parser.read joins them with those of the next word."""


def several(text: str) -> Several:
    """Positive whole numbers."""
    return Several(whole(1)(word) for word in text.replace(",", " ").split())


def each_of(names: Iterable[str], aliases: dict[str, str] | None = None) -> Callable[[str], Several]:
    """As one_of(), for one or more names in a word."""
    convert = one_of(names, aliases)
    return lambda text: Several(convert(word) for word in text.split())


def number(minimum: float = 0.0, maximum: float = float("inf")) -> Callable[[str], float]:
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


def pixel_units(text: str) -> float:
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


def closest(word: str, names: Iterable[str]) -> str:
    """'; did you mean x?' where one of the names is near, else nothing."""
    found = difflib.get_close_matches(word, list(names), 3, 0.5)
    best = max(found, key=lambda name: len(os.path.commonprefix([word, name])), default=None)
    return f"; did you mean {best}?" if best else ""


def one_of(names: Iterable[str], aliases: dict[str, str] | None = None) -> Callable[[str], str]:
    """One of `names`, or of the aliases, whatever the case. The error lists the names and the closest one."""
    names, aliases = list(names), aliases or {}

    def convert(text: str) -> str:
        word = text.lower()
        if word in names or word in aliases:
            return aliases.get(word, word)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}{closest(word, [*names, *aliases])}")

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
        if kwargs.get("type") is yes_no and self.positional:
            kwargs = {"action": "store_true"}
        elif kwargs.get("type") is yes_no:
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
            hint = closest(unknown[0].partition("=")[0], names)
            self.error(f"unknown option {unknown[0]}{hint or '; --help lists them all'}")
        return {key: joined(value) for key, value in vars(typed).items()}

    def error(self, message: str):
        """End with one line and exit code 2; of several processes, started alike, the first of each machine says it."""
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("LOCAL_RANK", "0") == "0" else None)


def joined(value):
    """[Several(8), Several(16)] -> [8, 16]; anything else as it is."""
    if isinstance(value, list) and value and isinstance(value[0], Several):
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


def check_place(parser: "Parser", option: str, file: Path) -> None:
    """End with a usage error where the file could not be written after the work."""
    file = file.absolute()
    if not file.parent.is_dir():
        parser.error(f"{option} {file}: there is no folder {file.parent}")
    if file.is_dir():
        parser.error(f"{option} {file}: a folder; name a file in it")
    if not os.access(file.parent, os.W_OK):
        parser.error(f"{option} {file}: no permission to write in {file.parent}")


def run(main: Callable[[], None]) -> None:
    """Call a script's main and leave with its exit code: 0 done, 1 an error explained in a line, 2 usage, 130 after
    Ctrl-C, 143 after SIGTERM. Of several processes the first one speaks for all.
    """
    debug = "--debug" in sys.argv
    if "WORLD_SIZE" in os.environ and not debug:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read by torch, which would add a page to each line
    try:
        main()
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Terminated as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by SIGTERM: {stopped}", file=sys.stderr)
        sys.exit(143)
    except Exception as error:
        if debug:
            traceback.print_exc()
        script = Path(sys.argv[0])
        tell(f"{script.parent.name if script.stem == '__main__' else script.name}: {explain(error)}")
        sys.exit(1)


def tell(text: str) -> None:
    """Show an error that ends the program."""
    if "WORLD_SIZE" in os.environ and "engine.distributed" in sys.modules:
        sys.modules["engine.distributed"].tell(text)
    else:
        print(text, file=sys.stderr)


def explain(error: Exception) -> str:
    """One or two lines for a person."""
    if isinstance(error, UserError):
        return str(error)
    distributed = sys.modules.get("engine.distributed")
    if distributed and distributed.is_lost_contact(error):
        first = distributed.first_line(error)
        return f"lost contact with another process: {first}\nwhat was saved is intact: continue with --checkpoint auto"
    if type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error):
        remedy = "try a smaller --batch_size or --image_size (detect.py: --min_size)"
        return f"out of memory: {str(error).splitlines()[0]}\n{remedy}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error}"
    first = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first}\nrun again with --debug for the traceback"
