"""Pages of HTML in one file: tables that sort, embedded pictures, style and script inside, nothing from elsewhere.

A page opens from a disk or an e-mail and makes no request to any server: a content security policy forbids it. Without
JavaScript everything but sorting, and the curves of a comparison, is there. All text is escaped; only strings of the
class Html are taken as they are.
"""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from engine.drawing.figures import ignore_missing_glyphs

FOLDER = Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?=$|\s|%)")  # at the start of a cell
TAG = re.compile(r"<[^>]*>")
MISSING = "-"
SHORT_CELL, LONG_WORD = 40, 18  # letters: a cell that is not wrapped, and a word of a header that may be broken
SMALL_SIDE = 64  # images up to this many pixels a side are embedded exactly, others as JPEG
JPEG_QUALITY = 85


class Html(str):
    """Text that is HTML already."""


def to_html(text: str) -> Html:
    """Escape a text; Html stays as it is. Undecodable bytes of file names become question marks."""
    return text if isinstance(text, Html) else Html(html.escape(str(text).encode(errors="replace").decode()))


def build_page(title: str, sections: list[Html], *, parts: Sequence[Path] = (), data: dict | None = None) -> str:
    """Return a page with a heading. parts: CSS and JavaScript files that it needs; data: what these read, as JSON."""
    texts = {path: path.read_text(encoding="utf-8") for path in (FOLDER / "page.css", FOLDER / "page.js", *parts)}
    styles, scripts = ([text for path, text in texts.items() if path.suffix == kind] for kind in (".css", ".js"))
    content = [f'<script type="application/json" id="data">{embed_json(data)}</script>'] if data is not None else []
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{to_html(title)}</title>",
            *(f"<style>\n{style}</style>" for style in styles),
            f"</head>\n<body>\n<main>\n<h1>{to_html(title)}</h1>",
            *sections,
            "</main>",
            *content,
            *(f"<script>\n{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def embed_json(data: dict) -> str:
    """Return JSON for a script element, which no text in it can end."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def make_section(title: str, *parts: Html, closed: bool = False) -> Html:
    """Return a section that a click on its title folds. closed: it starts folded."""
    summary = f"<summary><h2>{to_html(title)}</h2></summary>"
    return Html("\n".join([f"<details{'' if closed else ' open'}>{summary}", *parts, "</details>"]))


def make_list(lines: list[str], kind: str = "") -> Html:
    """Return a list. kind: its class in page.css, such as `warnings`."""
    items = "".join(f"<li>{to_html(line)}</li>" for line in lines)
    return Html(f'<ul class="{kind}">{items}</ul>' if kind else f"<ul>{items}</ul>")


def make_paragraph(text: str) -> Html:
    return Html(f"<p>{to_html(text)}</p>")


def make_table(rows: list[list[str]], caption: str, *, sortable: bool = True, footer: list[str] | None = None) -> Html:
    """Return a table that scrolls sideways on its own. The first row is the header, the first cell of a row names it.

    A click on a header sorts by its column, unless it is Html: columns of numbers, which stand to the right, by their
    value, others as text. footer: a last row that stays where it is.
    """
    header, *body = rows
    numeric = [is_numeric(column) for column in zip(*body, strict=True)] if body else [False] * len(header)
    heads = "".join(
        make_head(text, number, sortable and not isinstance(text, Html))
        for text, number in zip(header, numeric, strict=True)
    )
    lines = [f"<caption>{to_html(caption)}</caption>", f"<thead><tr>{heads}</tr></thead>", "<tbody>"]
    lines += [*(make_row(row, numeric) for row in body), "</tbody>"]
    lines += [f"<tfoot>{make_row(footer, numeric)}</tfoot>"] if footer else []
    table = "\n".join(["<table>", *lines, "</table>"])
    return Html(f'<div class="scroll" tabindex="0" role="region" aria-label="{to_html(caption)}">{table}</div>')


def make_head(text: str, numeric: bool, sortable: bool) -> str:
    """Return a cell of the header, with a button if its column can be sorted."""
    kind = choose_class(number=numeric, long=any(len(word) > LONG_WORD for word in get_text(text).split()))
    if not sortable:
        return f'<th scope="col"{kind}>{to_html(text)}</th>'
    return f'<th scope="col"{kind} aria-sort="none"><button type="button">{to_html(text)}</button></th>'


def make_row(row: list[str], numeric: list[bool]) -> str:
    """Return a row of a table. numeric: the columns of numbers; their cells carry the value that they sort by."""
    cells = []
    for position, (cell, number) in enumerate(zip(row, numeric, strict=True)):
        tag, scope = ("td", "") if position else ("th", ' scope="row"')
        value = read_number(cell) if number else None
        kind = choose_class(number=number, short=len(get_text(cell)) <= SHORT_CELL)
        kind += f' data-value="{value!r}"' if value is not None else ""
        cells.append(f"<{tag}{scope}{kind}>{to_html(cell)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def choose_class(**names: bool) -> str:
    """Return a class attribute of the names that are true, nothing if none is."""
    chosen = " ".join(name for name, true in names.items() if true)
    return f' class="{chosen}"' if chosen else ""


def get_text(cell: str) -> str:
    """Return what a reader sees of a cell."""
    return html.unescape(TAG.sub("", cell)) if isinstance(cell, Html) else str(cell)


def read_number(cell: str) -> float | None:
    """Return the number that a cell begins with, such as the mean in `95.20 ± 0.31`; None for other text."""
    found = NUMBER.match(get_text(cell).strip())
    return float(found[0].replace(",", "")) if found else None


def is_numeric(cells: Sequence[str]) -> bool:
    """Return whether every cell is a number or missing, and one is a number."""
    found = [read_number(cell) for cell in cells if cell != MISSING]
    return bool(found) and None not in found


def embed_figure(figure: Figure, text: str) -> Html:
    """Return a Matplotlib figure as an embedded SVG picture. text: what it shows, for who cannot see it."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "page"}), ignore_missing_glyphs():  # the same figure gives the same page
        figure.savefig(file, format="svg", metadata={"Date": None})
    return make_picture(file.getvalue(), "svg+xml", text, "drawn")


def embed_image(image: Image.Image | np.ndarray, text: str, max_side: int = 1200) -> Html:
    """Return an image as an embedded picture, made smaller if a side is longer than `max_side` pixels.

    image: of PIL, or uint8 (H, W, 3). text: what it shows, for who cannot see it.
    """
    image = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file, small = io.BytesIO(), max(image.size) <= SMALL_SIDE
    image.save(file, "PNG") if small else image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return make_picture(file.getvalue(), "png" if small else "jpeg", text, "pixels" if small else "photo")


def make_picture(content: bytes, kind: str, text: str, style: str) -> Html:
    """Return an img element that holds a file. kind: its type in `image/...`; style: its class in page.css."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Html(f'<img class="{style}" alt="{to_html(text)}" src="{source}">')


def make_figure(picture: Html, caption: str) -> Html:
    """Return a picture with its caption."""
    return Html(f"<figure>{picture}<figcaption>{to_html(caption)}</figcaption></figure>")


def make_grid(figures: list[Html], kind: str = "panels") -> Html:
    """Return figures side by side, as many as there is room for. kind: `panels` or `thumbnails`."""
    return Html(f'<div class="{kind}">{"".join(figures)}</div>')
