import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import write_run

from evaluation.compare import page as compare_page
from evaluation.compare.__main__ import main
from evaluation.compare.comparison import compare_runs
from evaluation.compare.curves import MAX_POINTS, collect_curves
from evaluation.compare.page import choose_ticks, draw_interval, format_page
from evaluation.compare.runs import find_runs
from evaluation.compare.statistics import PairedDifference, Spread
from evaluation.html import to_html

NASTY = "<img src=x onerror=alert(1)> & \"quoted\" 'a' </script>"
SERIES = "[...document.querySelectorAll('.plot .series')].map((group) => Number(group.dataset.group))"


def draw_picture(folder: Path, epoch: int = 3) -> None:
    (folder / "vis").mkdir()
    pixels = np.random.default_rng(epoch).integers(0, 255, (120, 200, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "vis" / f"epoch_{epoch:03}_name.png")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Three groups of two seeds: none, cutmix, and cutmix from weights with a name to escape, with a stopped run."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        plain = write_run(root / "a" / str(seed), [50 + seed, 60, 9.5 + seed], seed=seed, columns={"train_loss": 2})
        mixed = write_run(root / "b" / str(seed), [40, 55, 95 + seed], seed=seed, method="cutmix")
        write_run(root / "c" / str(seed), [30, 50, 70], seed=seed, method="cutmix", init_from=NASTY)
        for folder in (plain, mixed):
            draw_picture(folder)
    stopped = root / "c" / "1" / "log.csv"
    stopped.write_text("\n".join(stopped.read_text().splitlines()[:3]) + "\n")
    return root


def compare(root: Path):
    return compare_runs(*find_runs([str(root)]))


def read_data(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text)[1])


def test_the_page_has_all_numbers_and_escapes_names(runs):
    text = format_page(compare(runs), f"compare '{NASTY}'")
    assert "<img src=x" not in text and text.count("</script>") == 3  # data, page.js and curves.js
    assert text.count(to_html(NASTY)) > 3 and read_data(text)["groups"][2]["label"] == f"cutmix, init_from {NASTY}"
    for cell in ("10.00 ± 0.71", "95.50 ± 0.71", "+85.50 ± 0.00", "stopped, epoch 2 of 3", "--init_from"):
        assert f">{cell}" in text, cell
    assert text.count("data:image/jpeg") == 4 and "seed 1, epoch 3" in text
    warnings = compare(runs).warnings
    assert warnings and all(f"<li>{to_html(line)}</li>" in text for line in warnings)


def test_curves_hold_the_mean_of_finished_runs_and_each_other_run(runs):
    data = collect_curves(compare(runs))
    assert data["metrics"] == ["top-1 accuracy (%)", "training loss", "learning rate"]
    none, _, unfinished = data["groups"]
    (mean,) = none["lines"]
    assert mean["curves"][0] == {
        "epoch": [1, 2, 3],
        "minutes": [0.5, 1.0, 1.5],
        "mean": [50.5, 60.0, 10.0],
        "std": [0.707107, 0.0, 0.707107],
    }
    assert [(line["name"], line["mean"]) for line in unfinished["lines"]] == [
        ("n = 1", True),
        ("seed 1, stopped, epoch 2 of 3", False),
    ]
    assert unfinished["lines"][0]["curves"][0]["std"] is None and unfinished["lines"][0]["curves"][1] is None


def test_long_and_infinite_curves_can_be_embedded(tmp_path):
    values = [math.nan if epoch == 1199 else epoch / 20 for epoch in range(1200)]
    write_run(tmp_path / "run", [10.0] * 1200, columns={"test_loss": values})
    comparison = compare(tmp_path)
    curve = collect_curves(comparison)["groups"][0]["lines"][0]["curves"][1]
    assert len(curve["epoch"]) <= MAX_POINTS and curve["epoch"][-1] == 1200 and curve["mean"][-1] is None
    assert "NaN" not in format_page(comparison, "")


def test_pictures_that_are_too_large_are_left_out_of_the_page(runs, monkeypatch):
    monkeypatch.setattr(compare_page, "MAX_IMAGE_BYTES", 40_000)
    text = format_page(compare(runs), "")
    assert text.count("data:image/jpeg") == 2 and "2 runs are left out" in text


def test_a_damaged_picture_is_named(tmp_path):
    folder = write_run(tmp_path / "run", [1, 2])
    draw_picture(folder)
    (folder / "vis" / "epoch_003_name.png").write_bytes(b"not a picture")
    assert "not an image that a page can show" in format_page(compare(tmp_path), "")


def test_a_run_without_an_epoch_has_no_curves(tmp_path):
    write_run(tmp_path / "run", [], epochs=5)
    text = format_page(compare(tmp_path), "")
    assert 'id="chart"' not in text and "stopped, epoch 0 of 5" in text


