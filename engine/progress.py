"""Progress: one bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def bars_wanted(no_progress: bool) -> bool:
    return sys.stderr.isatty() and not no_progress


class Progress:
    """One pass of `total` steps. `show(step, text)` moves the bar, or prints a line where there is none."""

    def __init__(self, title: str, total: int, *, bar: bool, lines: bool = True):
        self.title, self.total, self.lines = title, total, lines
        self.bar = tqdm(total=total, desc=title, leave=False, dynamic_ncols=True) if bar else None

    def show(self, step: int, text: str = "") -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
        elif self.lines:
            print(f"{self.title} {step}/{self.total} {text}", flush=True)

    def show_scores(self, step: int, loss: float, accuracy: float) -> None:
        self.show(step, f"loss {loss:.4f}  acc {100 * accuracy:.2f}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.close()


def over(items: Iterable, **kwargs) -> Iterable:
    """tqdm on a terminal; silent elsewhere."""
    return tqdm(items, leave=False, disable=None, **kwargs)
