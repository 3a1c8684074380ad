"""Results as tables: text for a terminal, Markdown for a report."""

Columns = dict[str, tuple[str, str]]  # key of a result -> title and format


def make_rows(results: list[dict], columns: Columns, name: str, title: str) -> list[list[str]]:
    """The header and a row a result, with the columns that some result has; a dash where it has none."""
    columns = {key: column for key, column in columns.items() if any(one.get(key) is not None for one in results)}
    rows = [[title, *(head for head, _ in columns.values())]]
    for one in results:
        values = [(one.get(key), form) for key, (_, form) in columns.items()]
        rows.append([str(one[name]), *("-" if value is None else format(value, form) for value, form in values)])
    return rows


def format_text(results: list[dict], columns: Columns, name: str = "name", title: str = "") -> str:
    """name: the key of what stands in front of each row; title: over it."""
    return align_columns(make_rows(results, columns, name, title))


def align_columns(rows: list[list[str]]) -> str:
    """Cells for a terminal: the first of each row to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        for first, *rest in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def format_markdown(rows: list[list[str]]) -> str:
    """Cells for a report; the first row is the header."""
    head, *rows = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
