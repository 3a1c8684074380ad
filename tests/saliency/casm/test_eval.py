"""Altered images, the classifiers evaluated on them, and the commands eval and plot of saliency.casm."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from support import GOLDEN, shapes_command
from torch.nn import functional as F
from torchvision.models import get_model

import train as train_script
from engine.data.class_names import map_labels
from engine.data.datasets import load_evaluation
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader
from engine.data.views import CenterCrop
from engine.drawing import figures
from engine.errors import UserError
from engine.inference.classifier import Classifier, SavedClassifier
from engine.inference.predict import predict
from engine.runtime.checkpoint import read_file
from engine.runtime.foreign_weights import extract_weights
from models import build_model
from saliency.casm import classifier_eval
from saliency.casm.boxes import binarize
from saliency.casm.classifier_eval import (
    KINDS,
    PUBLISHED_CLASSIFIERS,
    ClassifierPanel,
    load_classifiers,
    load_resnets,
    map_classifier_labels,
    sum_batch_metrics,
)
from saliency.casm.commands import eval as casm_eval
from saliency.casm.commands import plot, score
from saliency.casm.commands import train as casm_train
from saliency.casm.extractors import (
    TOY_MASKS,
    Extractor,
    build_naive_extractor,
    build_source_extractor,
    wrap_classifier,
)
from saliency.casm.masking import inpaint, mask_in, mask_out
from saliency.casm.metrics import choose_plot_batches
from saliency.casm.network import CasmNetwork, build_decoder
from saliency.casm.results import ImageSetCache, ScoringConfig

CPU = torch.device("cpu")
INPAINT = json.loads((GOLDEN / "casm.json").read_text())["inpaint"][0]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, small_network) -> Path:
    """The run folder of a classifier trained for one epoch on 64-pixel shapes, so that the mask grid is coarser."""
    root = tmp_path_factory.mktemp("classifier")
    train_script.main(shapes_command(root, "--image_size", "64", name="base", epochs=1))
    return root / "shapes" / "resnet20" / "base"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, run_folder) -> Path:
    """A CASM checkpoint trained for one epoch, with bilinear upsampling and its own mean and std."""
    root = tmp_path_factory.mktemp("casm")
    words = "--name map --limit 40 --batch-size 13 --epochs 1 --pot 1 --smf 2 --no-progress --upsample bilinear"
    casm_train.main(["--classifier", str(run_folder), "--casms-path", str(root), "--device", "cpu", *words.split()])
    content = read_file(root / "map.chk")
    content |= {"mean": [0.3, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    torch.save(content, root / "map.chk")
    return root / "map.chk"


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A dataset folder with seven noise images in each of three classes of val/."""
    for number, name in enumerate(["n00000007", "n00000009", "unheard_of"]):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for count in range(7):
            noise = np.random.RandomState(10 * number + count).randint(0, 256, (48, 56, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / "val" / name / f"{count}.png")
    return tmp_path / "data"


@pytest.fixture
def squeezenet(tmp_path) -> Path:
    """A file with untrained half-precision weights of torchvision's smallest network, for 1000 classes."""
    torch.save(get_model("squeezenet1_1", weights=None).half().state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


@pytest.fixture
def class_list(tmp_path) -> Path:
    rows = [f"{index},n{index:08d},some name" for index in range(1000)]
    (tmp_path / "classes.csv").write_text("\n".join(["index,wnid,name", *rows]))
    return tmp_path / "classes.csv"


def run_eval(*words) -> list[dict]:
    return casm_eval.main([*map(str, words), "--device", "cpu", "--workers", "0"])


# ---- Altered images ----


def test_altered_images_match_the_golden_file():
    case, expect = INPAINT["case"], INPAINT["expect"]
    mask = json.loads((GOLDEN / "casm.json").read_text())["masks"][case["mask"]]["spec"]
    row, column = np.mgrid[:224, :224]
    soft = np.full((224, 224), mask["base"])
    for rect in mask["rects"]:
        soft[rect["y0"] : rect["y1"], rect["x0"] : rect["x1"]] = rect["v"]
    waves = [np.sin(case["f"] * row + 0.4 * k) * np.cos(case["g"] * column - 0.3 * k) for k in range(3)]
    pixels = torch.from_numpy(np.stack([(wave + 1) / 2 for wave in waves]).astype(np.float32)).unsqueeze(0)
    selected = binarize(torch.from_numpy(soft.astype(np.float32)).unsqueeze(0))
    assert int(selected.sum()) == expect["hole_pixels"]
    for alter, name in ((mask_in, "masked_in_mean"), (mask_out, "masked_out_mean")):
        assert alter(pixels, selected)[0].mean((1, 2)).tolist() == pytest.approx(expect[name], abs=1e-5)
    filled = inpaint(pixels, selected)
    assert filled[0, :, selected[0]].mean(1).tolist() == pytest.approx(expect["inpainted_hole_mean"], abs=0.01)
    assert torch.equal(filled[0, :, ~selected[0]], ((255 * pixels).floor() / 255)[0, :, ~selected[0]])


def test_hidden_pixels_get_the_fill_value_and_others_are_unchanged():
    pixels, selected = torch.rand(3, 3, 6, 9), torch.rand(3, 6, 9) < 0.5
    kept, before = selected.unsqueeze(1).expand_as(pixels), pixels.clone()
    for fill in (0.0, 0.35):
        inside, outside = mask_in(pixels, selected, fill), mask_out(pixels, selected, fill)
        assert torch.equal(inside[kept], pixels[kept]) and torch.equal(outside[~kept], pixels[~kept])
        assert (inside[~kept] == torch.tensor(fill)).all() and (outside[kept] == torch.tensor(fill)).all()
    assert torch.equal(pixels, before)


def test_each_image_is_inpainted_from_its_own_surroundings():
    grey = torch.tensor([100.0, 200.0, 50.0]).view(3, 1, 1, 1).expand(3, 3, 12, 15) / 255
    selected = torch.zeros(3, 12, 15, dtype=torch.bool)
    selected[0, 4:8, 5:9] = True
    selected[2] = True
    filled = inpaint(grey, selected)
    assert torch.equal(filled[1], grey[1]) and torch.equal(filled[0, :, ~selected[0]], grey[0, :, ~selected[0]])
    assert (filled[0] - grey[0]).abs().max() < 0.1, "a hole in a uniform image gets about its color"
    assert filled[2].eq(0).all(), "no pixels are left to inpaint from"
    assert torch.equal(inpaint(grey[:1], selected[:1]), filled[:1])
    assert torch.equal(inpaint(grey, selected, 0.35)[2], torch.full((3, 12, 15), 89 / 255))
    low = torch.full((1, 3, 8, 8), 0.9999)
    assert torch.equal(inpaint(low, torch.zeros(1, 8, 8) > 0), torch.full_like(low, 254) / 255), "8 bits, truncated"


def test_random_toy_masks_toss_a_fair_coin_per_block_or_pixel():
    images, labels = torch.zeros(3, 3, 224, 230), torch.zeros(3, dtype=torch.long)
    masks = {name: build_naive_extractor(name, seed=5).extract(images, labels).masks for name in TOY_MASKS}
    assert all(mask.shape == (3, 224, 230) for mask in masks.values())
    assert masks["zero"].eq(0).all() and masks["one"].eq(1).all()
    blocks = masks["random56"][:, ::4, ::4]
    assert torch.equal(blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :, :230], masks["random56"])
    for mask in (blocks, masks["random224"]):
        assert abs(mask.mean() - 0.5) < 0.02 and set(mask.unique().tolist()) == {0, 1}
        assert not torch.equal(mask[0], mask[1])
    assert 0.45 < (masks["random224"][:, :, 1:] == masks["random224"][:, :, :-1]).float().mean() < 0.55
    again = build_naive_extractor("random56", seed=5)
    assert torch.equal(again.extract(images, labels).masks, masks["random56"])
    assert not torch.equal(again.extract(images, labels).masks, masks["random56"]), "the next batch has other masks"
    assert not torch.equal(build_naive_extractor("random56", seed=6).extract(images, labels).masks, masks["random56"])
    for name in TOY_MASKS:  # binarizing keeps the mask
        assert torch.equal(binarize(masks[name]), masks[name] > 0)


# ---- Classifiers ----


def test_torchvision_classifier_loads_from_a_half_precision_file(squeezenet):
    (classifier,) = load_classifiers([f"squeezenet1_1={squeezenet}"], CPU)
    network = get_model("squeezenet1_1", weights=None)
    network.load_state_dict(torch.load(squeezenet, weights_only=True))
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(classifier(pixels), network.eval()((pixels - mean) / std), atol=1e-5, rtol=1e-5)
    assert (classifier.name, classifier.classes, classifier.num_classes) == ("squeezenet1_1", [], 1000)
    assert not classifier.network.training and not any(p.requires_grad for p in classifier.network.parameters())


def test_densenet_files_with_old_key_names_load(tmp_path):
    network = get_model("densenet121", weights=None, num_classes=3).eval()
    old = {}
    for key, value in network.state_dict().items():
        for layer in ("norm", "conv"):
            for number in "12":
                if "denselayer" in key:
                    key = key.replace(f"{layer}{number}.", f"{layer}.{number}.")
        old[key] = value
    assert old.keys() != network.state_dict().keys()
    torch.save(old, tmp_path / "dense.pth")
    (classifier,) = load_classifiers([f"densenet121={tmp_path / 'dense.pth'}"], CPU)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert classifier.num_classes == 3 and not torch.equal(classifier(pixels), network(pixels))  # it normalizes
    assert all(torch.equal(a, b) for a, b in zip(classifier.network.state_dict().values(), old.values(), strict=True))


def test_own_checkpoints_and_run_folders_load_as_classifiers(run_folder, checkpoint):
    folder, file, chk = load_classifiers([str(run_folder), str(run_folder / "last.pt"), str(checkpoint)], CPU)
    assert [folder.name, file.name, chk.name] == ["base", "last", "map"]
    assert folder.mean == (0.5, 0.5, 0.5) and folder.classes[0] == "disc" and folder.num_classes == 10
    again = load_classifiers(
        [str(run_folder / "best.pt"), str(run_folder), str(run_folder.parent / "base" / "best.pt")], CPU
    )
    assert [classifier.name for classifier in again] == ["best", "base"], "repeated arguments count once"
    image_set = load_evaluation("shapes", image_size=64, limit=20)
    expected, _ = predict(folder.network, DeviceLoader(image_set, 20, device=CPU, mean=(0.5,) * 3, std=(0.5,) * 3))
    with torch.no_grad():
        found = folder(image_set.pixels.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_classifiers_with_the_same_name_are_named_by_their_arguments(tmp_path, squeezenet):
    (tmp_path / "other.pt").write_bytes(squeezenet.read_bytes())
    words = [f"squeezenet1_1={squeezenet}", f"squeezenet1_1={tmp_path / 'other.pt'}"]
    assert [classifier.name for classifier in load_classifiers(words, CPU)] == words


def test_torchvision_weights_are_downloaded_or_the_error_says_where_to_put_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as raised:
        load_classifiers(["resnet18"], CPU)
    assert "put the file resnet18-f37072fd.pth into" in str(raised.value) and str(tmp_path) in str(raised.value)
    assert "resnet18=FILE" in str(raised.value) and len(str(raised.value).splitlines()) == 2
    state, urls = get_model("resnet18", weights=None).state_dict(), []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: urls.append(url) or state)
    (classifier,) = load_classifiers(["resnet18"], CPU)
    assert classifier.name == "resnet18" and urls[0].endswith("resnet18-f37072fd.pth")
    assert torch.equal(classifier.network.conv1.weight, state["conv1.weight"])


def test_files_of_the_pytorch_imagenet_example_load_as_resnets(tmp_path):
    state = {f"module.{key}": value.half() for key, value in get_model("resnet50", weights=None).state_dict().items()}
    (tmp_path / "nets").mkdir()
    torch.save({"epoch": 3, "arch": "resnet50", "state_dict": state}, tmp_path / "nets" / "mine.pth.tar")
    (classifier,) = load_resnets(str(tmp_path / "nets"), CPU)
    assert classifier.name == "mine.pth.tar" and classifier.network.fc.weight.dtype == torch.float32
    assert torch.equal(classifier.network.fc.weight, state["module.fc.weight"].float())
    with pytest.raises(UserError, match="or it holds no files"):
        load_resnets(str(tmp_path / "nowhere"), CPU)


class MaliciousObject:
    def __reduce__(self):
        return print, ("code was run",)


def test_loading_weights_runs_no_code_of_the_file(tmp_path, capsys):
    torch.save({"state_dict": get_model("squeezenet1_1").state_dict(), "args": MaliciousObject()}, tmp_path / "bad.pt")
    assert load_classifiers([f"squeezenet1_1={tmp_path / 'bad.pt'}"], CPU)[0].num_classes == 1000
    assert "code was run" not in capsys.readouterr().out


def test_errors_explain_unknown_classifiers(tmp_path, squeezenet):
    for word, message in {
        "resnet19": "did you mean resnet18",
        f"squeezenet1_1={tmp_path / 'gone.pt'}": "no such file",
        f"squeezenet1_0={squeezenet}": "weights of another architecture than torchvision:squeezenet1_0",
        str(squeezenet): "give NAME=",
        str(tmp_path): "no best.pt",
        "vit_h_14": "give a file of weights as vit_h_14=FILE",
    }.items():
        with pytest.raises(UserError, match=message):
            load_classifiers([word], CPU)


def test_a_classifier_for_images_of_another_size_is_refused():
    class Picky(torch.nn.Identity):
        def forward(self, images):
            assert images.shape[-1] == 32, "Input height doesn't match model"
            return images.flatten(1)

    classifier = Classifier("vit", Picky(), (0.5,) * 3, (0.5,) * 3, num_classes=2)
    images = ImageSet(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.arange(2), ["a", "b"], "drawn")
    extractor = build_source_extractor("gradient", wrap_classifier(classifier, CPU))
    with pytest.raises(UserError, match="vit cannot take images of 64 pixels .*\nset another --image_size"):
        classifier_eval.evaluate_classifiers(extractor, images, [classifier], ScoringConfig(), device=CPU)
    with pytest.raises(UserError, match="vit cannot take images of 64 pixels"):
        extractor.extract(torch.zeros(2, 3, 64, 64), torch.arange(2))


def test_default_classifier_is_that_of_the_checkpoint_unless_it_has_1000_classes(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    few, network = argparse.Namespace(classes=["a", "b"]), torch.nn.Identity()
    own = Extractor("m", None, (0.1,) * 3, (0.2,) * 3, classes=["a", "b"], options={"model": "r"}, num_classes=2)
    own.classifier = network
    panel = ClassifierPanel(None, None, CPU)
    assert panel.select(own, few) == [Classifier("own r", network, (0.1,) * 3, (0.2,) * 3, ["a", "b"], 2)]
    with pytest.raises(UserError, match="--class_list"):
        panel.select(Extractor("published", None, classifier=network, num_classes=1000), few)


def test_published_classifiers_are_loaded_once(monkeypatch):
    requests, network = [], torch.nn.Identity()

    def load(words, device):
        requests.append(words)
        return [Classifier(word, network, (0,) * 3, (1,) * 3) for word in words]

    monkeypatch.setattr(classifier_eval, "load_classifiers", load)
    image_set = argparse.Namespace(classes=[f"n{index:08d}" for index in range(1000)])
    panel = ClassifierPanel(None, None, CPU)
    for extractor in (Extractor("published", None, classifier=network, num_classes=1000), Extractor("toy", None)):
        assert [classifier.name for classifier in panel.select(extractor, image_set)] == PUBLISHED_CLASSIFIERS
    assert requests == [PUBLISHED_CLASSIFIERS] and len(PUBLISHED_CLASSIFIERS) == 17
    named = ClassifierPanel(["one", "two"], None, CPU)
    assert [classifier.name for classifier in named.select(Extractor("toy", None), image_set)] == ["one", "two"]
    with pytest.raises(UserError, match="no default classifier"):
        panel.select(Extractor("toy", None), argparse.Namespace(classes=["a", "b"]))


# ---- Class names ----


def test_labels_are_mapped_by_class_name_and_unknown_classes_become_minus_one():
    assert map_labels(["b", "x", "a"], ["a", "b", "c"]).tolist() == [1, -1, 0]
    assert map_labels(["b", "a"], ["a", "b"], class_list="not read").tolist() == [1, 0], (
        "names in the file take precedence"
    )
    assert torch.equal(map_labels([str(n) for n in range(1000)], []), torch.arange(1000))
    assert map_labels(["a", "b", "c"], [], num_classes=3).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="--class_list FILE"):
        map_labels(["a", "b"], [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "n00000003\nn00000001\n\nn00000002\n"),
        ("list.txt", "n00000003 tench, Tinca tinca\nn00000001 cock\nn00000002 hen\n"),
        ("list.csv", 'index,wnid,name\n0,n00000003,"tench, Tinca"\n1,n00000001,x\n2,n00000002,x\n'),
        ("LIST.CSV", "\ufeffclass,more\nn00000003,1\nn00000001,2\nn00000002,3\n"),
    ],
)
def test_class_lists_load_from_txt_and_csv(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = map_labels(["n00000001", "n00000003", "n99999999"], [], str(tmp_path / name), num_classes=3)
    assert found.tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", b"a\nb\n", "2 classes, but the network has 3"),
        ("list.txt", b"a\nb\na\n", "more than once"),
        ("list.csv", b"index,name\n0,a\n", "none of the columns wnid, class"),
        ("list.csv", b"", "none of the columns wnid, class"),
        ("list.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_errors_explain_bad_class_lists(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        map_labels(["a"], [], str(tmp_path / name), num_classes=3)
    with pytest.raises(UserError, match="No such file"):
        map_labels(["a"], [], str(tmp_path / "gone"), num_classes=3)


# ---- The eval command ----


def test_sums_of_a_batch_match_a_hand_calculation():
    chances = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]])
    found = sum_batch_metrics(chances.log(), torch.tensor([0, 0, 2, -1]))
    entropy = -sum(float(p * p.log()) for p in chances[:3].flatten())
    loss = -float(chances[[0, 1, 2], [0, 0, 2]].log().sum())
    assert found.tolist() == pytest.approx([loss, 2, 3, entropy, 3])
    logits, labels = torch.randn(50, 9), torch.randint(9, (50,))
    ranks = (logits > logits.gather(1, labels.unsqueeze(1))).sum(1)
    expected = [float(F.cross_entropy(logits, labels)) * 50, int((ranks < 1).sum()), int((ranks < 5).sum())]
    assert sum_batch_metrics(logits, labels)[:3].tolist() == pytest.approx(expected)


