"""Option types: convert the text of an option, or raise ArgumentTypeError with the allowed values."""

import argparse
import ast
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

from engine.errors import suggest_closest

MAX_NAME_BYTES = 200  # most file systems allow 255, and files of a run may carry its name with an ending
MAX_INT = 10**9  # no option counts more; torch refuses integers beyond 64 bits
MAX_SEED = 2**63 - 1
PATH_METAVARS = {"DIR", "FILE", "PATH", "DATA"}  # also with an ending, such as FILE.json
YES, NO = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


@dataclass(frozen=True, eq=False)
class OptionType:
    """A conversion of text to a value.

    metavar: placeholder of the value in --help. If it is NAME, the help text begins with the `names` to choose from.
    """

    convert: Callable[[str], object]
    metavar: str
    names: Sequence[str] = ()

    def __call__(self, text: str):
        return self.convert(text)


class ValueList(list):
    """The values in one argument, such as "8 16". Parser.read() joins them with those of the next argument."""


def path(text: str) -> str:
    """Expand a leading ~ or ~user, also in NAME=FILE. The shell does not do so in --data_dir=~/images."""
    name, equals, file = ("", "", text) if text.startswith("~") else text.rpartition("=")
    expanded = os.path.expanduser(file)
    return text if expanded == file else name + equals + expanded  # argparse knows its default by identity


def boolean(text: str) -> bool:
    """Convert true, yes, 1, on and false, no, 0, off, in any case."""
    if text.lower() in YES | NO:
        return text.lower() in YES
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def yes_no_or_path(text: str) -> bool | str:
    """Convert a word of boolean() to its value; return any other text, with ~ expanded."""
    return boolean(text) if text.lower() in YES | NO else path(text)


def int_at_least(minimum: int = 0, maximum: int = MAX_INT) -> OptionType:
    """Return the type of an integer from minimum to maximum."""

    def convert(text: str) -> int:
        if not re.fullmatch("[+-]?[0-9]+", text) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {text!r}")
        if int(text) > maximum:
            raise argparse.ArgumentTypeError(f"expected an integer of at most {maximum}, got {text!r}")
        return int(text)

    return OptionType(convert, "N")


def float_in_range(minimum: float = 0.0, maximum: float = math.inf, *, exclude: Sequence[float] = ()) -> OptionType:
    """Return the type of a finite number from minimum to maximum. exclude: those of the two that are not allowed."""
    limits = f"{'above' if minimum in exclude else 'of at least'} {minimum:g}"
    if maximum < math.inf:
        limits += f" and {'below' if maximum in exclude else 'at most'} {maximum:g}"
        limits = limits if exclude else f"between {minimum:g} and {maximum:g}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (minimum <= value <= maximum and math.isfinite(value)) or value in exclude:
            finite = "" if math.isfinite(value) else "finite "
            raise argparse.ArgumentTypeError(f"expected a {finite}number {limits}, got {text!r}")
        return value

    return OptionType(convert, "X")


def choice(names: Iterable[str], aliases: dict[str, str] | None = None) -> OptionType:
    """Return the type of one of `names`, in any case. aliases: alias -> name. Errors suggest the closest name."""
    names, aliases = list(names), aliases or {}

    def convert(text: str) -> str:
        word = text.lower()
        if word in names or word in aliases:
            return aliases.get(word, word)
        raise argparse.ArgumentTypeError(
            f"invalid choice {text!r}{suggest_closest(word, [*names, *aliases])} (choose from {', '.join(names)})"
        )

    short = "|".join(names)
    return OptionType(convert, short if len(short) < 25 else "NAME", names)


def choices(names: Iterable[str], aliases: dict[str, str] | None = None) -> OptionType:
    """Return the type of an argument that may hold several names separated by spaces; otherwise like choice()."""
    one = choice(names, aliases)
    return OptionType(lambda text: ValueList(map(one, text.split())), "NAME", one.names)


def model_name(models: ModuleType, names: Iterable[str], aliases: dict[str, str]) -> OptionType:
    """Return the type of a network: one of `names`, as in choice(), or LIBRARY:NAME. models: the package `models`."""
    ours = choice(names, aliases)

    def convert(text: str) -> str:
        if not models.split_model_name(text)[0]:
            try:
                return ours(text)
            except argparse.ArgumentTypeError as error:
                if found := models.find_library_name(text.lower()):
                    raise argparse.ArgumentTypeError(f"{text!r} is a network of torchvision; write {found}") from error
                raise
        try:
            return models.check_model_name(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return OptionType(convert, "NAME", [*ours.names, *(f"{library}:NAME" for library in models.LIBRARIES)])


def key_value(text: str) -> dict[str, object]:
    """Convert KEY=VALUE to {KEY: VALUE}. The value is a Python literal, true, false, none, or else text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    if (word := value.lower()) in ("true", "false", "none"):
        return {key: {"true": True, "false": False, "none": None}[word]}
    try:
        parsed = json.loads(json.dumps(ast.literal_eval(value)))  # tuples become lists, as in config.json
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        parsed = value
    return {key: parsed}


positive = float_in_range(exclude=[0])
fraction_below_one = float_in_range(0, 1, exclude=[1])
positive_or_minus_one = OptionType(lambda text: -1 if text == "-1" else int_at_least(1)(text), "N")
fraction_or_off = OptionType(  # an earlier code writes "--dropout False"
    lambda text: 0.0 if text.lower() in NO else fraction_below_one(text), "X"
)
int_list = OptionType(  # positive integers, separated by spaces or commas
    lambda text: ValueList(map(int_at_least(1), text.replace(",", " ").split())), "N"
)

seed_list = OptionType(  # seeds, separated by spaces or commas
    lambda text: ValueList(map(int_at_least(0, MAX_SEED), text.replace(",", " ").split())), "SEED"
)


def convert_optimizer_name(text: str) -> str:
    """Convert sgd, adamw or timm:NAME, in any case. Whether timm has NAME is checked when the optimizer is built."""
    word = text.lower()
    if word in ("sgd", "adamw") or word.startswith("timm:"):
        return word
    raise argparse.ArgumentTypeError(f"expected sgd, adamw or timm:NAME, such as timm:lamb; got {text!r}")


optimizer_name = OptionType(convert_optimizer_name, "NAME")


def run_name(parent_option: str) -> OptionType:
    """Return the type of the name of a run, which is one part of a path. parent_option: names the folder of runs."""

    def convert(text: str) -> str:
        if not text.strip(" .") or set(text) & set("/\\") or not text.isprintable():
            raise argparse.ArgumentTypeError(
                f"expected one name without slashes, got {text!r}; give the folder to create it in with {parent_option}"
            )
        if (length := len(os.fsencode(text))) > MAX_NAME_BYTES:
            raise argparse.ArgumentTypeError(f"expected a name of at most {MAX_NAME_BYTES} bytes, got {length}")
        return text

    return OptionType(convert, "NAME")


def pixel_fraction(text: str) -> float:
    """Convert a pixel difference in 0..1, such as `8/255`, `0.03` or `0`."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255, got {text!r}") from None
    if not 0 <= value <= 1:
        remedy = f"; write {text.strip()}/255" if not slash and 1 < value <= 255 else ""
        raise argparse.ArgumentTypeError(f"expected a value between 0 and 1, got {text!r}{remedy}")
    return value


def format_option(value) -> str:
    """Return the text of a value, as one would type it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(format_option, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
