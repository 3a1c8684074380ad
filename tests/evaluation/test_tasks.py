"""evaluate.py --task: what the tasks have in common, which errors they report, and what they write."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from PIL import Image
from support import find_free_port, shapes_command, start_script, use_small_network, write_image
from torch.nn import functional as F

import evaluate
import models
import train
from engine.data.datasets import load_evaluation
from engine.data.folders import FileList
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.views import CenterCrop
from engine.errors import UserError
from engine.inference.classifier import Classifier, load_classifier
from engine.runtime.checkpoint import FORMAT
from evaluation.card import format_label, format_markdown, make_rows
from evaluation.card import make_panels as make_card_panels
from evaluation.context import EvalContext, EvalSession, check_same_images
from evaluation.html import to_html
from evaluation.localization_task import describe_constant_maps, evaluate_localization
from evaluation.ood import measure_ood
from evaluation.options import build_parser, merge_trained_options
from evaluation.reports import draw_task
from evaluation.robustness import (
    add_mean_corruption_errors,
    find_published_set,
    make_panels,
    match_published,
    measure_robustness,
)
from evaluation.task_options import TASKS
from evaluation.tasks import plan_accuracy, plan_calibration
from models import build_model

SMALL_CARD = "--device cpu --limit 40 --robust_images 16 --severities 5 --eps 1/255 --steps 1".split()
SMALL_CARD += "--background clean rep noise --examples 2".split()
ONLY_CORRUPTIONS = "--attack none --occlusion no".split()
LIMIT = ["--device", "cpu", "--limit", "20"]


def refuse_constant(constant: str):
    raise ValueError(f"{constant} is not valid JSON")


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(), parse_constant=refuse_constant)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_network) -> dict[str, str]:
    """A run that classifies the first test images correctly, and bare weights: random ones of ten and of two classes,
    and one with a NaN.
    """
    root = tmp_path_factory.mktemp("runs")
    train.main(shapes_command(root, "--image_size", "32", name="trained", epochs=1))
    paths = {"trained": root / "shapes" / "resnet20" / "trained"}
    fit_last_layer(paths["trained"] / "best.pt")
    for name, classes in (("random", 10), ("two", 2), ("broken", 10)):
        torch.manual_seed(classes)
        state = build_model("resnet20", classes, 32).state_dict()
        if name == "broken":
            state["linear.weight"][0] = torch.finfo().max  # whose logits are infinite
        paths[name] = root / f"{name}.pt"
        torch.save(state, paths[name])
    return {name: str(path) for name, path in paths.items()}


def fit_last_layer(file: Path, count: int = 24) -> None:
    """Fit the last layer to the first test images by least squares, since training would take minutes."""
    saved, image_set = torch.load(file, weights_only=True), load_evaluation("shapes", limit=count)
    inputs = []
    network = build_model("resnet20", 10, 32)
    network.load_state_dict(saved["model"])
    network.linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    network.eval()(image_set.pixels.permute(0, 3, 1, 2) / 127.5 - 1)  # normalised with mean and std 0.5
    features, targets = inputs[0].double(), 10 * F.one_hot(image_set.labels, 10).double()
    fitted = torch.linalg.pinv(torch.cat([features, torch.ones(count, 1)], 1)) @ targets
    saved["model"]["linear.weight"], saved["model"]["linear.bias"] = fitted[:-1].mT.float(), fitted[-1].float()
    torch.save(saved, file)


@pytest.fixture(scope="module")
def card(runs, tmp_path_factory) -> tuple[dict, Path]:
    """The card of the trained run, and its file."""
    path = tmp_path_factory.mktemp("card") / "card.json"
    [result] = evaluate.main(["--task", "card", "--model_path", runs["trained"], *SMALL_CARD, "--output", str(path)])
    return result, path


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the figures of a card, which take longer than its numbers."""
    monkeypatch.setattr("evaluation.card.draw_page", lambda *args, **kwargs: None)
    monkeypatch.setattr("evaluation.card_page.format_page", lambda *args: "")


