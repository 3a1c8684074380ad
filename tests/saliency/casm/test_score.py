"""The command python -m saliency.casm score."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT

from engine.data.annotations import find_boxes
from engine.data.datasets import load_evaluation
from engine.errors import UserError
from saliency.casm.boxes import binarize, find_rectangles
from saliency.casm.commands import score
from saliency.casm.extractors import Extractor, MaskBatch, build_naive_extractor
from saliency.casm.localization_eval import evaluate_localization
from saliency.casm.metrics import score_box
from saliency.casm.network import load_casm
from saliency.casm.results import ScoringConfig

XML = (
    "<annotation><size><width>{width}</width><height>{height}</height></size><object><name>{name}</name><bndbox>"
    "<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object></annotation>"
)
ON_CPU = ["--device", "cpu", "--workers", "0"]


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset folder with white blocks on black in two classes of val/, and XML files for all images but one."""
    boxes = {"n01": [(8, 10, 40, 50), (30, 5, 60, 30)], "n02": [(0, 0, 20, 20), (10, 10, 58, 60), (5, 5, 60, 60)]}
    (tmp_path / "ann.v1").mkdir()
    for name, of_class in boxes.items():
        (tmp_path / "val" / name).mkdir(parents=True)
        for number, (x0, y0, x1, y1) in enumerate(of_class):
            pixels = np.zeros((64, 64, 3), np.uint8)
            pixels[y0:y1, x0:x1] = 255
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{name}_{number}.png")
            if (name, number) != ("n02", 2):
                text = XML.format(width=64, height=64, name=name, x0=x0, y0=y0, x1=x1, y1=y1)
                (tmp_path / "ann.v1" / f"{name}_{number}.xml").write_text(text)
    return tmp_path


BASICS = """
import numpy as np

mean, std, image_size = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 64


def load_model(path):
    return path


def get_masks_and_check_predictions(images, targets, model):
    assert isinstance(images, np.ndarray) and isinstance(targets, np.ndarray)
    bright = (images.mean(1) > 0).astype(np.float32)
    return bright, bright, targets == 0
"""


