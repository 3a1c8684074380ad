"""Format results as tables: plain text for the terminal, Markdown for reports."""

from collections.abc import Container

Columns = dict[str, tuple[str, str]]  # key in a result -> column title and format


def make_rows(results: list[dict], columns: Columns, name: str, title: str) -> list[list[str]]:
    """Return a header and one row per result, with the columns that any result has. Missing values become `-`.

    name: key of the first cell in each result; title: its column title.
    """
    columns = {key: column for key, column in columns.items() if any(result.get(key) is not None for result in results)}
    rows = [[title, *(column_title for column_title, _ in columns.values())]]
    for result in results:
        values = [(result.get(key), spec) for key, (_, spec) in columns.items()]
        rows.append([str(result[name]), *("-" if value is None else format(value, spec) for value, spec in values)])
    return rows


def format_text(results: list[dict], columns: Columns, name: str = "name", title: str = "") -> str:
    """Format results as a table for the terminal. name, title: see make_rows()."""
    return align_columns(make_rows(results, columns, name, title))


def align_columns(rows: list[list[str]], left: Container[int] = (0,)) -> str:
    """Align cells for the terminal. left: the columns that are aligned to the left; the others are to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def format_markdown(rows: list[list[str]]) -> str:
    """Format cells as a Markdown table; the first row is the header."""
    head, *rows = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
