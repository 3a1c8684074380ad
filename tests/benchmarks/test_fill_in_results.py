"""benchmarks/fill_in_results.py: the tables of the pages are those of docs/results.csv."""

import importlib

import pytest
from support import ROOT

COLUMNS = "plan part row seed status epochs last_top1 best_top1 best_epoch last_valid_top1 last_ema_top1 epoch_seconds"
CSV = f"""{COLUMNS.replace(" ", ",")},machine,commit
tiny,first,none,0,finished,60,50.00,50.00,60,,51.00,10.00,"EPYC, 1 thread",abc
tiny,first,cutmix,0,finished,60,53.00,53.00,60,,52.50,11.00,"EPYC, 1 thread",abc
tiny,first,none,1,finished,60,52.00,52.00,60,,52.00,19.00,"EPYC, 1 thread",abc
tiny,first,cutmix,1,finished,60,54.00,54.00,60,,53.50,11.00,"EPYC, 1 thread",def
tiny,first,none,2,finished,60,54.00,54.00,60,,53.00,10.00,"EPYC, 1 thread",abc
tiny,first,cutmix,2,stopped,60,,,,,,,"EPYC, 1 thread",abc
tiny,later,mixup,0,not started,60,,,,,,,,
three,all,none,0,finished,60,50.00,50.00,60,,,10.00,,
three,all,none,1,finished,60,52.00,52.00,60,,,10.00,,
three,all,x,0,finished,60,53.00,53.00,60,,,0.00,,
three,all,x,1,finished,60,54.00,54.00,60,,,0.00,,
three,all,y,0,finished,60,51.00,51.00,60,,,0.00,,
three,all,y,1,finished,60,54.00,54.00,60,,,0.00,,
recipe-x,only,lr0.1,9,finished,60,50.00,51.00,59,48.00,,10.00,"EPYC, 1 thread",abc
"""


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("fill_in_results")
    (tmp_path / "results.csv").write_text(CSV)
    monkeypatch.setattr(module, "CSV", tmp_path / "results.csv")
    return module


def fill_in(results, words: str) -> list[list[str]]:
    """Return the cells of the table between two comments."""
    page = results.fill_in(f"before\n<!-- results: {words} -->\nold\n<!-- end -->\nafter\n")
    assert page.startswith("before\n") and page.endswith("<!-- end -->\nafter\n") and "old" not in page
    assert results.fill_in(page) == page
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in page.splitlines() if line.startswith("|")]


def test_accuracies_are_compared_with_those_of_the_same_seeds(results):
    head, _, none, cutmix = fill_in(results, "accuracy tiny first")
    assert none[:5] == ["`none`", "3", "52.00 ± 2.00", "-", "-"] and none[-1] == "1.00"
    # seeds 0 and 1: differences 3 and 2, standard deviation 0.5 ** 0.5, t = 12.706 for one degree of freedom
    row = ["`cutmix`", "2 of 3", "53.50 ± 0.71", "+2.50 (n = 2)", "-3.85 to +8.85"]
    assert cutmix == [*row, "11.0", "1.10"] and len(head) == len(cutmix)  # none was slowed in one of its runs


def test_the_interval_follows_from_the_noise_of_all_rows(results):
    """By hand: the residuals of x and y around the effects of row and seed are 0.5 and -0.5, those of none are 0. So
    the variance is 1 with (3 - 1) (2 - 1) degrees of freedom, over 2: 0.5. The t quantile is 4.3027.
    """
    results = results.read_results("three")
    std, freedom = results.noise
    assert freedom == 2 and std == pytest.approx(0.5**0.5)
    assert results.compare("x").interval == pytest.approx((2.5 - 4.3027 * 0.5**0.5, 2.5 + 4.3027 * 0.5**0.5), abs=1e-3)


def test_times_are_compared_on_the_same_machine(results):
    lines = CSV.replace('11.00,"EPYC, 1 thread",abc', '4.00,"Xeon, 1 thread",abc')
    results.CSV.write_text(lines)
    assert fill_in(results, "accuracy tiny first")[3][-2:] == ["4.0 / 11.0", "1.10"]
    results.CSV.write_text(lines.replace('11.00,"EPYC, 1 thread",def', '4.00,"Xeon, 1 thread",def'))
    assert fill_in(results, "accuracy tiny first")[3][-2:] == ["4.0", "-"]


def test_columns_without_values_are_left_out(results):
    head, _, row = fill_in(results, "accuracy recipe-x only")
    assert head == ["row", "n", "last epoch (%)", "best epoch, on test images (%)", "seconds an epoch"]
    assert row == ["`lr0.1`", "1", "50.00", "51.00", "10.0"]


def test_rows_without_a_finished_run_are_named_below_the_table(results):
    for parts, rows in {"first later": 2, "later": 0}.items():
        page = results.fill_in(f"<!-- results: accuracy tiny {parts} -->\n<!-- end -->")
        assert "Not trained yet: `mixup`." in page and page.count("\n| `") == rows
    assert "Not trained" not in results.fill_in("<!-- results: accuracy tiny first -->\n<!-- end -->")


