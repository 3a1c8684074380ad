import json
import re

import numpy as np
import pytest
from PIL import Image

from evaluation.html import (
    Html,
    build_page,
    embed_image,
    make_grid,
    make_list,
    make_section,
    make_table,
    read_number,
    to_html,
)

NASTY = "<img src=x onerror=alert(1)> & \"quoted\" 'name' </script>"
ROWS = [
    ["name", "accuracy", "seeds", "images"],
    ["b", "9.50 ± 0.31", "1: +2.0", "1,200"],
    ["a", "95.20 ± 0.10", "-", "80"],
    [NASTY, "-", "0: -1.0", "900"],
    ["c", "-2.00", "2: +1.0", "7"],
]


def make_page() -> str:
    dots = embed_image(np.full((8, 8, 3), 200, np.uint8), NASTY)
    parts = [make_list([NASTY], "warnings"), make_section(NASTY, make_table(ROWS, NASTY)), make_grid([dots])]
    return build_page(NASTY, [*parts, make_section("folded", Html("<p>below</p>"), closed=True)], data={"name": NASTY})


def test_names_are_escaped_everywhere():
    page = make_page()
    assert "<img src=x" not in page and page.count("</script>") == 2  # the data and page.js
    assert page.count(to_html(NASTY)) == 8  # title, heading, list, section, caption, its label, cell and picture
    (data,) = re.findall(r'id="data">(.*?)</script>', page)
    assert json.loads(data) == {"name": NASTY}


def test_undecodable_file_names_can_be_written():
    page = build_page("a\udcffb", [make_table([["x"], ["c\udcffd"]], "e\udcff")], data={"name": "f\udcff"})
    assert "a?b" in page and "c?d" in page and page.encode()


def test_html_is_not_escaped_twice():
    cell = Html("<b>7.5 &amp; more</b>")
    assert to_html(cell) == cell and read_number(cell) == 7.5


@pytest.mark.parametrize(
    ("cell", "value"),
    [("95.20 ± 0.31", 95.2), ("+1.5", 1.5), ("1,234 images", 1234), ("94.0 (epoch 3)", 94), ("12.5%", 12.5)]
    + [("1e-05", 1e-5), ("0: +1.2, 1: -3", None), ("80108a2", None), ("-", None), ("", None), ("v2", None)],
)
def test_a_cell_sorts_by_the_number_that_it_begins_with(cell, value):
    assert read_number(cell) == value


def test_large_pictures_are_made_smaller_and_small_ones_stay_exact():
    noise = np.random.default_rng(0).integers(0, 255, (900, 1500, 3), np.uint8)
    shrunk = embed_image(noise, "noise", 300)
    assert len(shrunk) < 60_000 and "image/jpeg" in shrunk
    assert all("image/png" in embed_image(small, "") for small in (noise[:32, :32], Image.new("P", (9, 9))))


@pytest.fixture
def page_file(tmp_path):
    (tmp_path / "page.html").write_text(make_page(), encoding="utf-8")
    return tmp_path / "page.html"


def read_column(page, column: int) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll('tbody tr')].map((row) => row.cells[{column}].textContent)")


@pytest.mark.browser
def test_a_click_on_a_header_sorts_numbers_as_numbers(browser, page_file):
    page = browser.open(page_file)
    page.evaluate("document.querySelectorAll('th button')[1].click()")
    assert read_column(page, 1) == ["95.20 ± 0.10", "9.50 ± 0.31", "-2.00", "-"]
    page.evaluate("document.querySelectorAll('th button')[1].focus()")
    page.press("Enter")
    assert read_column(page, 1) == ["-2.00", "9.50 ± 0.31", "95.20 ± 0.10", "-"]
    assert page.evaluate("[...document.querySelectorAll('thead th')].map((cell) => cell.ariaSort)") == [
        *("none", "ascending", "none", "none")
    ]
    page.evaluate("document.querySelectorAll('th button')[3].click()")
    assert read_column(page, 3) == ["1,200", "900", "80", "7"]
    page.evaluate("document.querySelectorAll('th button')[0].click()")
    assert read_column(page, 0)[1:] == ["a", "b", "c"]
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1200, "dark")])
def test_a_page_asks_for_nothing_and_fits_the_window(browser, page_file, width, scheme):
    page = browser.open(page_file, width, scheme=scheme)
    assert page.list_errors() == [] and page.measure_overflow() == 0
    assert set(page.list_requests()) == {page_file.as_uri(), "data:image/png;base64"}
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.close()


@pytest.mark.browser
def test_the_policy_of_a_page_forbids_requests(browser, tmp_path):
    (tmp_path / "other.png").write_bytes(b"")
    image = Html(f'<img src="{(tmp_path / "other.png").as_uri()}">')
    (tmp_path / "page.html").write_text(build_page("page", [image]))
    page = browser.open(tmp_path / "page.html")
    assert "Content Security Policy" in " ".join(page.list_errors())
    page.close()


@pytest.mark.browser
def test_a_printed_page_shows_folded_sections(browser, page_file):
    page = browser.open(page_file)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 1
    assert page.print_pdf().startswith(b"%PDF")
    page.close()
