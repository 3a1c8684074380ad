"""Images altered by masks, the classifiers that judge them, and the commands eval and plot of saliency.casm."""

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
    sum_batch,
)
from saliency.casm.commands import eval as casm_eval
from saliency.casm.commands import plot
from saliency.casm.commands import train as casm_train
from saliency.casm.extractors import TOY_MASKS, Extractor, build_naive_extractor
from saliency.casm.masking import inpaint, mask_in, mask_out
from saliency.casm.metrics import choose_plot_batches
from saliency.casm.network import Casm, build_decoder
from saliency.casm.results import ImageSetCache

CPU = torch.device("cpu")
INPAINT = json.loads((GOLDEN / "casm.json").read_text())["inpaint"][0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a barely trained classifier of shapes of 64 pixels, so that its maps have a coarser grid."""
    root = tmp_path_factory.mktemp("classifier")
    train_script.main(shapes_command(root, "--image_size", "64", name="base", epochs=1))
    return root / "shapes" / "resnet20" / "base"


@pytest.fixture(scope="module")
def maps(tmp_path_factory, run) -> Path:
    """Barely trained maps with what a careless reader would lose: bilinear masks, and statistics of their own."""
    root = tmp_path_factory.mktemp("maps")
    words = "--name map --limit 40 --batch-size 13 --epochs 1 --pot 1 --smf 2 --no-progress --upsample bilinear"
    casm_train.main(["--classifier", str(run), "--casms-path", str(root), "--device", "cpu", *words.split()])
    content = read_file(root / "map.chk")
    content |= {"mean": [0.3, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    torch.save(content, root / "map.chk")
    return root / "map.chk"


@pytest.fixture
def folders(tmp_path) -> Path:
    """Seven noisy pictures in each of three class folders of val/."""
    for number, name in enumerate(["n00000007", "n00000009", "unheard_of"]):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for count in range(7):
            noise = np.random.RandomState(10 * number + count).randint(0, 256, (48, 56, 3)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / "val" / name / f"{count}.png")
    return tmp_path / "data"


@pytest.fixture
def squeezenet(tmp_path) -> Path:
    """A file of torchvision's smallest network, of 1000 classes, untrained, in half precision."""
    torch.save(get_model("squeezenet1_1", weights=None).half().state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


@pytest.fixture
def class_list(tmp_path) -> Path:
    rows = [f"{index},n{index:08d},some name" for index in range(1000)]
    (tmp_path / "classes.csv").write_text("\n".join(["index,wnid,name", *rows]))
    return tmp_path / "classes.csv"


def evaluated(*words) -> list[dict]:
    return casm_eval.main([*map(str, words), "--device", "cpu", "--workers", "0"])


# altered images


def test_altered_images_are_the_recorded_ones():
    case, expect = INPAINT["case"], INPAINT["expect"]
    mask = json.loads((GOLDEN / "casm.json").read_text())["masks"][case["mask"]]["spec"]
    row, column = np.mgrid[:224, :224]
    soft = np.full((224, 224), mask["base"])
    for part in mask["rects"]:
        soft[part["y0"] : part["y1"], part["x0"] : part["x1"]] = part["v"]
    waves = [np.sin(case["f"] * row + 0.4 * k) * np.cos(case["g"] * column - 0.3 * k) for k in range(3)]
    pixels = torch.from_numpy(np.stack([(wave + 1) / 2 for wave in waves]).astype(np.float32)).unsqueeze(0)
    selected = binarize(torch.from_numpy(soft.astype(np.float32)).unsqueeze(0))
    assert int(selected.sum()) == expect["hole_pixels"]
    for alter, name in ((mask_in, "masked_in_mean"), (mask_out, "masked_out_mean")):
        assert alter(pixels, selected)[0].mean((1, 2)).tolist() == pytest.approx(expect[name], abs=1e-5)
    filled = inpaint(pixels, selected)
    assert filled[0, :, selected[0]].mean(1).tolist() == pytest.approx(expect["inpainted_hole_mean"], abs=0.01)
    assert torch.equal(filled[0, :, ~selected[0]], ((255 * pixels).floor() / 255)[0, :, ~selected[0]])


def test_what_is_hidden_takes_the_constant_and_the_rest_stays():
    pixels, selected = torch.rand(3, 3, 6, 9), torch.rand(3, 6, 9) < 0.5
    kept, before = selected.unsqueeze(1).expand_as(pixels), pixels.clone()
    for fill in (0.0, 0.35):
        inside, outside = mask_in(pixels, selected, fill), mask_out(pixels, selected, fill)
        assert torch.equal(inside[kept], pixels[kept]) and torch.equal(outside[~kept], pixels[~kept])
        assert (inside[~kept] == torch.tensor(fill)).all() and (outside[kept] == torch.tensor(fill)).all()
    assert torch.equal(pixels, before)


def test_holes_are_filled_from_around_them_each_image_by_itself():
    grey = torch.tensor([100.0, 200.0, 50.0]).view(3, 1, 1, 1).expand(3, 3, 12, 15) / 255
    selected = torch.zeros(3, 12, 15, dtype=torch.bool)
    selected[0, 4:8, 5:9] = True
    selected[2] = True
    filled = inpaint(grey, selected)
    assert torch.equal(filled[1], grey[1]) and torch.equal(filled[0, :, ~selected[0]], grey[0, :, ~selected[0]])
    assert (filled[0] - grey[0]).abs().max() < 0.1, "a hole in one colour gets about that colour"
    assert filled[2].eq(0).all(), "nothing is left to fill from"
    assert torch.equal(inpaint(grey[:1], selected[:1]), filled[:1])
    assert torch.equal(inpaint(grey, selected, 0.35)[2], torch.full((3, 12, 15), 89 / 255))
    low = torch.full((1, 3, 8, 8), 0.9999)
    assert torch.equal(inpaint(low, torch.zeros(1, 8, 8) > 0), torch.full_like(low, 254) / 255), "the fraction goes"


def test_toy_masks_are_fair_coins_by_block_and_by_pixel():
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
    assert not torch.equal(again.extract(images, labels).masks, masks["random56"]), "the next batch has other coins"
    assert not torch.equal(build_naive_extractor("random56", seed=6).extract(images, labels).masks, masks["random56"])
    for name in TOY_MASKS:  # what is selected is the mask itself
        assert torch.equal(binarize(masks[name]), masks[name] > 0)


# judges


def test_a_network_of_torchvision_is_read_from_a_file_of_half_precision(squeezenet):
    (judge,) = load_classifiers([f"squeezenet1_1={squeezenet}"], CPU)
    network = get_model("squeezenet1_1", weights=None)
    network.load_state_dict(torch.load(squeezenet, weights_only=True))
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(judge(pixels), network.eval()((pixels - mean) / std), atol=1e-5, rtol=1e-5)
    assert (judge.name, judge.classes, judge.num_classes) == ("squeezenet1_1", [], 1000)
    assert not judge.network.training and not any(p.requires_grad for p in judge.network.parameters())


def test_torchvisions_own_files_of_densenets_have_older_names(tmp_path):
    network = get_model("densenet121", weights=None, num_classes=3).eval()
    old = {}
    for key, value in network.state_dict().items():
        for part in ("norm", "conv"):
            for number in "12":
                if "denselayer" in key:
                    key = key.replace(f"{part}{number}.", f"{part}.{number}.")
        old[key] = value
    assert old.keys() != network.state_dict().keys()
    torch.save(old, tmp_path / "dense.pth")
    (judge,) = load_classifiers([f"densenet121={tmp_path / 'dense.pth'}"], CPU)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert judge.num_classes == 3 and not torch.equal(judge(pixels), network(pixels)), "the judge normalises"
    assert all(torch.equal(a, b) for a, b in zip(judge.network.state_dict().values(), old.values(), strict=True))


def test_our_own_files_and_run_folders_judge_under_their_names(run, maps):
    folder, file, chk = load_classifiers([str(run), str(run / "last.pt"), str(maps)], CPU)
    assert [folder.name, file.name, chk.name] == ["base", "last", "map"]
    assert folder.mean == (0.5, 0.5, 0.5) and folder.classes[0] == "disc" and folder.num_classes == 10
    again = load_classifiers([str(run / "best.pt"), str(run), str(run.parent / "base" / "best.pt")], CPU)
    assert [judge.name for judge in again] == ["best", "base"], "one word is one judge"
    part = load_evaluation("shapes", image_size=64, limit=20)
    wanted, _ = predict(folder.network, DeviceLoader(part, 20, device=CPU, mean=(0.5,) * 3, std=(0.5,) * 3))
    with torch.no_grad():
        found = folder(part.pixels.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_judges_of_one_name_are_told_apart_by_their_words(tmp_path, squeezenet):
    (tmp_path / "other.pt").write_bytes(squeezenet.read_bytes())
    words = [f"squeezenet1_1={squeezenet}", f"squeezenet1_1={tmp_path / 'other.pt'}"]
    assert [judge.name for judge in load_classifiers(words, CPU)] == words


def test_published_weights_come_from_the_cache_or_the_error_says_where_to_put_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as told:
        load_classifiers(["resnet18"], CPU)
    assert "put the file resnet18-f37072fd.pth into" in str(told.value) and str(tmp_path) in str(told.value)
    assert "resnet18=FILE" in str(told.value) and len(str(told.value).splitlines()) == 2
    state, asked = get_model("resnet18", weights=None).state_dict(), []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: asked.append(url) or state)
    (judge,) = load_classifiers(["resnet18"], CPU)
    assert judge.name == "resnet18" and asked[0].endswith("resnet18-f37072fd.pth")
    assert torch.equal(judge.network.conv1.weight, state["conv1.weight"])


def test_files_of_the_imagenet_example_judge_as_resnets(tmp_path):
    state = {f"module.{key}": value.half() for key, value in get_model("resnet50", weights=None).state_dict().items()}
    (tmp_path / "nets").mkdir()
    torch.save({"epoch": 3, "arch": "resnet50", "state_dict": state}, tmp_path / "nets" / "mine.pth.tar")
    (judge,) = load_resnets(str(tmp_path / "nets"), CPU)
    assert judge.name == "mine.pth.tar" and judge.network.fc.weight.dtype == torch.float32
    assert torch.equal(judge.network.fc.weight, state["module.fc.weight"].float())
    with pytest.raises(UserError, match="no file in it"):
        load_resnets(str(tmp_path / "nowhere"), CPU)


class Harmful:
    def __reduce__(self):
        return print, ("harm was done",)


def test_a_file_of_weights_runs_nothing(tmp_path, capsys):
    torch.save({"state_dict": get_model("squeezenet1_1").state_dict(), "args": Harmful()}, tmp_path / "bad.pt")
    assert load_classifiers([f"squeezenet1_1={tmp_path / 'bad.pt'}"], CPU)[0].num_classes == 1000
    assert "harm was done" not in capsys.readouterr().out


def test_words_that_mean_nothing_are_explained(tmp_path, squeezenet):
    for word, told in {
        "resnet19": "did you mean resnet18",
        f"squeezenet1_1={tmp_path / 'gone.pt'}": "no such file",
        f"squeezenet1_0={squeezenet}": "does not hold a squeezenet1_0",
        str(squeezenet): "give NAME=",
        str(tmp_path): "no best.pt",
        "vit_h_14": "give a file of weights as vit_h_14=FILE",
    }.items():
        with pytest.raises(UserError, match=told):
            load_classifiers([word], CPU)


def test_networks_of_other_classes_are_judged_by_themselves_and_nothing_is_fetched_in_vain(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    few, network = argparse.Namespace(classes=["a", "b"]), torch.nn.Identity()
    own = Extractor("m", None, (0.1,) * 3, (0.2,) * 3, classes=["a", "b"], options={"model": "r"}, num_classes=2)
    own.classifier = network
    panel = ClassifierPanel(None, None, CPU)
    assert panel.select(own, few) == [Classifier("own r", network, (0.1,) * 3, (0.2,) * 3, ["a", "b"], 2)]
    with pytest.raises(UserError, match="--class_list"):
        panel.select(Extractor("published", None, classifier=network, num_classes=1000), few)


def test_the_published_judges_are_loaded_once(monkeypatch):
    asked, network = [], torch.nn.Identity()

    def load(words, device):
        asked.append(words)
        return [Classifier(word, network, (0,) * 3, (1,) * 3) for word in words]

    monkeypatch.setattr(classifier_eval, "load_classifiers", load)
    part = argparse.Namespace(classes=[f"n{index:08d}" for index in range(1000)])
    panel = ClassifierPanel(None, None, CPU)
    for extractor in (Extractor("published", None, classifier=network, num_classes=1000), Extractor("toy", None)):
        assert [judge.name for judge in panel.select(extractor, part)] == PUBLISHED_CLASSIFIERS
    assert asked == [PUBLISHED_CLASSIFIERS] and len(PUBLISHED_CLASSIFIERS) == 17
    named = ClassifierPanel(["one", "two"], None, CPU)
    assert [judge.name for judge in named.select(Extractor("toy", None), part)] == ["one", "two"]
    with pytest.raises(UserError, match="which classifiers"):
        panel.select(Extractor("toy", None), argparse.Namespace(classes=["a", "b"]))


# classes


def test_classes_are_found_by_name_and_unknown_ones_are_marked():
    assert map_labels(["b", "x", "a"], ["a", "b", "c"]).tolist() == [1, -1, 0]
    assert map_labels(["b", "a"], ["a", "b"], class_list="not read").tolist() == [1, 0], "a file that knows is believed"
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
def test_class_lists_are_read_in_every_form(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = map_labels(["n00000001", "n00000003", "n99999999"], [], str(tmp_path / name), num_classes=3)
    assert found.tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("list.txt", b"a\nb\n", "2 classes, but the network has 3"),
        ("list.txt", b"a\nb\na\n", "more than once"),
        ("list.csv", b"index,name\n0,a\n", "none of the columns wnid, class"),
        ("list.csv", b"", "none of the columns wnid, class"),
        ("list.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_faults_of_class_lists_are_explained(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        map_labels(["a"], [], str(tmp_path / name), num_classes=3)
    with pytest.raises(UserError, match="No such file"):
        map_labels(["a"], [], str(tmp_path / "gone"), num_classes=3)


# the numbers


def test_the_numbers_by_hand():
    chances = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]])
    found = sum_batch(chances.log(), torch.tensor([0, 0, 2, -1]))
    entropy = -sum(float(p * p.log()) for p in chances[:3].flatten())
    loss = -float(chances[[0, 1, 2], [0, 0, 2]].log().sum())
    assert found.tolist() == pytest.approx([loss, 2, 3, entropy, 3])
    logits, labels = torch.randn(50, 9), torch.randint(9, (50,))
    ranks = (logits > logits.gather(1, labels.unsqueeze(1))).sum(1)
    wanted = [float(F.cross_entropy(logits, labels)) * 50, int((ranks < 1).sum()), int((ranks < 5).sum())]
    assert sum_batch(logits, labels)[:3].tolist() == pytest.approx(wanted)


def by_hand(maps: Path, run: Path, count: int) -> dict[str, dict[str, float]]:
    """Top-1 and loss for every kind, from the files alone: nothing of extractors, judges or judging."""
    content = read_file(maps)
    network = Casm(build_model("resnet20", 10, 64), None)
    network.decoder = build_decoder(network.classifier, 64, "bilinear")
    network.classifier.load_state_dict(content["model"])
    network.decoder.load_state_dict(content["decoder"])
    mean, std = (torch.tensor(content[key]).view(3, 1, 1) for key in ("mean", "std"))
    part = load_evaluation("shapes", image_size=64, limit=count)
    pixels = part.pixels.permute(0, 3, 1, 2).float() / 255
    judge = build_model("resnet20", 10, 64).eval()
    judge.load_state_dict(extract_weights(read_file(run / "best.pt"), run))
    with torch.no_grad():
        selected = binarize(network.eval()((pixels - mean) / std)[0][:, 0])
        kinds = {"clean": pixels, "masked_in": pixels * selected.unsqueeze(1)}
        kinds |= {"masked_out": pixels * ~selected.unsqueeze(1), "inpainted": inpaint(pixels, selected)}
        logits = {kind: judge((images - 0.5) / 0.5) for kind, images in kinds.items()}
    assert 0.02 < selected.float().mean() < 0.98
    return {
        kind: {
            "l": float(F.cross_entropy(one, part.labels)),
            "t1": 100 * float((one.argmax(1) == part.labels).float().mean()),
        }
        for kind, one in logits.items()
    }


def test_eval_sees_images_and_masks_as_the_files_say(maps, run):
    (result,) = evaluated("--casms-path", maps, "--classifiers", run, "--limit", 41, "--batch-size", 8)
    assert (result["name"], result["images"], result["left_out"]) == ("map", 41, {})
    for kind, wanted in by_hand(maps, run, 41).items():
        row = result[kind]["base"]
        assert row.keys() == {"l", "t1", "t5", "e"} and 0 < row["e"] < 2.31 and row["t1"] <= row["t5"] <= 100
        assert row["l"] == pytest.approx(wanted["l"], abs=1e-4) and row["t1"] == pytest.approx(wanted["t1"])


def test_zero_is_the_plain_accuracy_and_one_its_mirror(maps, run, capsys):
    results = evaluated("--casms-path", maps, "--toy", "--limit", 33, "--batch-size", 16, "--classifiers", run)
    assert [one["name"] for one in results] == ["map", *TOY_MASKS]
    file = SavedClassifier(run)
    part = load_evaluation("shapes", image_size=64, limit=33)
    model = build_model("resnet20", 10, 64)
    model.load_state_dict(file.weights)
    logits, labels = predict(model, DeviceLoader(part, 33, device=CPU, mean=(0.5,) * 3, std=(0.5,) * 3))
    plain = 100 * float((logits.argmax(1) == labels).float().mean())
    zero, one = results[1], results[2]
    for row in (zero["clean"], zero["masked_out"], zero["inpainted"], one["masked_in"]):
        assert row["base"]["t1"] == pytest.approx(plain)
        assert row["base"]["l"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)
    assert zero["masked_in"] == one["masked_out"] == one["inpainted"], "black"
    assert results[3]["masked_in"] != zero["masked_in"]
    said = capsys.readouterr().out
    assert "zero: 33 images" in said and "base  masked_out" in said and f"{plain:.2f}" in said


def test_the_size_of_batches_changes_nothing_and_a_share_of_them_leaves_images_out(maps):
    words = ["--casms-path", maps, "--limit", 13]
    (single,), (whole,) = (evaluated(*words, "--batch-size", size) for size in (4, 13))
    for kind in KINDS:
        found, wanted = single[kind]["own resnet20"], whole[kind]["own resnet20"]
        assert found == pytest.approx(wanted, abs=1e-3)
    (part,) = evaluated(*words, "--batch-size", 4, "--pot", 0.5)
    assert (single["images"], part["images"]) == (13, 12), "one batch more than the share, as published"


def test_the_network_of_the_maps_judges_by_default_with_its_own_statistics(maps):
    (own,) = evaluated("--casms-path", maps.parent, "--limit", 20)
    content, part = read_file(maps), load_evaluation("shapes", image_size=64, limit=20)
    model = build_model("resnet20", 10, 64)
    model.load_state_dict(content["model"])
    logits, labels = predict(model, DeviceLoader(part, 20, device=CPU, mean=content["mean"], std=content["std"]))
    assert own["clean"]["own resnet20"]["l"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-4)


def test_images_of_classes_that_a_judge_does_not_know_are_left_out(folders, squeezenet, class_list, capsys):
    words = [folders, "--toy", "--image-size", 140, "--classifiers", f"squeezenet1_1={squeezenet}", "--batch-size", 5]
    found = evaluated(*words, "--class-list", class_list)
    assert {result["images"] for result in found} == {21}
    assert all(result["left_out"] == {"squeezenet1_1": 7} for result in found)
    part = load_evaluation("folder", data_dir=str(folders), view=CenterCrop(140, 160))
    (judge,) = load_classifiers([f"squeezenet1_1={squeezenet}"], CPU)
    logits, labels = predict(judge.network, DeviceLoader(part, 21, device=CPU, mean=judge.mean, std=judge.std))
    known, place = labels < 2, torch.tensor([7, 9, -1])[labels]
    loss = float(F.cross_entropy(logits[known], place[known]))
    assert found[0]["masked_out"]["squeezenet1_1"]["l"] == pytest.approx(loss, abs=1e-4)
    assert "does not know the classes of 7" in capsys.readouterr().out
    with pytest.raises(UserError, match="--class_list"):
        evaluated(*words)
    with pytest.raises(UserError, match="classifier squeezenet1_1 knows the class of none of the 21 images"):
        part.labels[:] = part.classes.index("unheard_of")
        map_classifier_labels(judge, part, 50, str(class_list))
    class_list.write_text("\n".join(["wnid", *(f"m{index}" for index in range(1000))]))
    with pytest.raises(UserError, match="classifier squeezenet1_1: the network knows none"):
        evaluated(*words, "--class-list", class_list)


def test_maps_of_other_classes_are_evaluated_all_the_same(maps, folders, squeezenet, class_list):
    words = [folders, "--dataset", "folder", "--casms-path", maps, "--classifiers", f"squeezenet1_1={squeezenet}"]
    (result,) = evaluated(*words, "--class-list", class_list, "--limit", 3)
    assert result["images"] == 3 and result["left_out"] == {}


def test_large_images_are_cut_out_of_larger_ones(folders):
    options = dict.fromkeys(["dataset", "image_size", "limit", "on_bad_image"]) | {"data": str(folders)}
    cache = ImageSetCache(casm_eval.build_parser(), **options)
    for size, view in ((224, CenterCrop(224, 256)), (64, CenterCrop(64, 64)), (160, CenterCrop(160, 183))):
        assert cache.load(Extractor("x", None, image_size=size), larger=True)[0].pixels.view == view


def test_your_own_extractor_gets_normalised_images_and_its_masks_are_used(tmp_path, folders, squeezenet, class_list):
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
    (result,) = evaluated(
        *(folders, "--basics", tmp_path / "mine.py", "--classifiers", f"squeezenet1_1={squeezenet}"),
        *("--class-list", class_list, "--limit", 4),
    )
    part = load_evaluation("folder", data_dir=str(folders), view=CenterCrop(40, 40), limit=4)
    pixels = part.pixels.read_all(0, lambda items, **_: items)[0].permute(0, 3, 1, 2).float() / 255
    pixels[:, :, :, :20] = 0
    (judge,) = load_classifiers([f"squeezenet1_1={squeezenet}"], CPU)
    with torch.no_grad():
        loss = float(F.cross_entropy(judge(pixels), torch.tensor([7] * 4)))
    assert result["name"] == "mine" and result["masked_out"]["squeezenet1_1"]["l"] == pytest.approx(loss, abs=1e-4)


# what is written


def test_results_are_kept_and_models_that_are_done_are_skipped(maps, tmp_path, capsys):
    words = ["--casms-path", maps, "--limit", 12, "--save-to-file", "--log-path", tmp_path / "logs"]
    first = evaluated(*words, "--output", tmp_path / "all.json")
    assert json.loads((tmp_path / "logs" / "map.json").read_text()) == first[0]
    assert json.loads((tmp_path / "all.json").read_text()) == {"results": first}
    keys = ["name", "path", "images", "left_out", "unreadable", *KINDS, "made_of"]
    assert list(first[0]) == keys and list(first[0]["inpainted"]) == ["own resnet20"]
    capsys.readouterr()
    first[0]["images"] = 0  # no evaluation gives this
    (tmp_path / "logs" / "map.json").write_text(json.dumps(first[0]))
    assert evaluated(*words) == first
    assert "done already" in capsys.readouterr().out


def test_a_run_that_breaks_leaves_no_result_behind(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "image_size = 64\n"
        "def load_model(path): return iter([True])\n"
        "def get_masks_and_check_predictions(images, targets, model):\n"
        "    next(model)  # the second batch breaks\n"
        "    return images[:, 0] * 0, images[:, 0] * 0, targets == 0\n"
    )
    words = ["--basics", tmp_path / "mine.py", "--dataset", "shapes", "--classifiers", run, "--limit", 12]
    words += ["--save-to-file", "--log-path", tmp_path / "logs"]
    with pytest.raises(UserError, match="StopIteration"):
        evaluated(*words, "--batch-size", 8)
    assert list((tmp_path / "logs").iterdir()) == []
    assert evaluated(*words, "--batch-size", 12)[0]["images"] == 12


def test_results_of_another_command_are_not_taken_for_done(maps, tmp_path):
    (tmp_path / "map.json").write_text('{"name": "map", "F1": 0.5}')
    with pytest.raises(UserError, match="another --log-path"):
        evaluated("--casms-path", maps, "--limit", 12, "--save-to-file", "--log-path", tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which maps?"),
        (["--toy"], "DATA is missing"),
        (["--toy", "--save-to-file"], "--log-path"),
        (["--toy", "--output", "no/such/place.json"], "no such folder"),
    ],
)
def test_calls_that_lack_something_are_usage_errors(words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluated(*words)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "plot"])
def test_help_needs_no_torch(command):
    program = "import sys; sys.modules['torch'] = sys.modules['cv2'] = None; "
    program += f"from saliency.casm.commands import {command} as c; c.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and f"saliency.casm {command}" in done.stdout, done.stderr


