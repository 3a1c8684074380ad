import json

import matplotlib.image
import pytest
import torch

import evaluate
from engine.errors import UserError
from models import build_model


def test_one_file_in_every_form(shapes_run, tmp_path, capsys):
    run = shapes_run(epochs=1)
    capsys.readouterr()
    picture, output = tmp_path / "confusion.png", tmp_path / "out.json"
    words = [
        "--model_path",
        str(run),
        "--per_class",
        "--confusion",
        str(picture),
        "--output",
        str(output),
        "--topk",
        "1",
        "3",
        "20",
    ]
    [result] = evaluate.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Top-1 Accuracy: {result['top1']:.2f}%  Top-3 Accuracy: {result['top3']:.2f}%"
    assert "top20" not in result and any(line.split()[:1] == ["crescent"] for line in lines)
    assert json.loads(output.read_text())["results"] == [result] and 0 <= result["ece"] <= 100
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum() == result["images"] == 48
    assert confusion.diag().sum() / 48 * 100 == pytest.approx(result["top1"])
    assert matplotlib.image.imread(picture).std() > 0.01


def test_several_files_give_a_row_each(shapes_run, capsys):
    runs = [str(shapes_run(name=name, method=method, epochs=1)) for name, method in (("a", "none"), ("b", "mixup"))]
    capsys.readouterr()
    assert len(evaluate.main(["--model_path", *runs])) == 2
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if "best.pt" in line] == [f"{run}/best.pt" for run in runs]


def test_a_bare_file_is_told_by_its_shapes_and_needs_its_data_named(tmp_path, capsys):
    torch.save({f"module.{k}": v for k, v in build_model("resnet20", 10).state_dict().items()}, tmp_path / "bare.pth")
    words = ["--model_path", str(tmp_path / "bare.pth"), "--limit", "20"]
    with pytest.raises(SystemExit):
        evaluate.main(words)
    assert "--dataset" in capsys.readouterr().err
    [result] = evaluate.main([*words, "--dataset", "shapes", "--cutout", "--trad_augment"])
    assert (
        result["images"] == 20
        and "without effect on an evaluation: --cutout, --trad_augment" in capsys.readouterr().out
    )


def test_columns_that_a_file_lacks_show_as_dashes(shapes_run, capsys):
    runs = [str(shapes_run(*words, name=name, epochs=1)) for name, words in (("a", ()), ("b", ("--num_classes", "4")))]
    capsys.readouterr()
    evaluate.main(["--model_path", *runs])
    assert capsys.readouterr().out.splitlines()[-1].split()[5] == "-"
    [result] = evaluate.main(["--model_path", runs[0], "--topk", "20"])
    assert not [key for key in result if key.startswith("top")]


def test_what_does_not_fit_is_explained(shapes_run, tmp_path):
    run = shapes_run(epochs=1)
    with pytest.raises(UserError, match=r"it fits resnet20: give --model resnet20"):
        evaluate.main(["--model_path", str(run), "--model", "resnet32"])
    torch.save(build_model("resnet20", 10).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"made for 10 classes, .* the data has 4\n.*--class_list"):
        evaluate.main(["--model_path", str(tmp_path / "bare.pt"), "--dataset", "shapes", "--num_classes", "4"])
    with pytest.raises(UserError, match="no best.pt"):
        evaluate.main(["--model_path", str(tmp_path)])
    with pytest.raises(UserError, match="no such file"):
        evaluate.main(["--model_path", str(tmp_path / "x.pt")])


def test_a_part_of_the_classes_is_told_by_name(shapes_run, capsys):
    run = shapes_run(epochs=1)
    [whole] = evaluate.main(["--model_path", str(run)])
    [part] = evaluate.main(["--model_path", str(run), "--num_classes", "4"])
    assert "has 10 classes, of which the data has 4" in capsys.readouterr().out
    assert part["classes"] == whole["classes"] and sum(map(sum, part["confusion"][4:])) == 0


def test_info_tells_what_a_file_holds(shapes_run, tmp_path, capsys):
    run = shapes_run(epochs=1)
    torch.save({"net": build_model("wrn16_8", 5).state_dict()}, tmp_path / "f.pth")
    ours, theirs = evaluate.main(["--info", "--model_path", str(run), str(tmp_path / "f.pth")])
    assert (ours["network"], ours["classes"], ours["epoch"]) == ("resnet20", 10, 1) and "--dataset shapes" in ours[
        "trained with"
    ]
    assert (theirs["network"], theirs["classes"], theirs["epoch"]) == ("wrn16_8", 5, None)
    assert "network      wrn16_8" in capsys.readouterr().out


@pytest.mark.data
@pytest.mark.parametrize(("name", "accuracy"), [("resnet20", 91.73), ("resnet56", 93.39)])
def test_published_weights_give_their_accuracy(real_data, name, accuracy):
    """He et al.'s networks as converted from a public training: the accuracy stated with the weights."""
    file = real_data / "weights" / f"{name}_cifar10.pt"
    words = ["--model_path", str(file), "--dataset", "cifar10", "--data_dir", str(real_data), "--norm", "imagenet"]
    [result] = evaluate.main([*words, "--download", "no"])
    assert round(result["top1"], 2) == accuracy