def compute_expected_results(checkpoint: Path, run_folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Compute top-1 accuracy and loss for every kind of image without the code under test."""
    content = read_file(checkpoint)
    network = CasmNetwork(build_model("resnet20", 10, 64), None)
    network.decoder = build_decoder(network.classifier, 64, "bilinear")
    network.classifier.load_state_dict(content["model"])
    network.decoder.load_state_dict(content["decoder"])
    mean, std = (torch.tensor(content[key]).view(3, 1, 1) for key in ("mean", "std"))
    image_set = load_evaluation("shapes", image_size=64, limit=count)
    pixels = image_set.pixels.permute(0, 3, 1, 2).float() / 255
    classifier = build_model("resnet20", 10, 64).eval()
    classifier.load_state_dict(extract_weights(read_file(run_folder / "best.pt"), run_folder))
    with torch.no_grad():
        selected = binarize(network.eval()((pixels - mean) / std)[0][:, 0])
        kinds = {"clean": pixels, "masked_in": pixels * selected.unsqueeze(1)}
        kinds |= {"masked_out": pixels * ~selected.unsqueeze(1), "inpainted": inpaint(pixels, selected)}
        logits = {kind: classifier((images - 0.5) / 0.5) for kind, images in kinds.items()}
    assert 0.02 < selected.float().mean() < 0.98
    return {
        kind: {
            "l": float(F.cross_entropy(one, image_set.labels)),
            "t1": 100 * float((one.argmax(1) == image_set.labels).float().mean()),
        }
        for kind, one in logits.items()
    }


def test_eval_normalizes_images_and_masks_as_the_checkpoints_say(checkpoint, run_folder):
    (result,) = run_eval("--casms-path", checkpoint, "--classifiers", run_folder, "--limit", 41, "--batch-size", 8)
    assert (result["name"], result["images"], result["left_out"]) == ("map", 41, {})
    for kind, expected in compute_expected_results(checkpoint, run_folder, 41).items():
        row = result[kind]["base"]
        assert row.keys() == {"l", "t1", "t5", "e"} and 0 < row["e"] < 2.31 and row["t1"] <= row["t5"] <= 100
        assert row["l"] == pytest.approx(expected["l"], abs=1e-4) and row["t1"] == pytest.approx(expected["t1"])


def test_toy_mask_zero_gives_the_plain_accuracy_and_one_swaps_the_roles(checkpoint, run_folder, capsys):
    results = run_eval(
        "--casms-path", checkpoint, "--toy", "--limit", 33, "--batch-size", 16, "--classifiers", run_folder
    )
    assert [one["name"] for one in results] == ["map", *TOY_MASKS]
    file = SavedClassifier(run_folder)
    image_set = load_evaluation("shapes", image_size=64, limit=33)
    model = build_model("resnet20", 10, 64)
    model.load_state_dict(file.weights)
    logits, labels = predict(model, DeviceLoader(image_set, 33, device=CPU, mean=(0.5,) * 3, std=(0.5,) * 3))
    plain = 100 * float((logits.argmax(1) == labels).float().mean())
    zero, one = results[1], results[2]
    for row in (zero["clean"], zero["masked_out"], zero["inpainted"], one["masked_in"]):
        assert row["base"]["t1"] == pytest.approx(plain)
        assert row["base"]["l"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)
    assert zero["masked_in"] == one["masked_out"] == one["inpainted"], "these images are black"
    assert results[3]["masked_in"] != zero["masked_in"]
    output = capsys.readouterr().out
    assert "zero: 33 images" in output and "base  masked_out" in output and f"{plain:.2f}" in output


def test_results_do_not_depend_on_batch_size_and_pot_limits_the_images(checkpoint):
    words = ["--casms-path", checkpoint, "--limit", 13]
    (single,), (whole,) = (run_eval(*words, "--batch-size", size) for size in (4, 13))
    for kind in KINDS:
        found, expected = single[kind]["own resnet20"], whole[kind]["own resnet20"]
        assert found == pytest.approx(expected, abs=1e-3)
    (fraction,) = run_eval(*words, "--batch-size", 4, "--pot", 0.5)
    assert (single["images"], fraction["images"]) == (13, 12), "one batch more than the fraction, as published"


def test_default_classifier_uses_the_mean_and_std_of_its_checkpoint(checkpoint):
    (own,) = run_eval("--casms-path", checkpoint.parent, "--limit", 20)
    content, image_set = read_file(checkpoint), load_evaluation("shapes", image_size=64, limit=20)
    model = build_model("resnet20", 10, 64)
    model.load_state_dict(content["model"])
    logits, labels = predict(model, DeviceLoader(image_set, 20, device=CPU, mean=content["mean"], std=content["std"]))
    assert own["clean"]["own resnet20"]["l"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)


def test_images_of_classes_unknown_to_a_classifier_are_left_out(dataset, squeezenet, class_list, capsys):
    words = [dataset, "--toy", "--image-size", 140, "--classifiers", f"squeezenet1_1={squeezenet}", "--batch-size", 5]
    found = run_eval(*words, "--class-list", class_list)
    assert {result["images"] for result in found} == {21}
    assert all(result["left_out"] == {"squeezenet1_1": 7} for result in found)
    image_set = load_evaluation("folder", data_dir=str(dataset), view=CenterCrop(140, 160))
    (classifier,) = load_classifiers([f"squeezenet1_1={squeezenet}"], CPU)
    logits, labels = predict(
        classifier.network, DeviceLoader(image_set, 21, device=CPU, mean=classifier.mean, std=classifier.std)
    )
    known, place = labels < 2, torch.tensor([7, 9, -1])[labels]
    loss = float(F.cross_entropy(logits[known], place[known]))
    assert found[0]["masked_out"]["squeezenet1_1"]["l"] == pytest.approx(loss, abs=1e-4)
    assert "left out 7 images of classes that it does not know" in capsys.readouterr().out
    with pytest.raises(UserError, match="--class_list"):
        run_eval(*words)
    with pytest.raises(UserError, match="classifier squeezenet1_1 knows the class of none of the 21 images"):
        image_set.labels[:] = image_set.classes.index("unheard_of")
        map_classifier_labels(classifier, image_set, 50, str(class_list))
    class_list.write_text("\n".join(["wnid", *(f"m{index}" for index in range(1000))]))
    with pytest.raises(UserError, match="classifier squeezenet1_1: the network knows none"):
        run_eval(*words, "--class-list", class_list)


def test_part_of_imagenet_needs_no_num_classes(dataset, capsys):
    """Train takes the number from the file of the classifier; the images given may be others or of other classes."""
    trained = Extractor("map", None, image_size=32, options={"dataset": "imagenet", "num_classes": 2})
    image_set, name = ImageSetCache(casm_eval.build_parser(), data=str(dataset)).load(trained)
    assert name == "imagenet" and image_set.classes == ["n00000007", "n00000009", "unheard_of"]
    with pytest.raises(UserError, match="--num_classes 2"):
        ImageSetCache(casm_eval.build_parser(), data=str(dataset), num_classes=2).load(trained)


def test_checkpoints_trained_on_other_classes_can_be_evaluated(checkpoint, dataset, squeezenet, class_list):
    words = [dataset, "--dataset", "folder", "--casms-path", checkpoint, "--classifiers", f"squeezenet1_1={squeezenet}"]
    (result,) = run_eval(*words, "--class-list", class_list, "--limit", 3)
    assert result["images"] == 3 and result["left_out"] == {"squeezenet1_1": 1}, "one of each class"


def test_large_images_are_resized_with_a_margin_before_the_crop(dataset):
    options = dict.fromkeys(["dataset", "image_size", "limit", "on_bad_image"]) | {"data": str(dataset)}
    cache = ImageSetCache(casm_eval.build_parser(), **options)
    for size, view in ((224, CenterCrop(224, 256)), (64, CenterCrop(64, 64)), (160, CenterCrop(160, 183))):
        assert cache.load(Extractor("x", None, image_size=size), margin=True)[0].pixels.view == view


def test_basics_extractor_gets_normalized_images_and_its_masks_are_used(tmp_path, dataset, squeezenet, class_list):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "mean, std, image_size = (0, 0, 0), (1 / 255, 1 / 255, 1 / 255), 40\n"
        "def load_model(path): return path\n"
        "def get_masks_and_check_predictions(images, targets, model):\n"
        "    assert images.max() > 200 and set(targets) <= {0, 1, 2}\n"
        "    masks = np.zeros((len(images), 40, 40), np.float32)\n"
        "    masks[:, :, :20] = 1\n"
        "    return masks, masks, np.ones(len(images))\n"
    )
    (result,) = run_eval(
        *(dataset, "--basics", tmp_path / "mine.py", "--classifiers", f"squeezenet1_1={squeezenet}"),
        *("--class-list", class_list, "--limit", 4),
    )
    image_set = load_evaluation("folder", data_dir=str(dataset), view=CenterCrop(40, 40), limit=4)
    pixels = image_set.pixels.read_all(0, lambda items, **_: items)[0].permute(0, 3, 1, 2).float() / 255
    pixels[:, :, :, :20] = 0
    (classifier,) = load_classifiers([f"squeezenet1_1={squeezenet}"], CPU)
    known, place = image_set.labels < 2, torch.tensor([7, 9, -1])[image_set.labels]
    with torch.no_grad():
        loss = float(F.cross_entropy(classifier(pixels)[known], place[known]))
    assert result["name"] == "mine" and result["masked_out"]["squeezenet1_1"]["l"] == pytest.approx(loss, abs=1e-4)


# ---- Result files ----


def test_saved_results_are_reused(checkpoint, tmp_path, capsys):
    words = ["--casms-path", checkpoint, "--limit", 12, "--save-to-file", "--log-path", tmp_path / "logs"]
    first = run_eval(*words, "--output", tmp_path / "all.json")
    assert json.loads((tmp_path / "logs" / "map.eval.json").read_text()) == first[0]
    assert json.loads((tmp_path / "all.json").read_text()) == {"results": first}
    keys = ["name", "path", "images", "left_out", "unreadable", *KINDS, "made_of"]
    assert list(first[0]) == keys and list(first[0]["inpainted"]) == ["own resnet20"]
    capsys.readouterr()
    first[0]["images"] = 0  # a value that no evaluation returns
    (tmp_path / "logs" / "map.eval.json").write_text(json.dumps(first[0]))
    assert run_eval(*words) == first
    assert "done already" in capsys.readouterr().out


def test_a_failed_run_saves_no_result(run_folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "image_size = 64\n"
        "def load_model(path): return iter([True])\n"
        "def get_masks_and_check_predictions(images, targets, model):\n"
        "    next(model)  # fails for the second batch\n"
        "    return images[:, 0] * 0, images[:, 0] * 0, targets == 0\n"
    )
    words = ["--basics", tmp_path / "mine.py", "--dataset", "shapes", "--classifiers", run_folder, "--limit", 12]
    words += ["--save-to-file", "--log-path", tmp_path / "logs"]
    with pytest.raises(UserError, match="StopIteration"):
        run_eval(*words, "--batch-size", 8)
    assert list((tmp_path / "logs").iterdir()) == []
    assert run_eval(*words, "--batch-size", 12)[0]["images"] == 12


def test_score_and_eval_save_to_the_same_folder(checkpoint, tmp_path):
    words = ["--casms-path", checkpoint, "--limit", 12, "--save-to-file", "--log-path", tmp_path]
    scores = score.main([*map(str, words), "--device", "cpu"])
    altered = run_eval(*words)
    assert scores == score.main([*map(str, words), "--device", "cpu"]) and altered == run_eval(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.eval.json", "map.score.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no masks given"),
        (["--toy"], "DATA is missing"),
        (["--toy", "--save-to-file"], "--log-path"),
        (["--toy", "--output", "no/such/place.json"], "its folder does not exist"),
    ],
)
def test_missing_options_are_usage_errors(words, message, capsys):
    with pytest.raises(SystemExit) as exited:
        run_eval(*words)
    assert exited.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "plot"])
def test_help_does_not_import_torch(command):
    program = "import sys; sys.modules['torch'] = sys.modules['cv2'] = None; "
    program += f"from saliency.casm.commands import {command} as c; c.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and f"saliency.casm {command}" in done.stdout, done.stderr


# ---- The plot command ----


@pytest.fixture
def drawn_figures(monkeypatch) -> list:
    """The path and rows of every figure, in the order drawn; no file is written."""
    figures_drawn = []
    monkeypatch.setattr(figures, "draw_tight_grid", lambda path, rows, dpi: figures_drawn.append((Path(path), rows)))
    return figures_drawn


def run_plot(*words) -> list[Path]:
    return plot.main([*map(str, words), "--device", "cpu"])


def test_rows_are_original_masked_in_masked_out_and_inpainted(checkpoint, tmp_path, drawn_figures):
    written = run_plot(
        "--casm-path", checkpoint, "--plots-path", tmp_path, "--limit", 30, "--batch-size", 8, "--columns", 5
    )
    assert [path.name for path in written] == [f"{batch}.png" for batch in choose_plot_batches(4, 16)]
    image_set = load_evaluation("shapes", image_size=64, limit=30)
    content = read_file(checkpoint)
    network = CasmNetwork(build_model("resnet20", 10, 64), None)
    network.decoder = build_decoder(network.classifier, 64, "bilinear")
    network.classifier.load_state_dict(content["model"])
    network.decoder.load_state_dict(content["decoder"])
    mean, std = (torch.tensor(content[key]).view(3, 1, 1) for key in ("mean", "std"))
    for path, rows in drawn_figures:
        first = 8 * int(path.stem)
        pixels = image_set.pixels[first : first + 5].permute(0, 3, 1, 2).float() / 255
        assert len(rows) == 4 and all(row.shape == (min(5, 30 - first), 64, 64, 3) for row in rows)
        with torch.no_grad():
            selected = binarize(network.eval()((pixels - mean) / std)[0][:, 0])
        assert 0.02 < selected.float().mean() < 0.98
        hidden = mask_out(pixels, selected, 0.35)
        expected = [pixels, mask_in(pixels, selected, 0.35), hidden, inpaint(hidden, selected, 0.35)]
        for row, one in zip(rows, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(row).permute(0, 3, 1, 2), one, atol=1e-6, rtol=0)
        hole = selected.numpy()
        assert np.allclose(rows[1][~hole], 0.35) and np.allclose(rows[2][hole], 0.35)
        assert abs(rows[3][hole] - 0.35).mean() > 0.02, "the hole is inpainted"


def test_columns_plots_and_a_last_batch_of_one_image(checkpoint, tmp_path, drawn_figures):
    words = ["--casm-path", checkpoint, "--plots-path", tmp_path, "--limit", 9, "--batch-size", 4, "--plots", -1]
    assert len(run_plot(*words, "--columns", 1)) == 3 and {len(rows[0]) for _, rows in drawn_figures} == {1}
    drawn_figures.clear()
    run_plot(*words)
    assert {path.stem: len(rows[0]) for path, rows in drawn_figures} == {"0": 4, "1": 4, "2": 1}
    drawn_figures.clear()
    run_plot(*words, "--plots", 2, "--seed", 3)
    assert [int(path.stem) for path, _ in drawn_figures] == choose_plot_batches(3, 2, 3)
    assert plot.build_parser().defaults["seed"] == 931001 and "931001" in plot.build_parser().format_help()


def test_only_drawn_images_are_read_and_resize_comes_before_the_crop(checkpoint, tmp_path, dataset, drawn_figures):
    files = sorted((dataset / "val").rglob("*.png"))
    (batch,) = choose_plot_batches(5, 1)
    for number, file in enumerate(files):
        if number not in (5 * batch, 5 * batch + 1):
            file.write_bytes(b"no image")
    words = [dataset, "--dataset", "folder", "--casm-path", checkpoint, "--plots-path", tmp_path / "new" / "place"]
    words += ["--plots", 1, "--batch-size", 5, "--columns", 2]
    assert [path.name for path in run_plot(*words)] == [f"{batch}.png"] and len(drawn_figures[0][1][0]) == 2
    run_plot(*words, "--resize", 80)
    run_plot(*words, "--image-size", 140)
    for (_, rows), view in zip(drawn_figures, ((64, 64), (64, 80), (140, 160)), strict=True):
        image_set = load_evaluation("folder", data_dir=str(dataset), view=CenterCrop(*view))
        expected = image_set.take(torch.tensor([5 * batch])).pixels.read_all(0, lambda items, **_: items)[0][0] / 255
        assert np.allclose(rows[0][0], expected.numpy(), atol=1e-6)
    with pytest.raises(SystemExit):
        run_plot(*words, "--resize", 16)


def test_masks_that_select_nothing_are_told(checkpoint, tmp_path, drawn_figures, monkeypatch, capsys):
    monkeypatch.setattr("saliency.casm.boxes.binarize", lambda masks: torch.zeros_like(masks, dtype=torch.bool))
    words = ["--casm-path", checkpoint, "--plots-path", tmp_path, "--limit", 4, "--plots", 1, "--figure-format", "pdf"]
    (path,) = run_plot(*words)
    assert path.name == "0.pdf"
    assert f"note: {path}: 4 of 4 masks cover nothing or everything" in capsys.readouterr().out


def test_figures_have_the_published_layout(checkpoint, tmp_path, capsys):
    written = run_plot(
        "--casm-path", checkpoint, "--plots-path", tmp_path / "p", "--limit", 3, "--columns", 2, "--plots", 1
    )
    assert written == [tmp_path / "p" / "0.png"] and str(written[0]) in capsys.readouterr().out
    with Image.open(written[0]) as picture:
        assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
        assert np.allclose(picture.size, (450 * 2.05, 450 * 4.15), atol=3)
        points = np.asarray(picture.convert("RGB")).astype(int)
    pixels = load_evaluation("shapes", image_size=64, limit=2).pixels.numpy()
    assert abs(points[221, 221] - pixels[0, 31, 31]).max() <= 2, "there is no frame around the first image"
    assert abs(points[2, -3] - pixels[1, 0, 63]).max() <= 2 and (points[:, 461] == 255).all(), "a gap between columns"


def test_plot_errors_name_the_missing_option(checkpoint, tmp_path, capsys):
    for words, message in (
        ([], "--casm-path FILE"),
        (["--casm-path", checkpoint, "--resize", 96], "only for image files"),
    ):
        with pytest.raises(SystemExit) as exited:
            run_plot(*words)
        assert exited.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file"):
        run_plot("--casm-path", tmp_path / "gone.chk")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create this folder"):
        run_plot("--casm-path", checkpoint, "--limit", 3, "--plots-path", tmp_path / "file")