# pictures


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The rows of every picture, by its path, in the order drawn; nothing is written."""
    seen = []
    monkeypatch.setattr(figures, "draw_tight_grid", lambda path, rows: seen.append((Path(path), rows)))
    return seen


def pictures(*words) -> list[Path]:
    return plot.main([*map(str, words), "--device", "cpu"])


def test_the_rows_are_the_image_what_is_left_what_is_hidden_and_its_filling(maps, tmp_path, drawn):
    written = pictures("--casm-path", maps, "--plots-path", tmp_path, "--limit", 30, "--batch-size", 8, "--columns", 5)
    assert [path.name for path in written] == [f"{batch}.png" for batch in choose_plot_batches(4, 16)]
    part = load_evaluation("shapes", image_size=64, limit=30)
    content = read_file(maps)
    network = Casm(build_model("resnet20", 10, 64), None)
    network.decoder = build_decoder(network.classifier, 64, "bilinear")
    network.classifier.load_state_dict(content["model"])
    network.decoder.load_state_dict(content["decoder"])
    mean, std = (torch.tensor(content[key]).view(3, 1, 1) for key in ("mean", "std"))
    for path, rows in drawn:
        first = 8 * int(path.stem)
        pixels = part.pixels[first : first + 5].permute(0, 3, 1, 2).float() / 255
        assert len(rows) == 4 and all(row.shape == (min(5, 30 - first), 64, 64, 3) for row in rows)
        with torch.no_grad():
            selected = binarize(network.eval()((pixels - mean) / std)[0][:, 0])
        assert 0.02 < selected.float().mean() < 0.98
        hidden = mask_out(pixels, selected, 0.35)
        wanted = [pixels, mask_in(pixels, selected, 0.35), hidden, inpaint(hidden, selected, 0.35)]
        for row, one in zip(rows, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(row).permute(0, 3, 1, 2), one, atol=1e-6, rtol=0)
        hole = selected.numpy()
        assert np.allclose(rows[1][~hole], 0.35) and np.allclose(rows[2][hole], 0.35)
        assert abs(rows[3][hole] - 0.35).mean() > 0.02, "the hole is filled from around it"


def test_one_column_all_batches_and_a_last_one_of_one_image(maps, tmp_path, drawn):
    words = ["--casm-path", maps, "--plots-path", tmp_path, "--limit", 9, "--batch-size", 4, "--plots", -1]
    assert len(pictures(*words, "--columns", 1)) == 3 and {len(rows[0]) for _, rows in drawn} == {1}
    drawn.clear()
    pictures(*words)
    assert {path.stem: len(rows[0]) for path, rows in drawn} == {"0": 4, "1": 4, "2": 1}
    drawn.clear()
    pictures(*words, "--plots", 2, "--seed", 3)
    assert [int(path.stem) for path, _ in drawn] == choose_plot_batches(3, 2, 3)
    assert plot.build_parser().defaults["seed"] == 931001 and "931001" in plot.build_parser().format_help()


def test_only_what_is_drawn_is_read_and_resize_is_the_side_before_the_crop(maps, tmp_path, folders, drawn):
    files = sorted((folders / "val").rglob("*.png"))
    (batch,) = choose_plot_batches(5, 1)
    for number, file in enumerate(files):
        if number not in (5 * batch, 5 * batch + 1):
            file.write_bytes(b"no image")
    words = [folders, "--dataset", "folder", "--casm-path", maps, "--plots-path", tmp_path / "new" / "place"]
    words += ["--plots", 1, "--batch-size", 5, "--columns", 2]
    assert [path.name for path in pictures(*words)] == [f"{batch}.png"] and len(drawn[0][1][0]) == 2
    pictures(*words, "--resize", 80)
    pictures(*words, "--image-size", 140)
    for (_, rows), view in zip(drawn, ((64, 64), (64, 80), (140, 160)), strict=True):
        part = load_evaluation("folder", data_dir=str(folders), view=CenterCrop(*view))
        wanted = part.take(torch.tensor([5 * batch])).pixels.read_all(0, lambda items, **_: items)[0][0] / 255
        assert np.allclose(rows[0][0], wanted.numpy(), atol=1e-6)
    with pytest.raises(SystemExit):
        pictures(*words, "--resize", 16)


def test_pictures_are_written_at_their_published_look(maps, tmp_path, capsys):
    written = pictures("--casm-path", maps, "--plots-path", tmp_path / "p", "--limit", 3, "--columns", 2, "--plots", 1)
    assert written == [tmp_path / "p" / "0.png"] and str(written[0]) in capsys.readouterr().out
    with Image.open(written[0]) as picture:
        assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
        assert np.allclose(picture.size, (450 * 2.05, 450 * 4.15), atol=3)
        points = np.asarray(picture.convert("RGB")).astype(int)
    pixels = load_evaluation("shapes", image_size=64, limit=2).pixels.numpy()
    assert abs(points[221, 221] - pixels[0, 31, 31]).max() <= 2, "no frame moves the first picture"
    assert abs(points[2, -3] - pixels[1, 0, 63]).max() <= 2 and (points[:, 461] == 255).all(), "a gap between columns"


def test_calls_of_plot_that_lack_something_are_explained(maps, tmp_path, capsys):
    for words, told in ([], "--casm-path FILE"), (["--casm-path", maps, "--resize", 96], "is for image files"):
        with pytest.raises(SystemExit) as stopped:
            pictures(*words)
        assert stopped.value.code == 2 and told in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file"):
        pictures("--casm-path", tmp_path / "gone.chk")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        pictures("--casm-path", maps, "--limit", 3, "--plots-path", tmp_path / "file")
