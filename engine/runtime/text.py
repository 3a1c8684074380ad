"""Wording of counts in messages."""


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun: `1 image`, `1,200 images`, `3 classes`."""
    return f"{count:,} {noun if count == 1 else noun + ('es' if noun.endswith('s') else 's')}"