def test_an_interval_is_filled_if_it_excludes_0_and_all_share_a_scale():
    clear = PairedDifference("a", "none", {0: 1.0, 1: 3.0}, Spread(2.0, 1.0, 2), (0.5, 3.5), [])
    unclear = PairedDifference("b", "none", {0: -1.0, 1: 1.0}, Spread(0.0, 1.0, 2), (-4.5, 4.5), [])
    single = PairedDifference("c", "none", {0: 2.0}, Spread(2.0, None, 1), None, [1])
    ticks = choose_ticks([clear, unclear, single])
    assert ticks == [-5, 0, 5]
    drawn = [draw_interval(one, ticks) for one in (clear, unclear, single)]
    assert ['class="mean"' in one for one in drawn] == [True, False, False]
    assert 'x1="55.00%" x2="85.00%"' in drawn[0] and 'cx="70.00%"' in drawn[0] and drawn[2].count("<line") == 1
    assert choose_ticks([PairedDifference("a", "b", {0: 0.0}, Spread(0.0, None, 1), None, [])])[0] <= 0


@pytest.fixture(scope="module")
def page_file(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    main([str(runs), "--out", str(folder)])
    return folder / "compare.html"


@pytest.mark.browser
def test_the_page_asks_for_nothing_and_fits_a_phone(browser, page_file):
    for width, scheme in ((400, "dark"), (1200, "light")):
        page = browser.open(page_file, width, scheme=scheme)
        assert page.list_errors() == [] and page.measure_overflow() == 0
        assert all(address.startswith(("file:", "data:")) for address in page.list_requests())
        page.close()


@pytest.mark.browser
def test_the_legend_switches_groups_off_and_on(browser, page_file):
    page = browser.open(page_file)
    assert page.evaluate(SERIES) == [0, 1, 2, 2]  # the last one is the stopped run
    entry = "document.querySelectorAll('.legend button')[1]"
    page.evaluate(f"{entry}.focus()")
    page.press("Enter")
    assert page.evaluate(SERIES) == [0, 2, 2] and page.evaluate(f"{entry}.ariaPressed") == "false"
    page.press("Enter")
    assert page.evaluate(SERIES) == [0, 1, 2, 2]
    page.evaluate("document.getElementById('none').click()")
    assert page.evaluate(SERIES) == [] and "no group" in page.evaluate("document.querySelector('.plot').textContent")
    page.evaluate("document.getElementById('all').click()")
    assert page.evaluate(SERIES) == [0, 1, 2, 2] and page.list_errors() == []
    page.close()


@pytest.mark.browser
def test_metric_axis_and_range_can_be_chosen(browser, page_file):
    page = browser.open(page_file)
    text = "document.getElementById('curves').textContent"

    def choose(name: str, value: str) -> str:
        page.evaluate(f"{name}.value = '{value}'; document.getElementById('{name}').dispatchEvent(new Event('change'))")
        return page.evaluate(text)

    assert "top-1 accuracy (%)" in page.evaluate(text) and page.evaluate(text).endswith("(%)")
    assert "training loss" in choose("metric", "1") and page.evaluate(SERIES) == [0]
    assert "training time (minutes" in choose("axis", "minutes")
    choose("metric", "0")
    choose("range", "0.75")
    assert page.evaluate(SERIES) == [0, 1, 2]  # the stopped run has no epoch there
    assert page.list_errors() == []
    page.close()


@pytest.mark.browser
def test_the_pointer_and_the_arrow_keys_read_values(browser, page_file):
    page = browser.open(page_file)
    box = "document.getElementById('curves')"
    page.evaluate(f"{box}.scrollIntoView()")
    x, y = page.evaluate(f"(({{ left, top, width }}) => [left + width - 30, top + 50])({box}.getBoundingClientRect())")
    page.move_mouse(x, y)
    tip = "document.querySelector('.tip').innerText.split(/\\n+/)"
    assert page.evaluate(tip)[:3] == ["epoch 3", "cutmix", "95.50 ± 0.71"]
    assert page.evaluate("document.querySelector('.tip').offsetHeight") < 120  # four lines
    left, right = page.evaluate(
        "(({ left, right }) => [left, right])(document.querySelector('.tip').getBoundingClientRect())"
    )
    assert 0 <= left < right <= 1200
    page.evaluate(f"{box}.focus()")
    page.press("Escape")
    assert page.evaluate("document.querySelector('.tip').hidden")
    page.press("ArrowRight")
    assert page.evaluate("document.querySelector('.unseen').textContent").startswith("epoch 1; none 50.50 ± 0.71; ")
    page.press("ArrowRight")
    assert "seed 1, stopped, epoch 2 of 3 50.00" in page.evaluate("document.querySelector('.unseen').textContent")
    assert page.list_errors() == []
    page.close()


@pytest.mark.browser
def test_a_click_on_last_epoch_sorts_by_the_mean(browser, page_file):
    page = browser.open(page_file)
    page.evaluate("document.querySelectorAll('th button')[2].click()")
    rows = page.evaluate("[...document.querySelector('tbody').rows].map((row) => row.cells[2].textContent)")
    assert rows == ["95.50 ± 0.71", "70.00", "10.00 ± 0.71"]
    page.close()


@pytest.mark.browser
def test_without_javascript_the_tables_and_a_picture_of_the_curves_are_there(browser, page_file):
    page = browser.open(page_file, script=False)
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert page.evaluate("document.querySelector('noscript img').naturalWidth") > 100
    assert page.evaluate("document.getElementById('chart').hidden && document.querySelectorAll('table').length") == 4
    page.close()