def test_basics_extractor_is_scored(dataset, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(BASICS)
    words = [str(dataset), "--annotation-path", str(dataset / "ann.v1"), "--basics", str(tmp_path / "mine.py")]
    (result,) = score.main([*words, "--batch-size", "4", *ON_CPU])  # the last batch holds one image
    assert result["images"] == 5 and result["scored"] == 4 and result["rule"] == "its own"
    assert result["LE"] == 0 and result["OM"] == 0.5 and result["accuracy"] == 40
    assert result["F1"] == pytest.approx(1, abs=1e-5) and result["avg_mask"] > 0.1
    output = capsys.readouterr().out
    assert "1 of 5 images left out of the scores (no annotation)" in output and "n02/n02_2.png" in output
    assert "mine" in output.splitlines()[-1] and "0.500" in output.splitlines()[-1]


def test_unreadable_images_do_not_count(dataset, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(BASICS)
    (dataset / "val" / "n01" / "n01_0.png").write_bytes(b"no picture")
    words = [str(dataset), "--annotation-path", str(dataset / "ann.v1"), "--basics", str(tmp_path / "mine.py")]
    with pytest.raises(UserError, match="--on_bad_image skip"):
        score.main([*words, *ON_CPU])
    (result,) = score.main([*words, "--on-bad-image", "skip", *ON_CPU])
    assert result["scored"] == 3 and result["unreadable"] == 1 and result["LE"] == 0
    assert result["images"] == 4 and result["accuracy"] == 25, "before: 40, since one image counted twice"
    assert "1 image that cannot be read; left out" in capsys.readouterr().out


def test_basics_extractor_sets_its_image_size_and_class_order(dataset, tmp_path):
    own = BASICS.replace(
        "image_size = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 64", "image_size = (0.5,) * 3, (0.5,) * 3, 160"
    )
    own = own.replace("targets == 0", "targets == 2") + '\nclasses = ["n00", "n02", "n01"]\n'
    (tmp_path / "mine.py").write_text(own)
    words = [str(dataset), "--annotation-path", str(dataset / "ann.v1"), "--basics", str(tmp_path / "mine.py")]
    (result,) = score.main([*words, *ON_CPU])
    assert result["accuracy"] == 40, "the images of n01"
    assert result["LE"] == 0 and result["F1"] > 0.97, "the crop has the full shorter side, as published"


def test_errors_explain_bad_basics_files(dataset, tmp_path):
    words = [str(dataset), "--annotation-path", str(dataset / "ann.v1"), *ON_CPU, "--basics"]
    (tmp_path / "half.py").write_text("def load_model(path):\n    return path\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    flat = BASICS.replace("return bright, bright, targets == 0", "return bright[:, 0], bright, targets == 0")
    (tmp_path / "flat.py").write_text(flat)
    for name, message in (
        ("gone", "no such file"),
        ("half", "no function get_masks_and_check_predictions"),
        ("broken", "ModuleNotFoundError"),
        ("flat", r"masks and rectangles must be \(5, 64, 64\)"),
    ):
        with pytest.raises(UserError, match=message):
            score.main([*words, str(tmp_path / f"{name}.py")])


def test_scores_of_a_checkpoint_match_a_direct_calculation(casm_file, tmp_path):
    words = ["--casms-path", casm_file, "--limit", "30", "--batch-size", "7", *ON_CPU]
    (result,) = score.main([*words, "--output", str(tmp_path / "all.json")])
    image_set, saved = load_evaluation("shapes", limit=30), load_casm(casm_file)
    images = (image_set.pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    masks, logits = saved.network(images)
    boxes = find_rectangles(binarize(masks[:, 0]))
    hits = []
    for mask, box, (y1, y2, x1, x2) in zip(masks[:, 0], boxes, image_set.annotations["boxes"].tolist(), strict=True):
        hits.append(score_box(mask, box, (x1, y1, x2, y2)))
    assert result["F1"] == pytest.approx(np.mean([one["f1"] for one in hits]), abs=1e-5)
    assert result["LE"] == pytest.approx(1 - np.mean([one["hit"] for one in hits]))
    right = (logits.argmax(1) == image_set.labels).float()
    assert result["accuracy"] == pytest.approx(100 * float(right.mean()))
    assert result["OM"] == pytest.approx(1 - np.mean([one["hit"] * ok for one, ok in zip(hits, right, strict=True)]))
    assert result["avg_mask"] == pytest.approx(float(masks.mean()), abs=1e-5)
    assert json.loads((tmp_path / "all.json").read_text()) == {"results": [result]}
    (other,) = score.main([*words, "--rule", "mean"])
    assert other["F1"] == result["F1"] and (result["rule"], other["rule"]) == ("percentile", "mean")
    (raw,) = score.main([*words, "--not-normalize"])
    assert raw["F1"] != result["F1"]


def test_sources_and_toy_masks_are_scored_in_the_same_table(casm_file, tmp_path, capsys):
    words = ["--casms-path", casm_file, "--limit", "20", "--toy", "--sources", "gradient", "cam", "uniform", *ON_CPU]
    results = score.main(words)
    names = ["random", "gradient of random", "cam of random", "uniform of random", "max", "center"]
    assert [one["name"] for one in results] == names
    assert all(one["scored"] == 20 and one["accuracy"] == results[0]["accuracy"] for one in results)
    of_name = dict(zip(names, results, strict=True))
    assert of_name["max"]["F1"] == pytest.approx(of_name["uniform of random"]["F1"]), (
        "a constant map selects the whole image"
    )
    assert of_name["center"]["avg_mask"] == pytest.approx(0.47, abs=0.02)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in names)


def test_center_mask_has_the_published_size():
    masks = build_naive_extractor("center").extract(torch.zeros(2, 3, 224, 224), torch.zeros(2, dtype=torch.long))
    assert masks.masks.sum((1, 2)).tolist() == [158 * 158] * 2 and masks.masks[0, 33, 33] == 1
    assert masks.masks[0, 32, 33] == 0 and masks.masks[0, 190, 190] == 1 and masks.correct.all()


def test_saved_results_are_reused_only_with_the_same_files_and_options(casm_file, tmp_path, capsys):
    words = [
        "--casms-path",
        casm_file,
        "--limit",
        "10",
        "--save-to-file",
        "--log-path",
        str(tmp_path / "logs"),
        *ON_CPU,
    ]
    (first,) = score.main(words)
    saved = tmp_path / "logs" / "random.score.json"
    assert json.loads(saved.read_text()) == first and first["made_of"]["limit"] == 10
    (again,) = score.main(words)
    assert again == first and "done already" in capsys.readouterr().out
    (other,) = score.main([*words, "--rule", "mean"])
    assert other["rule"] == "mean" and "computing it again" in capsys.readouterr().out
    own = tmp_path / "own.py"
    own.write_text(BASICS.replace("64", "32"))
    given = ["--dataset", "shapes", "--basics", str(own), *words[2:]]
    before = score.main(given)[0]["accuracy"]
    own.write_text(BASICS.replace("64", "32").replace("targets == 0", "targets >= 0"))
    assert score.main(given)[0]["accuracy"] == 100 > before, "a changed extractor is evaluated again"
    twin = tmp_path / "twin" / "random.chk"
    twin.parent.mkdir()
    twin.write_bytes(Path(casm_file).read_bytes())
    both = score.main(["--casms-path", casm_file, str(twin), *words[2:]])
    assert [one["path"] for one in both] == [casm_file, str(twin)] and both[0]["name"] != both[1]["name"]
    saved.write_text("")  # as left behind by a crash of the published program
    assert score.main(words)[0]["F1"] == first["F1"] and json.loads(saved.read_text())["F1"] == first["F1"]
    with pytest.raises(SystemExit):
        score.main(["--casms-path", casm_file, "--save-to-file"])


def test_judge_adds_the_saliency_metric(casm_file, tmp_path):
    words = ["--casms-path", casm_file, "--limit", "12", *ON_CPU]
    (result,) = score.main([*words, "--judge", casm_file])
    assert result["SM"] == pytest.approx(result["SM1"] - result["SM2"], abs=1e-5)
    assert -3 <= result["SM1"] <= 0 and result["SM2"] < 0


def test_break_ratio_squashes_images_and_boxes_alike(tmp_path):
    (tmp_path / "mine.py").write_text(BASICS)
    (tmp_path / "val" / "a").mkdir(parents=True)
    pixels = np.zeros((64, 160, 3), np.uint8)
    pixels[16:48, 120:160] = 255  # outside the center crop
    Image.fromarray(pixels).save(tmp_path / "val" / "a" / "wide.png")
    (tmp_path / "boxes.csv").write_text("file,xmin,ymin,xmax,ymax\na/wide.png,120,16,160,48\n")
    words = [str(tmp_path), "--annotation-path", str(tmp_path / "boxes.csv"), "--basics", str(tmp_path / "mine.py")]
    (cut,) = score.main([*words, *ON_CPU])
    (squeezed,) = score.main([*words, "--break-ratio", *ON_CPU])
    assert cut["LE"] == 1 and squeezed["LE"] == 0 and squeezed["F1"] > 0.9


def test_errors_name_what_is_missing(casm_file, tmp_path, capsys):
    for words, message in (
        ([], "no masks given: name a checkpoint with --casms-path FILE"),
        (["--sources", "cam"], "give --classifier FILE"),
        (["--toy"], "DATA is missing"),
    ):
        with pytest.raises(SystemExit):
            score.main([*words, *ON_CPU])
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="no .chk file in this folder"):
        score.main(["--casms-path", str(tmp_path)])
    with pytest.raises(UserError, match="--casms-path gone"):
        score.main(["--casms-path", "gone"])


def test_module_lists_its_commands_and_help_does_not_import_torch():
    done = subprocess.run([sys.executable, "-m", "saliency.casm"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("train", "score", "eval", "plot"))
    done = subprocess.run([sys.executable, "-m", "saliency.casm", "scor"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean score?" in done.stderr
    command = [sys.executable, "-X", "importtime", "-m", "saliency.casm", "score", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--annotation_path" in done.stdout and " torch\n" not in done.stderr, "--help does not import torch"
    done = subprocess.run(
        [sys.executable, "-m", "saliency.casm", "score", "--casms-path", "gone"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("casm: --casms-path gone: no such file")


def test_rule_changes_the_box():
    """Only the percentile rule loses a plateau below 1 that has more pixels than the mass of the mask."""
    image_set = load_evaluation("shapes", limit=1)
    y1, y2, x1, x2 = image_set.annotations["boxes"][0].tolist()
    mask = torch.zeros(1, 32, 32)
    mask[:, y1:y2, x1:x2] = 0.8
    extractor = Extractor("flat", lambda images, labels: MaskBatch(mask, labels >= 0))
    for rule, error in (("percentile", 1), ("mean", 0)):
        config = ScoringConfig(batch_size=1, rule=rule)
        found = evaluate_localization(
            extractor, image_set, find_boxes(image_set, "shapes"), config, device=torch.device("cpu")
        )
        assert found["LE"] == error


def test_scores_without_known_classes_are_none_rather_than_nan(dataset, tmp_path):
    (tmp_path / "mine.py").write_text(BASICS + '\nclasses = ["n01"]\n')
    words = [str(dataset), "--annotation-path", str(dataset / "ann.v1"), "--basics", str(tmp_path / "mine.py")]
    (result,) = score.main([*words, "--limit", "1", *ON_CPU])  # an image of n02
    assert result["unknown"] == 1 and result["accuracy"] is None and result["OM"] is None and result["LE"] == 0


def test_results_under_the_earlier_name_are_read(casm_file, tmp_path, capsys):
    words = ["--casms-path", casm_file, "--limit", "10", "--save-to-file", "--log-path", str(tmp_path), *ON_CPU]
    (first,) = score.main(words)
    (tmp_path / "random.score.json").rename(tmp_path / "random.json")
    assert score.main(words) == [first] and "random.json" in capsys.readouterr().out
    (tmp_path / "random.json").write_text('{"name": "random", "masked_in": {}}')  # written by eval
    assert score.main(words)[0]["F1"] == first["F1"]


@pytest.mark.data
def test_cam_of_mobilenet_reaches_its_documented_localization_error(real_data):
    """The dataset documents 66.3 % correct boxes at 257 pixels and threshold 0.3, and 48.7 % for the whole image."""
    place = real_data / "ilsvrc_val_227"
    words = [str(place), "--annotation-path", str(place / "boxes_227.csv"), "--batch-size", "50", "--toy", *ON_CPU]
    words += ["--basics", str(ROOT / "benchmarks" / "basics_cam.py")]
    results = score.main([*words, "--casms-path", str(real_data / "weights" / "mobilenet_v2_imagenet_f16.pt")])
    errors = {one["name"]: one["LE"] for one in results}
    assert errors["mobilenet_v2_imagenet_f16"] == pytest.approx(1 - 0.663, abs=0.02)
    assert errors["max"] == pytest.approx(1 - 0.487, abs=0.001)


def test_data_has_two_spellings_and_output_folders_are_checked_first(dataset, casm_file, capsys):
    parser = score.build_parser()
    for words in (["here", "--toy"], ["--toy", "--data_dir", "here"], ["--data-dir=here", "--toy"]):
        assert parser.read(words) == {"data": "here", "toy": True}
    for words, message in (
        (["--output", str(dataset / "gone" / "x.json")], "its folder does not exist"),
        (["--save-to-file", "--log-path", str(dataset / "ann.v1" / "n01_0.xml")], "cannot create this folder"),
    ):
        with pytest.raises(SystemExit):
            score.main(["--casms-path", casm_file, *words])
        assert message in capsys.readouterr().err


def test_mask_statistics_need_no_boxes(dataset, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(BASICS)
    (result,) = score.main([str(dataset), "--basics", str(tmp_path / "mine.py"), *ON_CPU])
    assert result["LE"] is None and result["avg_mask"] > 0.1 and result["accuracy"] == 40
    assert "only mask statistics are reported" in capsys.readouterr().out


def test_images_of_unknown_classes_are_left_out_of_accuracy_and_om(dataset, tmp_path, capsys):
    own = BASICS.replace("targets == 0", "targets == 1") + '\nclasses = ["n00", "n01"]\n'
    (tmp_path / "mine.py").write_text(own)
    words = [str(dataset), "--annotation-path", str(dataset / "ann.v1"), "--basics", str(tmp_path / "mine.py")]
    (result,) = score.main([*words, *ON_CPU])
    assert result["unknown"] == 3 and result["accuracy"] == 100 and result["OM"] == 0 and result["scored"] == 4
    assert "3 images of classes that the network does not know" in capsys.readouterr().out


def test_a_given_folder_overrides_the_shapes_dataset_of_the_checkpoint(dataset, casm_file):
    with pytest.raises(UserError, match="no evaluation images found"):
        score.main([str(dataset / "gone"), "--casms-path", casm_file, *ON_CPU])
    with pytest.raises(UserError, match="knows none of the classes"):
        score.main([str(dataset), "--casms-path", casm_file, *ON_CPU])


def test_errors_inside_a_basics_file_are_reported(dataset, tmp_path):
    (tmp_path / "load.py").write_text(BASICS.replace("return path", "raise KeyError('weights')"))
    (tmp_path / "mask.py").write_text(BASICS.replace("bright = ", "bright = nothing + "))
    for name, message in (("load", r"load_model\(''\) failed"), ("mask", "check_predictions failed")):
        with pytest.raises(UserError, match=message):
            score.main([str(dataset), "--basics", str(tmp_path / f"{name}.py"), *ON_CPU])