def test_the_machines_and_commits_of_a_table_stand_below_it(results):
    page = results.fill_in("<!-- results: accuracy tiny first -->\n<!-- end -->")
    assert "Trained on EPYC, 1 thread, commit abc, def." in page


def test_the_summary_is_ranked_by_the_difference_not_by_means_of_other_seeds(results):
    rows = fill_in(results, "summary tiny mixup none cutmix")[2:]
    assert [row[0].split()[0] for row in rows] == ["`cutmix`", "`none`", "`mixup`"] and rows[0][-1] == "1.10"
    assert rows[2][1:] == ["0 of 1", "-", "-", "-", "-"]


def test_a_pair_of_rows_is_compared_by_seed(results):
    (row,) = fill_in(results, "differences tiny none - cutmix")[2:]
    assert row == ["`none` - `cutmix`", "2", "-2.50", "-8.85 to +3.85", "0: -3.00, 1: -2.00"]


def test_averaged_weights_are_compared_with_the_last_ones_of_the_same_run(results):
    head, _, none, cutmix = fill_in(results, "averaging tiny first")
    # none gains 1, 0, -1, cutmix -0.5, -0.5: the variance is 2 / 3, t = 3.182 for three degrees of freedom
    assert none == ["`none`", "3", "52.00 ± 1.00", "+0.00", "-1.50 to +1.50"]
    assert cutmix == ["`cutmix`", "2 of 3", "53.00 ± 0.71", "-0.50", "-2.34 to +1.34"]
    assert fill_in(results, "averaging tiny later")[2][1:] == ["0 of 1", "-", "-", "-"]


def test_a_recipe_is_chosen_on_validation_images(results):
    assert fill_in(results, "validation recipe-x")[2:] == [["`lr0.1`", "1", "48.00"]]


def test_the_card_is_shown_with_a_row_for_each_classifier(results, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "CARD", tmp_path / "card.md")
    monkeypatch.setattr(results, "CARD_COLUMNS", {"ECE (%)": "ECE", "top-1 accuracy (%)": "top-1"})
    lines = ["# Card", "", "|  | none/seed_0 | my/cutmix |", "| --- | ---: | ---: |", "- a note"]
    rows = [
        "| top-1 accuracy (%) | 50.00 | **53.00** |",
        "| temperature | 2.00 | 1.00 |",
        "| ECE (%) | **3.00** | 9.00 |",
    ]
    results.CARD.write_text("\n".join([*lines[:4], *rows, *lines[4:]]))
    table = [["method", "ECE", "top-1"], ["`none`", "**3.00**", "50.00"], ["`my/cutmix`", "9.00", "**53.00**"]]
    head, _, *rows = fill_in(results, "card")
    assert [head, *rows] == table
    monkeypatch.setattr(results, "CARD_COLUMNS", {"mCE": "mCE"})
    with pytest.raises(SystemExit, match="no row mCE in card.md"):
        fill_in(results, "card")


@pytest.mark.parametrize(
    "words, message",
    [
        ("accuracy wrong first", "no plan wrong in results.csv; train it: python benchmarks/reproduce.py"),
        ("accuracy tiny frist", "no part frist in plan tiny"),
        ("summary tiny cutmx", "no row cutmx in plan tiny"),
        ("differences tiny cutmix - nine", "no row nine in plan tiny"),
        ("differences tiny cutmix none", "give pairs as ROW - ROW"),
        ("table tiny", "choose from accuracy, summary"),
    ],
)
def test_a_wrong_request_is_named(results, words, message):
    with pytest.raises(SystemExit, match=f"<!-- results: {words} -->: .*{message}"):
        fill_in(results, words)


def test_a_table_without_an_end_does_not_swallow_the_text_below(results):
    page = "<!-- results: accuracy tiny first -->\ntext\n<!-- results: accuracy tiny first -->\n<!-- end -->\n"
    with pytest.raises(SystemExit, match="2 begin, 1 end"):
        results.fill_in(page)


def test_the_figure_shows_the_rows_with_an_interval_and_their_cost(results, monkeypatch):
    monkeypatch.setattr(results, "DRAWN_PARTS", ("first",))
    (axes,) = results.make_figure(results.read_results("tiny")).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cutmix"]
    assert "1.10 x" in [text.get_text() for text in axes.texts]


def test_the_pages_have_the_figures_of_results_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("fill_in_results")
    for name in module.PAGES:
        page = (ROOT / name).read_text()
        assert module.BLOCK.search(page), name
        assert module.fill_in(page) == page, f"{name}: run python benchmarks/fill_in_results.py"


def test_the_pages_show_seed_0_of_the_demonstration(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runs = importlib.import_module("fill_in_results").read_results("demonstration").get_row("demo")
    (run,) = (run for run in runs if run["seed"] == "0")
    last = f"last epoch: top-1 accuracy {run['last_top1']} %"
    best = f"best top-1 {run['best_top1']} % at epoch {run['best_epoch']} (chosen on the test images)"
    for name in ("README.md", "docs/train.md"):
        page = (ROOT / name).read_text()
        assert last in page and best in page, name
    assert f"Top-1 Accuracy: {run['best_top1']}%" in (ROOT / "docs/evaluate.md").read_text()
