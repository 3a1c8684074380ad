"""Show progress: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

LINE_SECONDS = 60.0  # between two lines of progress_bar() without a terminal


def use_progress_bar(no_progress: bool) -> bool:
    """Return whether to show a bar: only on a terminal, and not with --no_progress."""
    return sys.stderr.isatty() and not no_progress


class Progress:
    """The progress of one pass of `total` steps. Call it with the step and any numbers to show.

    bar: show a bar. lines: without a bar, print a line for each call that has numbers.
    """

    def __init__(self, title: str, total: int, *, bar: bool, lines: bool = True):
        self.title, self.total, self.lines = title, total, lines
        self.bar = tqdm(total=total, desc=title, leave=False, dynamic_ncols=True) if bar else None

    def __call__(self, step: int, **numbers: float) -> None:
        text = "  ".join(f"{key.replace('_per_second', '/s')} {value:.4g}" for key, value in numbers.items())
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if text:
                self.bar.set_postfix_str(text)
        elif self.lines and text:
            print(f"{self.title} {step}/{self.total}  {text}", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.close()


def progress_bar(items: Iterable, *, total: int | None = None, desc: str = "", unit: str = "it") -> Iterable:
    """Wrap an iterable to show its progress: tqdm on a terminal, elsewhere one line per minute. Only the main process
    shows it.
    """
    if os.environ.get("RANK", "0") != "0":
        return items
    if sys.stderr.isatty():
        return tqdm(items, total=total, desc=desc, unit=unit, leave=False)
    return iterate_with_lines(items, total, desc)


def iterate_with_lines(items: Iterable, total: int | None, title: str) -> Iterable:
    last_time = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() > last_time + LINE_SECONDS:
            last_time = time.monotonic()
            print(f"{title} {number:,}" + (f" of {total:,}" if total else ""), flush=True)
