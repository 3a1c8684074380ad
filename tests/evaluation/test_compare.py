"""python -m evaluation.compare: run folders, groups, figures over seeds, differences by seed, warnings, bad input."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support import hold_lock, shapes_command, write_run

import imagenet_train
import train
from engine.errors import UserError
from engine.training.console import LOG_COLUMNS
from evaluation.compare.__main__ import main
from evaluation.compare.comparison import Comparison, compare_runs
from evaluation.compare.figures import draw_comparison
from evaluation.compare.groups import NEUTRAL_OPTIONS, get_default_options
from evaluation.compare.metrics import METRICS
from evaluation.compare.runs import FINISHED, RUNNING, STOPPED, find_runs
from evaluation.compare.statistics import get_mean_curve, t_quantile


def compare(*folders: Path, **settings) -> Comparison:
    return compare_runs(*find_runs([str(folder) for folder in folders]), **settings)


def get_labels(comparison: Comparison) -> list[str]:
    return [group.label for group in comparison.groups]


@pytest.fixture
def three_seeds(tmp_path) -> Path:
    """Two groups of three seeds; the folder also has the files that --seeds leaves beside its runs."""
    for seed, (plain, mixed) in enumerate([(90, 91), (92, 92.5), (91, 93)]):
        write_run(tmp_path / "runs" / "none" / f"seed_{seed}", [50, 60, 99, plain], seed=seed)
        write_run(tmp_path / "runs" / "cutmix" / f"seed_{seed}", [40, 50, 60, mixed], seed=seed, method="cutmix")
    (tmp_path / "runs" / "none" / "seeds.json").write_text("{}")
    return tmp_path / "runs"


# ---- Figures ----


def test_the_figures_equal_a_calculation_by_hand(three_seeds):
    comparison = compare(three_seeds)
    assert get_labels(comparison) == ["cutmix", "none"]
    cutmix, none = comparison.figures
    assert none.last.mean == 91 and none.last.std == 1 and none.last.n == 3
    assert cutmix.last.mean == pytest.approx((91 + 92.5 + 93) / 3)
    assert cutmix.last.std == pytest.approx(math.sqrt(((7 / 6) ** 2 + (1 / 3) ** 2 + (5 / 6) ** 2) / 2))
    assert none.best.mean == 99 and none.best.std == 0 and none.best_split == "test"
    assert none.median.mean == statistics.median([50, 60, 90, 99]) / 3 + statistics.median([50, 60, 92, 99]) / 3 + (
        statistics.median([50, 60, 91, 99]) / 3
    )
    assert none.minutes.mean == 2 and none.images_per_second.mean == 100 and none.peak_memory_mb is None


def test_differences_are_taken_by_seed_with_a_t_interval(three_seeds):
    comparison = compare(three_seeds)
    (one,) = comparison.differences
    assert (one.label, one.baseline, one.unpaired) == ("cutmix", "none", [])
    assert one.by_seed == {0: 1.0, 1: 0.5, 2: 2.0}
    mean, std = 3.5 / 3, statistics.stdev([1, 0.5, 2])
    half = 4.302653 * std / math.sqrt(3)
    assert one.interval == pytest.approx((mean - half, mean + half), abs=1e-5)
    assert compare(three_seeds, baseline="cutmix").differences[0].by_seed == {0: -1.0, 1: -0.5, 2: -2.0}


@pytest.mark.parametrize(
    "freedom, expected", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)]
)
def test_the_quantile_is_that_of_the_tables(freedom, expected):
    assert t_quantile(freedom, 0.975) == pytest.approx(expected, abs=6e-5)
    assert t_quantile(1, 0.75) == pytest.approx(1)


def test_the_best_epoch_is_chosen_on_validation_images_where_there_are_some(tmp_path):
    write_run(tmp_path / "a", [70, 80, 75], columns={"valid_top1": [60, 65, 90]})
    comparison = compare(tmp_path)
    assert comparison.figures[0].best.mean == 75 and comparison.figures[0].best_split == "valid"
    assert not any("chosen on the test images" in line for line in comparison.warnings)
    assert compare(tmp_path, metric="valid_top1").figures[0].last.mean == 90
    write_run(tmp_path / "b", [70, 80, 75], method="cutmix")
    expected = "the best epoch is chosen on the test images in 1 run of 2, which flatters it: report the last epoch"
    assert expected in compare(tmp_path).warnings


def test_only_evaluated_epochs_count(tmp_path):
    write_run(tmp_path / "a", ["", 50, "", 60])
    comparison = compare(tmp_path)
    assert comparison.figures[0].last.mean == 60 and comparison.figures[0].median.mean == 55
    points = get_mean_curve(comparison.groups[0].runs, comparison.metric)
    assert [(point.epoch, point.minutes, point.spread.mean) for point in points] == [(2, 1, 50), (4, 2, 60)]


def test_the_median_is_that_of_the_last_ten_evaluated_epochs(tmp_path):
    write_run(tmp_path / "a", [99, 98, *range(10)])
    assert compare(tmp_path).figures[0].median.mean == 4.5


# ---- Groups ----


def test_options_that_never_change_results_do_not_split_a_group(tmp_path):
    for seed, own in enumerate([{"device": "cpu"}, {"device": "cuda", "workers": 9, "name": "b/seed_1"}, {"dpi": 300}]):
        write_run(tmp_path / str(seed), [1, 2], seed=seed, **own)
    assert [run.seed for run in compare(tmp_path).groups[0].runs] == [0, 1, 2]


def test_labels_name_what_tells_the_groups_apart(tmp_path):
    write_run(tmp_path / "a", [1, 2], method="cutmix")
    write_run(tmp_path / "b", [1, 2], method="cutmix", lr=0.2, weight_decay=0.1)
    write_run(tmp_path / "c", [1, 2], method="cutmix", lr=0.2, weight_decay=0.1, saliency="bank")
    write_run(tmp_path / "d", [1, 2], method="none+mixup")
    write_run(tmp_path / "e", [1, 2], method="none+mixup", method_weights=[2.0, 1.0], lr=0.2)
    write_run(tmp_path / "f", [1, 2], method="puzzlemix")
    write_run(tmp_path / "g", [1, 2], method="puzzlemix", labels="mean", saliency="bank")
    labels = get_labels(compare(tmp_path))
    assert labels[:3] == ["cutmix, lr 0.1", "cutmix, lr 0.2", "cutmix, saliency bank"]
    assert labels[3:5] == ["none+mixup", "none+mixup, method_weights 2 1"]
    assert labels[5:] == ["puzzlemix", "puzzlemix, labels mean"]


def test_an_older_run_without_an_option_belongs_to_its_default(tmp_path):
    write_run(tmp_path / "a", [1, 2], loss="bce")
    new = {"clip_grad": 0.0, "saliency": None, "seeds": [], "optimizer": "sgd", "no_decay_1d": False}
    write_run(tmp_path / "b", [1, 2], seed=1, loss="softmax_bce", **new)
    assert len(compare(tmp_path).groups) == 1


@pytest.mark.parametrize("script", [train, imagenet_train])
def test_the_default_of_every_option_is_known_for_runs_that_do_not_record_it(script):
    known, chosen = get_default_options(), {"method", "recipe", "image_size", "norm"}  # these were always recorded
    for key, default in script.build_parser().defaults.items():
        if key not in NEUTRAL_OPTIONS | chosen and default not in (None, [], {}, ""):
            assert known.get(key) == default, key


def test_a_repeated_seed_counts_once(tmp_path):
    shorter = write_run(tmp_path / "shorter", [1, 2], epochs=4)
    longer = write_run(tmp_path / "longer", [1, 2, 3], epochs=4)
    finished = write_run(tmp_path / "z", [1, 2, 3, 4])
    for folders, kept in (([shorter, longer], longer), ([longer, finished], finished), ([finished, longer], finished)):
        comparison = compare(*folders)
        (left,) = {*folders} - {kept}
        assert [run.folder for run in comparison.groups[0].runs] == [kept]
        assert [str(one) for one in comparison.left_out] == [
            f"{left}: left out: has the options and the seed 0 of {kept}"
        ]
    with hold_lock(shorter / ".lock"):  # one that still runs counts before a longer one that was stopped
        assert [run.folder for run in compare(longer, shorter).groups[0].runs] == [shorter]


# ---- Runs under way, and runs that cannot be compared ----


def test_a_run_under_way_is_shown_and_does_not_enter_the_mean(three_seeds):
    folder = write_run(three_seeds / "none" / "seed_3", [1, 2], seed=3, epochs=4)
    stopped = write_run(three_seeds / "none" / "seed_4", [1], seed=4, epochs=4)
    (stopped / ".lock").write_text("process 1 on there")  # as a kill leaves it
    with hold_lock(folder / ".lock"):
        comparison = compare(three_seeds)
    none = comparison.groups[1]
    assert [run.status for run in none.runs] == [FINISHED] * 3 + [RUNNING, STOPPED]
    assert [run.describe_status() for run in none.unfinished] == ["running, epoch 2 of 4", "stopped, epoch 1 of 4"]
    assert comparison.figures[1].last.n == 3 and comparison.figures[1].last.mean == 91
    assert comparison.differences[0].unpaired == []


def test_seeds_without_a_partner_are_named(three_seeds):
    write_run(three_seeds / "none" / "seed_7", [1, 2, 3, 90], seed=7)
    comparison = compare(three_seeds)
    assert comparison.differences[0].unpaired == [7] and comparison.differences[0].spread.n == 3
    assert any("finished seeds differ: 0 1 2 (cutmix), 0 1 2 7 (none)" in line for line in comparison.warnings)


def test_every_folder_that_is_not_compared_has_one_line(tmp_path):
    good = write_run(tmp_path / "good", [1, 2])
    write_run(tmp_path / "again", [1, 2], seed=1)
    write_run(tmp_path / "other", [1, 2], dataset="cifar100")
    write_run(tmp_path / "detector", [1], kind="detector")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "no_config", [1]).joinpath("config.json").unlink()
    write_run(tmp_path / "cut", [1]).joinpath("config.json").write_text('{"options": {"meth')
    write_run(tmp_path / "foreign", [1]).joinpath("config.json").write_text('{"hidden_size": 3}')
    write_run(tmp_path / "damaged", [1, 2]).joinpath("log.csv").write_text("epoch,test_top1\n1,5\n\0\0")
    write_run(tmp_path / "gap", [1, 2]).joinpath("log.csv").write_text("epoch,test_top1\n2,5\n")
    comparison = compare(*sorted(tmp_path.iterdir()), tmp_path / "missing", good / "log.csv", good)
    assert [run.folder.name for run in comparison.groups[0].runs] == ["good", "again"]
    lines = {one.path.name: str(one) for one in comparison.left_out}
    names = "other detector empty no_config cut foreign damaged gap missing log.csv"
    assert lines.keys() == {*names.split()}
    assert all("\n" not in line for line in lines.values())
    assert "tested on other images (dataset cifar100, not cifar10)" in lines["other"]
    assert "a detector run" in lines["detector"] and "no config.json" in lines["no_config"]
    assert "no run in this folder" in lines["empty"] and "no such folder" in lines["missing"]


def test_a_run_without_the_metric_is_left_out(three_seeds, tmp_path):
    write_run(tmp_path / "runs" / "ema", [1, 2], columns={"ema_top1": [3, 4]}, ema=0.9)
    comparison = compare(three_seeds, metric="ema_top1")
    assert comparison.figures[0].last.mean == 4 and len(comparison.left_out) == 6
    assert "its log has no ema_top1" in str(comparison.left_out[0])


def test_runs_inside_the_folder_of_another_run_are_found(three_seeds):
    write_run(three_seeds / "none" / "seed_0" / "inner", [1, 2, 3, 4], seed=5)
    assert [run.seed for run in compare(three_seeds / "none").groups[0].runs] == [0, 1, 2, 5]


def test_patterns_and_parent_folders_name_runs(three_seeds):
    write_run(three_seeds / "none" / "seed_10", [1, 2, 3, 4], seed=10)
    runs, left_out = find_runs([str(three_seeds / "n*"), str(three_seeds / "*" / "seed_[01]")])
    assert [run.folder.name for run in runs] == ["seed_0", "seed_1", "seed_2", "seed_10", "seed_0", "seed_1"]
    assert not left_out


@pytest.mark.parametrize("baseline, expected", [("cutmx", "did you mean cutmix?"), ("idle", "none of its runs is fin")])
def test_a_wrong_baseline_is_refused(three_seeds, baseline, expected):
    write_run(three_seeds / "idle", [], method="idle", epochs=4)
    with pytest.raises(UserError, match=re.escape(expected)):
        compare(three_seeds, baseline=baseline)


def test_nothing_to_compare_is_one_error(tmp_path):
    with pytest.raises(UserError, match="no run to compare\n.*no run in this folder"):
        compare(tmp_path)


# ---- Fairness ----


@pytest.mark.parametrize(
    "own, expected",
    [
        ({"recipe": "rmix"}, "recipe differs: --recipe puzzle (none), rmix (cutmix)"),
        ({"model": "resnet50", "parameters": 20}, "network differs: --model resnet20 (none), resnet50 (cutmix)"),
        ({"parameters": 20}, "number of parameters differs: 10 (none), 20 (cutmix)"),
        ({"batch_size": 50}, "batch size differs: --batch_size 100 (none), 50 (cutmix)"),
        ({"crop_padding": 2, "auto_augment": "rand"}, "augmentation differs: --crop_padding - (none), 2 (cutmix); "),
        (
            {"lr": 0.2, "weight_decay": 1e-3},
            "optimizer differs: --lr 0.1 (none), 0.2 (cutmix); --weight_decay 0.0001 (n",
        ),
        ({"precision": "bfloat16"}, "precision differs: float32 (none), bfloat16 (cutmix)"),
        ({"commit": "b" * 40}, "commit of the code differs: aaaaaaaaaa (none), bbbbbbbbbb (cutmix)"),
        ({"device": "H200"}, "device differs: cpu (none), H200 (cutmix); do not compare minutes"),
        ({"seed": 1}, "finished seeds differ: 0 (none), 1 (cutmix)"),
        ({"labels_per_class": 5}, "training images differ: --labels_per_class 0 (none), 5 (cutmix)"),
        ({"init_from": "a.pt"}, "initial weights differ: --init_from - (none), a.pt (cutmix)"),
    ],
)
def test_what_is_not_fair_is_named(tmp_path, own, expected):
    write_run(tmp_path / "a", [1, 2])
    write_run(tmp_path / "b", [1, 2], method="cutmix", **own)
    warnings = compare(tmp_path).warnings
    assert sum(expected in line for line in warnings) == 1, warnings
    usual = ("one seed only", "the best epoch is chosen on the test images")
    assert sum(not line.startswith(usual) for line in warnings) == 1, warnings


def test_training_on_unmixed_images_is_named(tmp_path):
    write_run(tmp_path / "a", [1, 2])
    write_run(tmp_path / "b", [1, 2], method="cutmix")
    own = {"comixup": {"clean_lam": 1.0}}
    write_run(tmp_path / "c", [1, 2], method="comixup", hyper_parameters=own)
    write_run(tmp_path / "d", [1, 2], method="mixup", clean_weight=1.0)
    write_run(tmp_path / "e", [1, 2], method="sage", hyper_parameters={"sage": {"update_ratio": 0.7}}, saliency="bank")
    expected = "no (cutmix; sage), by the method (comixup), --clean_weight 1 (mixup)"
    assert sum(expected in line for line in compare(tmp_path).warnings) == 1
    assert not any("unmixed" in line for line in compare(tmp_path / "a", tmp_path / "b").warnings)


def test_equal_runs_and_method_options_are_fair(three_seeds):
    write_run(three_seeds / "bank", [1, 2, 3, 4], method="puzzlemix", saliency="bank", schedule=[3])
    comparison = compare(three_seeds)
    assert [line for line in comparison.warnings if "differs" in line] == []
    assert comparison.option_differences.keys() == {"method", "saliency"}
    assert comparison.option_differences["saliency"] == ["bank", "-", "-"]


# ---- The command ----


def run_command(*words, capsys) -> tuple[dict, str]:
    content = main([str(word) for word in words])
    return content, capsys.readouterr().out


def test_real_runs_give_the_numbers_of_seeds_json(tmp_path, capsys):
    words = "--vis_epoch 1 --valid_labels_per_class 1 --limit 20 --dpi 30 --amp off --seeds 0 1".split()
    expected = train.main(shapes_command(tmp_path, *words, epochs=1))["summary"]
    capsys.readouterr()
    content, printed = run_command(tmp_path, "--out", tmp_path / "out", capsys=capsys)
    (group,) = content["groups"]
    assert (group["group"], group["n"], group["best_split"], group["seeds"]) == ("none", 2, "valid", "0 1")
    for key, theirs in (("last", "last_top1"), ("best", "best_top1")):
        assert group[f"{key}_mean"] == pytest.approx(expected[theirs]["mean"], rel=1e-4)
        assert group[f"{key}_std"] == pytest.approx(expected[theirs]["std"], rel=1e-4, abs=1e-9)
    config = json.loads((tmp_path / "shapes" / "resnet20" / "run" / "seed_0" / "config.json").read_text())
    assert (config["precision"], config["classes"], config["parameters"]) == ("float32", 10, 269722)
    (found,) = compare(tmp_path / "shapes").groups
    assert [path.name for path in found.runs[0].mixed_images] == ["epoch_001_none.png"]
    assert "n = 1" not in printed and "one seed" not in printed


def test_every_file_of_a_comparison_has_the_numbers(three_seeds, tmp_path, capsys):
    write_run(three_seeds / "detector", [1], kind="detector")
    out = tmp_path / "out"
    content, printed = run_command(three_seeds, "--out", out, "--figure_format", "svg", capsys=capsys)
    assert sorted(path.name for path in out.iterdir()) == [
        *("compare.csv", "compare.html", "compare.json", "compare.md", "cost.svg", "curves.svg", "time.svg")
    ]
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(content))
    page, table = (out / "compare.md").read_text(), (out / "compare.csv").read_text().splitlines()
    assert "| none | 3 | 91.00 ± 1.00 | 99.00 ± 0.00 |" in page and "| cutmix | 3 | +1.17 ± 0.76 |" in page
    assert "detector: a detector run" in page and "## Options that differ" in page
    assert table[2].startswith("none,none,3,91.0,1.0,99.0,0.0,") and len(table) == 3
    assert "91.00 +- 1.00" in printed and "-0.73 to +3.06" in printed
    assert sum("left out" in line for line in printed.splitlines()) == 1


def test_a_comparison_is_not_replaced_by_mistake(three_seeds, tmp_path, capsys):
    words = [str(three_seeds), "--out", str(tmp_path / "out")]
    main(words)
    with pytest.raises(SystemExit):
        main(words)
    assert "replace it with --overwrite" in capsys.readouterr().err
    main([*words, "--overwrite"])
    with pytest.raises(UserError, match="cannot create this folder"):
        main([str(three_seeds), "--out", str(tmp_path / "out" / "compare.md")])
    with pytest.raises(SystemExit):
        main([])
    assert "no runs given" in capsys.readouterr().err


def test_the_curves_have_bands_and_show_runs_under_way(three_seeds, tmp_path, monkeypatch):
    write_run(three_seeds / "none" / "seed_3", [10, 20], seed=3, epochs=4)
    drawn = []
    monkeypatch.setattr("evaluation.compare.figures.figures.save_figure", lambda figure, *_: drawn.append(figure))
    draw_comparison(compare(three_seeds), tmp_path, "png", dpi=50)
    assert all(isinstance(figure, Figure) for figure in drawn)
    for figure, x in zip(drawn[:2], ([1, 2, 3, 4], [0.5, 1, 1.5, 2]), strict=True):
        (axes,) = figure.axes
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == ["cutmix (n = 3)", "none (n = 3)", "none, seed 3 (stopped, epoch 2 of 4)"]
        assert list(lines["none (n = 3)"].get_xdata()) == x
        assert list(lines["none (n = 3)"].get_ydata()) == [50, 60, 99, 91]
        assert list(lines["none, seed 3 (stopped, epoch 2 of 4)"].get_ydata()) == [10, 20]
        assert len(figure.legends[0].get_texts()) == 3
        edges = axes.collections[1].get_paths()[0].vertices[:, 1].tolist()
        assert 90 in edges and 92 in edges


def test_the_last_epoch_is_drawn_over_the_cost_relative_to_the_baseline(three_seeds, tmp_path, monkeypatch):
    for seed, seconds in enumerate((60.0, 90.0)):  # 30 seconds an epoch without mixing
        options = {"method": "puzzlemix", "seed": seed, "columns": {"seconds": seconds}}
        write_run(three_seeds / "puzzlemix" / f"seed_{seed}", [50, 60, 70, 80 + 4 * seed], **options)
    write_run(three_seeds / "sage", [10, 20], method="sage", epochs=4)  # not finished
    drawn = []
    monkeypatch.setattr("evaluation.compare.figures.figures.save_figure", lambda figure, *_: drawn.append(figure))
    draw_comparison(compare(three_seeds), tmp_path, "png", dpi=50)
    (axes,) = drawn[2].axes
    marks = {mark.get_label(): mark for mark in axes.containers}
    assert list(marks) == ["cutmix (n = 3)", "none (n = 3)", "puzzlemix (n = 2)"]
    place = {name: (mark[0].get_xdata()[0], mark[0].get_ydata()[0]) for name, mark in marks.items()}
    assert place["none (n = 3)"] == (1, 91) and place["puzzlemix (n = 2)"] == (2.5, 82)
    across, along = (bar.get_segments()[0] for bar in marks["puzzlemix (n = 2)"][2])
    assert along[:, 1].tolist() == pytest.approx([82 - 8**0.5, 82 + 8**0.5])
    assert across[:, 0].tolist() == pytest.approx([2.5 - 0.5**0.5, 2.5 + 0.5**0.5])


@pytest.mark.parametrize("count, epochs", [(1, 1), (12, 13)])
def test_any_number_of_groups_and_epochs_is_drawn(tmp_path, count, epochs):
    for number in range(count):
        write_run(tmp_path / str(number), [number + epoch for epoch in range(epochs)], lr=0.1 + number)
    paths = draw_comparison(compare(tmp_path), tmp_path / "out", "png", dpi=30)
    assert all(path.stat().st_size for path in paths)


def test_metrics_are_columns_of_the_log():
    assert {metric.column for metric in METRICS.values()} <= {*LOG_COLUMNS}
