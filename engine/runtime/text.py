"""Wording of counts and names in messages and figures."""

from collections import Counter
from pathlib import Path


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun: `1 image`, `1,200 images`, `3 classes`."""
    return f"{count:,} {noun if count == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def get_distinct_names(names: list[str], paths: list[Path]) -> list[str]:
    """Return the names; those that several paths share become the shortest ends of the paths that differ.

    Two pictures `dog` become a/dog.jpg and b/dog.jpg. The same path keeps one name.
    """
    for count in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        uses = Counter(name for name, _ in set(zip(names, paths, strict=True)))
        pairs = zip(names, paths, strict=True)
        names = [str(Path(*path.parts[-count:])) if uses[name] > 1 else name for name, path in pairs]
    return names
