import numpy as np
import pytest

from evaluation.card_page import format_page
from evaluation.html import to_html

NASTY = "<b>\"a\" & 'b'</b></script>"
NAMES = [NASTY, "a/very/long/path/to/the/folder/of/some/run/with/a/long/name/best.pt", "c"]


def make_results() -> tuple[list[dict], list[dict]]:
    """Return results and examples of three classifiers, with names that HTML must escape."""
    results, examples = [], []
    for k, name in enumerate(NAMES):
        corruptions = {"fog": {1: 50.0 + k, 5: 20.0}, "snow": {1: 40.0, 5: 30.0 - k}}
        robustness = {"images": 9, "clean": 80.0, "attacks": {"FGSM 4/255": 12.5}, "corruptions": corruptions}
        robustness |= {"corrupted_by": "built-in", "corruption_mean": 35.0}
        accuracy = {"images": 9, "top1": 80.0 + k, "epoch": None if k else 3, "classes": ["cat", NASTY, "dog"]}
        accuracy |= {"per_class_top1": [80.0, 70.0 + k, 0.0], "class_images": [5, 4, 0]}
        results.append({"name": name, "file": f"{name}/best.pt", "dataset": NASTY, "accuracy": accuracy})
        results[-1]["robustness"] = robustness
        image = np.random.default_rng(k).integers(0, 255, (2, 32, 32, 3), np.uint8)
        maps = np.stack([np.linspace(0, 1, 1024).reshape(32, 32), np.ones((32, 32))]).astype(np.float32)
        examples.append({"images": image, "maps": maps, "titles": [f"{NASTY} 93%", "dog 50%"]})
    return results, examples


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("card") / "card.html"
    path.write_text(format_page(*make_results(), ["a note on <x>"], "python evaluate.py --model_path '<a>'"))
    return path


def test_the_page_escapes_names_of_classifiers_classes_and_data(page_file):
    page = page_file.read_text()
    assert "<b>" not in page and page.count("</script>") == 1 and page.count(to_html(NASTY)) >= 10
    assert "a note on &lt;x&gt;" in page and "&#x27;&lt;a&gt;&#x27;" in page


def test_the_page_marks_the_best_value_and_the_better_direction(page_file):
    page = page_file.read_text()
    assert '<span class="best">82.00</span>' in page and "top-1 accuracy (%)\u00a0\u2191" in page


def test_the_page_has_the_means_of_corruptions_and_the_classes_with_images(page_file):
    rows = page_file.read_text().replace(' class="number short"', "").replace(' class="short"', "").split("<tr>")
    (fog,) = [row for row in rows if "fog" in row and "mean" in row]
    assert [f'data-value="{value}"' in fog for value in (35.0, 35.5, 36.0)] == [True] * 3
    assert any("cat</th>" in row for row in rows) and not any("dog</th>" in row for row in rows)


def test_a_constant_map_is_named(page_file):
    assert page_file.read_text().count("dog 50%, constant map") == 3


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_opens_without_errors_and_fits_the_window(browser, page_file, width):
    page = browser.open(page_file, width)
    assert page.list_errors() == [] and page.measure_overflow() == 0
    assert all(address.startswith(("file:", "data:")) for address in page.list_requests())
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    page.close()
