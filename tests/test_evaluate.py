import json

import matplotlib.image
import pytest
import torch

import evaluate
import models
from engine.errors import UserError
from engine.inference.classifier import load_classifier
from models import build_model

pytestmark = pytest.mark.usefixtures("small_network")


def test_one_checkpoint_prints_classes_and_writes_confusion_and_json(shapes_run, tmp_path, capsys):
    run = shapes_run(epochs=1)
    capsys.readouterr()
    figure, output = tmp_path / "confusion.png", tmp_path / "out.json"
    argv = [
        "--model_path",
        str(run),
        "--per_class",
        "--confusion",
        str(figure),
        "--output",
        str(output),
        "--topk",
        "1",
        "3",
        "20",
    ]
    [result] = evaluate.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Top-1 Accuracy: {result['top1']:.2f}%  Top-3 Accuracy: {result['top3']:.2f}%"
    assert "top20" not in result and any(line.split()[:1] == ["crescent"] for line in lines)
    assert json.loads(output.read_text())["results"] == [result] and 0 <= result["ece"] <= 100
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum() == result["images"] == 48
    assert confusion.diag().sum() / 48 * 100 == pytest.approx(result["top1"])
    assert matplotlib.image.imread(figure).std() > 0.01


def test_several_checkpoints_give_a_row_each(shapes_run, capsys):
    runs = [str(shapes_run(name=name, method=method, epochs=1)) for name, method in (("a", "none"), ("b", "mixup"))]
    capsys.readouterr()
    assert len(evaluate.main(["--model_path", *runs])) == 2
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if "best.pt" in line] == [f"{run}/best.pt" for run in runs]


def test_bare_weights_are_recognised_by_shape_and_need_a_dataset(tmp_path, capsys):
    torch.save({f"module.{k}": v for k, v in build_model("resnet20", 10).state_dict().items()}, tmp_path / "bare.pth")
    argv = ["--model_path", str(tmp_path / "bare.pth"), "--limit", "20"]
    with pytest.raises(SystemExit):
        evaluate.main(argv)
    assert "--dataset" in capsys.readouterr().err
    [result] = evaluate.main([*argv, "--dataset", "shapes", "--cutout", "--trad_augment"])
    assert (
        result["images"] == 20
        and "options without effect on an evaluation: --cutout, --trad_augment" in capsys.readouterr().out
    )


def test_missing_values_show_as_dashes(shapes_run, capsys):
    runs = [str(shapes_run(*argv, name=name, epochs=1)) for name, argv in (("a", ()), ("b", ("--num_classes", "4")))]
    capsys.readouterr()
    evaluate.main(["--model_path", *runs])
    assert capsys.readouterr().out.splitlines()[-1].split()[5] == "-"
    [result] = evaluate.main(["--model_path", runs[0], "--topk", "20"])
    assert not [key for key in result if key.startswith("top")]


def test_checkpoints_that_do_not_fit_raise_errors_with_a_remedy(shapes_run, tmp_path):
    run = shapes_run(epochs=1)
    with pytest.raises(UserError, match=r"the weights fit resnet20: use --model resnet20"):
        evaluate.main(["--model_path", str(run), "--model", "resnet32"])
    torch.save(build_model("resnet20", 10).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(
        UserError, match=r"has 10 classes and stores no class names; the data set has 4\n.*--class_list"
    ):
        evaluate.main(["--model_path", str(tmp_path / "bare.pt"), "--dataset", "shapes", "--num_classes", "4"])
    with pytest.raises(UserError, match="no best.pt"):
        evaluate.main(["--model_path", str(tmp_path)])
    with pytest.raises(UserError, match="no such file"):
        evaluate.main(["--model_path", str(tmp_path / "x.pt")])


def test_data_with_some_of_the_classes_is_matched_by_name(shapes_run, capsys):
    run = shapes_run(epochs=1)
    [whole] = evaluate.main(["--model_path", str(run)])
    [part] = evaluate.main(["--model_path", str(run), "--num_classes", "4"])
    assert "has 10 classes; the data set has 4 of them" in capsys.readouterr().out
    assert part["classes"] == whole["classes"] and sum(map(sum, part["confusion"][4:])) == 0


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("timm:resnet5", "timm has no classifier 'resnet5'; did you mean timm:resnet50"),
        ("torchvision:resnet51", "torchvision has no classifier 'resnet51'; did you mean torchvision:resnet50"),
        ("timm/resnet50.a1_in1k", "names of the hub are not read; give timm:NAME"),
        ("hf-hub:timm/resnet50.a1_in1k", "names of the hub are not read; give timm:NAME"),
        ("resnet50.a1_in1k", "no such file or run folder, .*; did you mean resnet50"),
        ("https://example.org/resnet50.pth", "URLs are not opened; download the file"),
        ("-", "standard input is not read"),
    ],
)
def test_names_of_other_sources_of_networks_are_explained(name, remedy):
    with pytest.raises(UserError, match=f"^classifier '{name}': {remedy}"):
        load_classifier(name, models)


def test_info_prints_what_checkpoints_contain(shapes_run, tmp_path, capsys):
    run = shapes_run("--method_weights", "1", "2.5", method="none cutmix", epochs=1)
    torch.save({"net": build_model("wrn16_8", 5).state_dict()}, tmp_path / "f.pth")
    ours, theirs = evaluate.main(["--info", "--model_path", str(run), str(tmp_path / "f.pth")])
    assert (ours["network"], ours["classes"], ours["epoch"]) == ("resnet20", 10, 1)
    assert ours["trained with"].startswith("--dataset shapes --method none cutmix --method_weights 1 2.5 --recipe ")
    assert (theirs["network"], theirs["classes"], theirs["epoch"]) == ("wrn16_8", 5, None)
    assert "network      wrn16_8" in capsys.readouterr().out


@pytest.mark.data
@pytest.mark.parametrize(("name", "accuracy"), [("resnet20", 91.73), ("resnet56", 93.39)])
def test_published_weights_reach_their_stated_accuracy(real_data, name, accuracy):
    """He et al.'s networks, converted from a public training run, reach the accuracy published with the weights."""
    file = real_data / "weights" / f"{name}_cifar10.pt"
    argv = ["--model_path", str(file), "--dataset", "cifar10", "--data_dir", str(real_data), "--norm", "imagenet"]
    [result] = evaluate.main([*argv, "--download", "no"])
    assert round(result["top1"], 2) == accuracy