def assert_same_results(one, other) -> None:
    """Compare results up to rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "name", "file"}:
            assert_same_results(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_results(left, right)
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-5) if isinstance(other, float) else other)


# ---- What every classifier is given ----


def test_results_do_not_depend_on_the_batch_size_or_the_other_classifiers(runs, card, undrawn, tmp_path):
    words = ["--dataset", "shapes", "--batch_size", "7", "--output", str(tmp_path / "two.json")]
    evaluate.main(["--task", "card", "--model_path", runs["random"], runs["trained"], *SMALL_CARD, *words])
    assert_same_results(read_json(card[1])["results"][0], read_json(tmp_path / "two.json")["results"][1])


def evaluate_with_small_network(words: list[str]) -> None:
    use_small_network()
    evaluate.main(words)


def test_two_processes_give_the_results_of_one(runs, card, undrawn, tmp_path, monkeypatch, capsys):
    """This process has rank 0."""
    words = ["--task", "card", "--model_path", runs["trained"], *SMALL_CARD, "--timeout", "60"]
    words += ["--batch_size", "7", "--examples", "0", "--output", str(tmp_path / "two.json")]
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(find_free_port()))
    printed = tmp_path / "output", tmp_path / "errors"
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        if rank == "1":
            other = start_script(partial(evaluate_with_small_network, words), errors=printed[1], output=printed[0])
    capsys.readouterr()
    evaluate.main(words)
    other.join(60)
    assert (other.exitcode, *(file.read_text() for file in printed)) == (0, "", "")
    assert capsys.readouterr().out.count("top-1 accuracy (%)") == 1
    assert_same_results(read_json(card[1])["results"][0], read_json(tmp_path / "two.json")["results"][0])


def test_every_task_counts_the_same_images_as_correct(runs, card):
    path = ["--model_path", runs["trained"], *LIMIT, "--limit", "40"]
    [plain] = evaluate.main(path)
    [robust] = evaluate.main(
        [*path, "--task", "robustness", "--robust_images", "0", "--corruptions", "none", "--eps", "0", "--steps", "2"]
    )
    assert set(robust["attacks"].values()) == {plain["top1"]} and robust["clean"] == plain["top1"]
    assert robust["occlusion"]["patches"]["top1"][0] == robust["occlusion"]["centre"]["top1"][0] == plain["top1"]
    assert card[0]["accuracy"]["top1"] == card[0]["localization"]["backgrounds"]["clean"]["top1"] == plain["top1"]
    calibration = card[0]["calibration"]
    assert calibration["accuracy"] == calibration["after"]["accuracy"]
    assert calibration["images"] + calibration["held_out"] == 40


def test_other_data_is_normalised_as_in_training(runs, tmp_path):
    image_set = load_evaluation("shapes", limit=20)
    for number, (pixels, label) in enumerate(zip(image_set.pixels, image_set.labels, strict=True)):
        folder = tmp_path / image_set.classes[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    words = ["--dataset", "folder", "--val_data_dir", str(tmp_path), "--image_size", "32", *LIMIT]
    [result] = evaluate.main(["--model_path", runs["trained"], *words, "--workers", "0"])
    assert result["top1"] == 100


def write_arrays(root: Path, image_set: ImageSet, names: list[str]) -> None:
    """Write a published set whose corruptions leave the images unchanged."""
    root.mkdir(exist_ok=True)
    for name in names:
        np.save(root / f"{name}.npy", np.concatenate([image_set.pixels.numpy()] * 5))
    np.save(root / "labels.npy", image_set.labels.numpy().astype(np.uint8))


def test_published_corruptions_are_measured_on_the_clean_images(runs, tmp_path, capsys):
    image_set = load_evaluation("shapes", limit=60)
    write_arrays(tmp_path / "c", image_set, ["fog", "spatter"])
    words = [
        "--task",
        "robustness",
        "--model_path",
        runs["trained"],
        *ONLY_CORRUPTIONS,
        *LIMIT,
        "--limit",
        "40",
        "--robust_images",
        "16",
    ]
    words += ["--corruptions", str(tmp_path / "c"), "--dataset", "shapes"]
    [result] = evaluate.main([*words, "--reference", runs["random"]])
    [other] = evaluate.main([runs["random"] if word == runs["trained"] else word for word in words])
    assert result["corruptions"] == {name: dict.fromkeys(range(1, 6), result["clean"]) for name in ("fog", "spatter")}
    quotient = (100 - result["clean"]) / (100 - other["clean"])
    assert list(result["ce"]) == ["fog"] and result["mce"] == pytest.approx(100 * quotient)
    out = capsys.readouterr().out
    assert "lacks 14 of the 15 corruptions" in out and "of the error of random" in out and "do not match" not in out
    write_arrays(tmp_path / "c", image_set.take(torch.arange(60).roll(1)), ["fog"])
    evaluate.main(words)
    out = capsys.readouterr().out
    assert "do not match those of the test images; using 16 corrupted images spread over the set" in out


def test_published_files_are_matched_by_class_and_name():
    def make_image_set(names: list[str], labels: list[int]) -> ImageSet:
        files = FileList("somewhere", names)
        return ImageSet(ImageFiles(files, CenterCrop(8, 8)), torch.tensor(labels), ["a", "b"], "somewhere", files=files)

    few = make_image_set(["images/7.png", "images/1.png"], [0, 1])
    published = make_image_set(["a/1.jpg", "a/7.jpg", "b/1.jpg", "b/7.jpg"], [0, 0, 1, 1])
    found = match_published(make_context(few), published, few, limit=2)
    assert found.files.names() == ["a/7.jpg", "b/1.jpg"] and found.labels.tolist() == [0, 1]


def test_labels_of_a_published_array_are_those_of_the_data_set(capsys):
    """The network may have the classes in another order."""

    def make_image_set(labels: list[int]) -> ImageSet:
        pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3)
        return ImageSet(pixels, torch.tensor(labels), ["a", "b"], "somewhere")

    context = make_context(make_image_set([1, 0, 0]))
    context.class_map = torch.tensor([1, 0])
    few = context.image_set.subsample(2)
    found = match_published(context, make_image_set([0, 1, 1, 0]), few, limit=2)
    assert found.labels.tolist() == few.labels.tolist() == [1, 0]
    assert torch.equal(found.pixels, few.pixels), "the images at the same positions of the set"
    assert not capsys.readouterr().out


def test_published_files_are_shown_whole(tmp_path):
    """They are centre crops already, while the clean images are cropped from larger ones."""
    for name in "ab":
        place = tmp_path / "fog" / "1" / name / "x.png"
        place.parent.mkdir(parents=True)
        pixels = np.full((20, 20, 3), 255, np.uint8)
        pixels[[0, -1]] = 0
        Image.fromarray(pixels).save(place)
    image_set = ImageSet(
        ImageFiles(FileList(tmp_path, []), CenterCrop(20, 24)), torch.arange(2), ["a", "b"], "somewhere"
    )
    found = find_published_set(make_context(image_set), str(tmp_path), "stop").load("fog", 1)
    pixels, _, _ = found.pixels.read([0, 1])
    assert pixels.shape == (2, 20, 20, 3) and not pixels[:, [0, -1]].any() and pixels[:, 1:-1].eq(255).all()


def test_alexnet_errors_are_only_for_imagenet_c(runs, tmp_path):
    write_arrays(tmp_path / "c", load_evaluation("shapes", limit=24), ["fog"])
    words = ["--task", "robustness", "--model_path", runs["trained"], "--corruptions", str(tmp_path / "c")]
    with pytest.raises(UserError, match="its errors were measured on ImageNet-C"):
        evaluate.main([*words, "--reference", "alexnet"])


@pytest.mark.parametrize(
    "dataset, sizes",
    [("imagenet", (299, 342)), ("folder", (299, 342)), ("cifar10", (299, None)), ("shapes", (None, None))],
)
def test_torchvision_networks_get_images_of_their_own_size(dataset, sizes):
    """The size of the weights, for any images but drawn ones; here 299 pixels cropped from 342."""
    parser, typed = build_parser(), {"dataset": dataset}
    classifier = Classifier("net", torch.nn.Identity(), (0.5,) * 3, (0.2,) * 3, image_size=299, resize=342)
    options = merge_trained_options(parser, typed, parser.defaults | typed, classifier)
    assert (options["image_size"], options["eval_resize"]) == sizes


@pytest.mark.parametrize("typed, resize", [({}, 256), ({"image_size": 448}, 512), ({"eval_resize": 230}, 230)])
@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
def test_a_typed_image_size_keeps_the_margin_of_the_training(tmp_path, dataset, typed, resize):
    """Before, --image_size 448 was refused because of the --eval_resize 256 that imagenet_train.py stores."""
    config = {"model": "imagenet_resnet18", "dataset": dataset, "image_size": 224, "eval_resize": 256}
    content = {"format": FORMAT, "config": config, "model": build_model("imagenet_resnet18", 2, 224).state_dict()}
    torch.save(content | {"classes": ["a", "b"], "image_size": 224}, tmp_path / "net.pt")
    classifier = load_classifier(str(tmp_path / "net.pt"), models, image_size=typed.get("image_size"))
    parser = build_parser()
    options = merge_trained_options(parser, typed, parser.defaults | typed, classifier)
    assert (options["image_size"], options["eval_resize"]) == (typed.get("image_size", 224), resize)


def test_assumed_normalisation_and_limit_are_reported(runs, tmp_path, capsys):
    torch.save(build_model("resnet20", 10).state_dict(), tmp_path / "bare.pt")
    evaluate.main(["--model_path", str(tmp_path / "bare.pt"), "--dataset", "shapes", "--limit", "20"])
    assert "does not store how images are normalised; using half (--norm changes it)" in capsys.readouterr().out
    evaluate.main(["--model_path", runs["trained"]])
    out = capsys.readouterr().out
    assert "normalised" not in out and ("--limit 0 takes all" in out) == ("--limit" in out)


def make_context(image_set: ImageSet) -> EvalContext:
    network = build_model("resnet20", 2, 32)
    classifier = Classifier("some", network, (0.0,) * 3, (1.0,) * 3)
    return EvalContext(classifier, image_set, "folder", torch.arange(2), EvalSession(torch.device("cpu"), held_out=0.5))


@pytest.mark.parametrize("background", ["clean", "rep", "noise"])
def test_unreadable_images_are_left_out_of_the_localisation(tmp_path, capsys, background):
    boxes = [torch.tensor([[2 * n, 2 * n + 6, n, n + 10]]) for n in range(6)]
    for number, box in enumerate(boxes):
        y1, y2, x1, x2 = box[0].tolist()
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[y1:y2, x1:x2] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    for name in ("1.png", "2.png", "3.png", "4.png"):  # part of the first and of the last batch, all of the second
        (tmp_path / name).write_bytes(b"")
    files = FileList(tmp_path, [f"{number}.png" for number in range(6)])
    pixels = ImageFiles(files, CenterCrop(32, 32), "skip")
    image_set = ImageSet(pixels, torch.zeros(6, dtype=torch.long), ["a", "b"], "there", files=files)

    def bright(images, labels):
        return images.mean(1), torch.zeros(len(images), 2)

    context = make_context(image_set)
    context.session = replace(context.session, batch_size=2)
    found = evaluate_localization(context, image_set, boxes, bright, background=background, th=0.5, noise_std=0)
    assert found["images"] == found["baselines"]["images"] == 2
    assert found["gt_known"] == 100 or background == "rep"
    assert "4 files of there cannot be read: left out" in capsys.readouterr().out
    for name in ("0.png", "5.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="there: none of the image files can be read"):
        evaluate_localization(context, image_set, boxes, bright, background="clean", th=0.5, noise_std=0)


@pytest.mark.parametrize("memory", [0, 2**31])
def test_unreadable_images_are_left_out_of_every_task(tmp_path, capsys, monkeypatch, memory):
    monkeypatch.setattr("engine.data.image_set.MAX_MEMORY_BYTES", memory)
    for number in range(8):
        write_image(tmp_path / f"{number}.png", 200 * (number % 4 // 3), size=(32, 32))
    files = FileList(tmp_path, [f"{number}.png" for number in range(8)])
    labels = torch.tensor([0, 0, 0, 1] * 2)
    whole = ImageSet(ImageFiles(files, CenterCrop(32, 32), "skip"), labels, ["a", "b"], "there", files=files)
    readable = whole.take(torch.tensor([0, 1, 3, 7]))
    for number in (2, 4, 5, 6):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    found, expected = (measure_tasks(image_set) for image_set in (whole, readable))
    assert found.pop("unreadable") == 4 and expected.pop("unreadable") == 0
    assert found == pytest.approx(expected, rel=1e-5) and found["images"] == found["robust images"] == 4
    assert capsys.readouterr().out.count("4 files of there cannot be read: left out") == 1


def measure_tasks(image_set: ImageSet) -> dict[str, float]:
    torch.manual_seed(0)
    context = make_context(image_set)
    context.session = replace(context.session, batch_size=2, shared={})
    accuracy = plan_accuracy(context, topk=[1], ece=15)()
    calibration = plan_calibration(context, ece=15)()
    robustness = measure_robustness(context)
    ood = measure_ood(context.predict_clean()[0], context.predict("again")[0])
    figures = {key: accuracy[key] for key in ("unreadable", "images", "top1", "loss", "ece")}
    figures |= {key: calibration[key] for key in ("nll", "temperature", "held_out")}
    return figures | {"robust images": robustness["images"], "clean": robustness["clean"], "ood": ood["inside"]}


# ---- Errors and notes ----


@pytest.mark.parametrize(
    "words, message",
    [
        ("--task robustness --attack none --corruptions none --occlusion no", "nothing is left to measure"),
        ("--task robustness --attack none fgsm", "none cannot be combined with an attack"),
        ("--task robustness --eps 8", "write 8/255"),
        ("--task robustness --eps -1", "expected a value between 0 and 1"),
        ("--task robustness --steps 0", "at least 1"),
        ("--task robustness --severities 6", "choose from 1, 2, 3, 4, 5"),
        ("--task card --reference alexnet", "--corruptions DIR"),
        ("--task calibration --ece 0", "give 1 or more"),
        ("--task localization --layer layer3", "such as gradcam"),
        ("--task localization --th 1.1", "between 0 and 1"),
        ("--task card --output card.txt", "ending in .json"),
        ("--task card --output no_such_folder/card.json", "no_such_folder does not exist"),
        ("--task ood --figure tests", "ends in .png, .pdf or .svg"),
        ("--confusion matrix.jpg", "ends in .png, .pdf or .svg"),
        ("--figure FILE.png --dpi 9", "at least 10"),
        ("--output tests", "this is a folder; give the name of a file"),
    ],
)
def test_contradicting_options_are_a_usage_error(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--model_path", "f.pt", *words.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["card", "the task alone"])
@pytest.mark.parametrize(
    "single_task, words, message",
    [
        ("ood", "--ood noise wrong", "wrong: neither a folder nor one of"),
        ("ood", "--ood cifar10=no_such_folder", "cifar10 not found"),
        ("robustness", "--corruptions no_such_folder", "no folder no_such_folder"),
        ("robustness", "--corruptions tests", "no corrupted images in tests"),
        ("robustness", "--reference no_such_file.pt", "no such file or run folder"),
        ("robustness", "--step_size 0", "give more than 0"),
        ("calibration", "--limit 2", "holds out 0 of 2 images to fit the temperature"),
        ("localization", "--method gradcam --layer layer9", "the nearest is 'layer3'"),
        ("localization", "--method gradcam --layer linear", r"layer 'linear' must return maps"),
        (
            "localization",
            "--background rep --limit 1 --ece 0",
            "--background rep: each background comes from another image",
        ),
        ("localization", "--background_dir no_such_folder", "leave the option out"),
        ("localization", "--annotation_path boxes.csv", "shapes comes with its own boxes"),
    ],
)
def test_missing_inputs_are_reported_before_the_evaluation(runs, single_task, words, message, task):
    """The evaluation itself would fail with another error, since the logits of this network are NaN."""
    if task == "the task alone":
        task, words = single_task, words.replace(" --ece 0", "")
    with pytest.raises(UserError, match=message):
        evaluate.main(["--model_path", runs["broken"], "--dataset", "shapes", "--task", task, *LIMIT, *words.split()])


@pytest.mark.parametrize("task", TASKS)
def test_nan_logits_are_an_error(runs, task, tmp_path):
    words = "--attack fgsm --corruptions none --occlusion no --robust_images 4 --dataset shapes --ece".split()
    words += ["5" if task == "calibration" else "0", "--output", str(tmp_path / "out.json")]
    with pytest.raises(UserError, match=r"broken: \d+ of \d+ images.* have logits that are NaN"):
        evaluate.main(["--task", task, "--model_path", runs["broken"], *LIMIT, *words])
    assert not list(tmp_path.iterdir())


def test_different_images_are_not_compared(runs):
    words = ["--model_path", runs["trained"], runs["two"], "--dataset", "shapes"]
    with pytest.raises(UserError, match="has 2 classes and stores no class names"):
        evaluate.main([*words, "--task", "ood", *LIMIT])
    contexts = [make_context(load_evaluation("shapes", limit=limit)) for limit in (8, 9)]
    check_same_images(contexts[:1] * 2, "ood")
    check_same_images(contexts, "accuracy")
    with pytest.raises(UserError, match="the same images, but some has 8 images .* some has 9 images"):
        check_same_images(contexts, "ood")


def test_options_without_effect_are_named_in_one_note(runs, capsys):
    words = "--task robustness --corruptions none --attack fgsm --occlusion no --robust_images 4".split()
    unused = "--steps 3 --reference alexnet --severities 2 --held_out 0.3 --th 0.2 --examples 3 --topk 1".split()
    evaluate.main(["--model_path", runs["trained"], *LIMIT, *words, *unused])
    [note] = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert note.split(": ")[2].split(", ") == unused[::2]
    evaluate.main(["--model_path", runs["trained"], *LIMIT, "--task", "localization", "--held_out", "0.3", "--th", "0"])
    assert "without effect" not in capsys.readouterr().out


# ---- Mean corruption error ----


def test_mce_relative_to_the_classifier_itself_is_100(runs):
    words = [
        "--task",
        "robustness",
        *ONLY_CORRUPTIONS,
        *LIMIT,
        "--limit",
        "40",
        "--robust_images",
        "10",
        "--severities",
        "5",
    ]
    [result] = evaluate.main(["--model_path", runs["trained"], *words, "--reference", runs["trained"]])
    assert result["mce"] == pytest.approx(100) and len(result["ce"]) == 15
    assert result["name"] == "trained" and result["reference"] == "trained (2)"


def test_a_reference_without_errors_keeps_the_other_results(capsys):
    results = [{"name": "a", "corruptions": {"fog": {1: 50.0}}}]
    add_mean_corruption_errors(results, [{"name": "b", "corruptions": {"fog": {1: 100.0}}}])
    assert "mce" not in results[0] and "note: no mCE: fog" in capsys.readouterr().out


# ---- Output ----


def test_the_card_is_a_table_a_page_and_a_file(card, runs):
    result, path = card
    written = read_json(path)
    assert written["results"][0].keys() >= {"calibration", "robustness", "ood", "localization"}
    assert "confusion" not in written["results"][0]["accuracy"] and "pictures" not in written["results"][0]
    heading, table, notes = path.with_suffix(".md").read_text().split("\n\n")
    assert heading == "# Card of 1 classifier on shapes"
    assert {line.count("|") for line in table.splitlines()} == {3} and "**" not in table
    assert notes.splitlines() == [f"- {note}" for note in written["notes"]]
    for text in ("40 test images", "held-out", "15 bins", "16 images spread", "severity 5", "seed 0", "cam maps"):
        assert text in notes, text
    assert notes.rstrip().endswith(f"--output {path}`")
    assert matplotlib.image.imread(path.with_suffix(".png")).std() > 0.05
    page = path.with_suffix(".html").read_text()
    numbers = re.findall(r"\| *(-?\d+\.\d+) *\|", table)
    assert len(numbers) > 20 and all(f'">{number}</td>' in page for number in numbers)
    assert all(to_html(note).replace("`", "") in page for note in written["notes"])
    assert page.count("data:image/svg+xml") == len(make_card_panels([("a", result)]))
    assert page.count("data:image/png") == 2 + 2  # images and their maps
    assert len(re.findall('<tr><th scope="row"[^>]*>fog</th>', page)) == 2  # the mean and severity 5
    assert sum(result["accuracy"]["class_images"]) == 40


def test_each_of_eleven_classifiers_has_its_own_colour(card):
    panels = make_card_panels([(f"classifier {number}", card[0]) for number in range(11)])
    assert len(panels) > 4
    for title, draw in panels:
        axes = Figure().subplots()
        draw(axes)
        drawn = zip(*axes.get_legend_handles_labels(), strict=True)
        drawn = [handle for handle, label in drawn if label.startswith("classifier ")]
        colours = {
            one[0].get_facecolor() if isinstance(one, BarContainer) else to_rgb(one.get_color()) for one in drawn
        }
        assert len(colours) == len(drawn) == 11, title


def test_the_best_of_several_values_is_bold():
    results = [
        {"name": name, "dataset": "d", "accuracy": {"top1": top1}, "calibration": {"ece": ece, "temperature": ece}}
        for name, top1, ece in (("a|b", 50.0, 3.0), ("c", 70.0, 2.0), ("d", 70.001, 9.0), ("e", None, None))
    ]
    lines = format_markdown(results, make_rows(results), ["a note"]).splitlines()
    assert lines == [
        "# Card of 4 classifiers on d",
        "",
        "|  | a\\|b | c | d | e |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| top-1 accuracy (%) | 50.00 | **70.00** | **70.00** | - |",
        "| ECE (%) | 3.00 | **2.00** | 9.00 | - |",
        "| temperature | 3.00 | 2.00 | 9.00 | - |",
        "",
        "- a note",
    ]
    assert "**" not in format_markdown(results[:1], make_rows(results[:1]), [])


def test_two_classes_have_no_top_5(runs, tmp_path, capsys):
    words = ["--task", "card", "--dataset", "shapes", "--num_classes", "2", *LIMIT, "--ece", "0"]
    words += [*ONLY_CORRUPTIONS, "--corruptions", "none", "--examples", "1", "--output", str(tmp_path / "card.json")]
    [result] = evaluate.main(["--model_path", runs["two"], *words])
    assert "top1" in result["accuracy"] and "top5" not in result["accuracy"]
    assert not {"robustness", "calibration"} & result.keys()
    assert "top-5" not in capsys.readouterr().out and (tmp_path / "card.png").is_file()


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("task", ["robustness", "calibration", "ood", "localization"])
def test_each_task_draws_any_number_of_classifiers(card, tmp_path, task, count):
    names = ["plain", "_hidden", "$x^2", "a/very/long/path/of/some/run/best.pt", "fifth"]
    result = json.loads(json.dumps(card[0][task]), object_hook=convert_severities)
    draw_task(task, [{"name": name, **result} for name in names[:count]], str(tmp_path / "figure.png"), dpi=60)
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.05


@pytest.mark.parametrize("count", [1, 8])
def test_the_legend_of_the_attacks_covers_no_bar_and_the_grid_no_colour(count):
    result = {"clean": 99.0, "attacks": {"FGSM 4/255": 98.0, "PGD 4/255, 20 steps": 97.0}, "images": 24}
    (title, draw), axes = make_panels([(f"run {n}", result) for n in range(count)])[0], Figure().subplots()
    draw(axes)
    axes.figure.canvas.draw()
    assert title == "attacks, 24 images"
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0 and axes.get_axisbelow() is True


@pytest.mark.parametrize(("count", "labels"), [(2, 8), (3, 0)])
def test_the_values_above_the_bars_of_attacks_do_not_run_into_each_other(count, labels):
    result = {"clean": 99.0, "attacks": dict.fromkeys(["FGSM 4/255", "FGSM 8/255", "PGD 4/255"], 10.0), "images": 24}
    axes = Figure(figsize=(4.4, 3.2), dpi=110, layout="constrained").subplots()  # as large as in a card
    make_panels([(f"run {n}", result) for n in range(count)])[0][1](axes)
    axes.figure.canvas.draw()
    spans = sorted(text.get_window_extent().intervalx.tolist() for text in axes.texts)
    assert len(spans) == labels and all(left[1] < right[0] for left, right in zip(spans, spans[1:], strict=False))


def test_each_panel_of_the_card_says_what_it_rests_on(card):
    titles = [title for title, _ in make_card_panels([("a", card[0])])]
    calibrated, boxes = card[0]["calibration"]["images"], card[0]["localization"]["backgrounds"]["clean"]["images"]
    assert {"attacks, 16 images", "occlusion, 16 images", f"calibration, {calibrated} images"} <= set(titles)
    assert f"localisation, {boxes} images" in titles and all("images" in title for title in titles)


def test_constant_maps_are_counted(capsys):
    scores = {"clean": {"constant_maps": 3, "images": 1200}, "rep": {"constant_maps": 0, "images": 1200}}
    (line,) = describe_constant_maps([{"name": "a", "backgrounds": scores}])
    assert line == "a: 3 of 1,200 maps have the same value everywhere; their box is the first pixel"


def convert_severities(content: dict) -> dict:
    """Convert severities back to integers: JSON keys are strings."""
    return {int(key) if key.isdigit() else key: value for key, value in content.items()}


def test_matplotlib_shows_labels_as_they_are():
    assert format_label("_a$b$") == r" _a\$b\$"
    ends = [format_label(f"{start}/shapes/resnet20/a_long_name/{end}.pt") for start in "ab" for end in "cd"]
    assert len(set(ends)) == 4 and max(map(len, ends)) <= 32


def test_classifiers_get_distinct_names(runs, tmp_path):
    folders = [tmp_path / one / "shapes" / "run" for one in ("first", "second")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "best.pt").write_bytes(Path(runs["trained"], "best.pt").read_bytes())
    paths = [str(folder) for folder in (*folders, folders[0])]
    results = evaluate.main(["--task", "ood", "--model_path", *paths, runs["random"], "--dataset", "shapes", *LIMIT])
    longer = [f"{one}/shapes/run" for one in ("first", "second")]
    assert [result["name"].removeprefix(f"{tmp_path}/") for result in results] == [
        *longer,
        f"{longer[0]} (2)",
        "random",
    ]
