"""evaluate.py --export: the exported file computes what the network does, or it is not written."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT

import evaluate
import models
from engine.data.shapes import CLASSES
from engine.data.views import CenterCrop
from engine.errors import UserError
from engine.inference.classifier import Classifier, SavedClassifier, load_classifier
from engine.runtime.checkpoint import FORMAT, read_checkpoint, save_checkpoint
from evaluation import export, export_formats
from evaluation.options import EXPORT_ENDINGS

MEAN, STD = [0.2, 0.5, 0.7], [0.1, 0.25, 0.5]
SMALL_VIT = {"patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3}
PIXELS = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def write_checkpoint(path: Path, model: str, model_args: dict | None = None, **entries) -> str:
    """Write a checkpoint of a random network for images of 16 pixels."""
    torch.manual_seed(1)
    state = models.build_model(model, 10, 16, model_args=model_args).state_dict()
    config = {"model": model, "model_args": model_args or {}, "dataset": "shapes", "image_size": 16}
    content = {"format": FORMAT, "kind": "classifier", "epoch": 3, "model": state, "config": config, "image_size": 16}
    save_checkpoint(path, content | {"classes": CLASSES, "num_classes": 10, "mean": MEAN, "std": STD} | entries)
    return str(path)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> str:
    torch.manual_seed(2)
    average = models.build_model("resnet20", 10, 16).state_dict()
    return write_checkpoint(tmp_path_factory.mktemp("resnet") / "mine.pt", "resnet20", ema=average)


@pytest.fixture(scope="module")
def vit_onnx(tmp_path_factory) -> tuple[str, Path]:
    """A small vision transformer, and the ONNX file of it."""
    for name in ("onnx", "onnxscript", "onnxruntime", "timm"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("vit")
    checkpoint = write_checkpoint(folder / "vit.pt", "timm:vit_tiny_patch16_224", SMALL_VIT)
    evaluate.main(["--model_path", checkpoint, "--export", str(folder / "vit.onnx")])
    return checkpoint, folder / "vit.onnx"


def assert_same_logits(network, checkpoint: str) -> None:
    """Compare an exported network with the classifier of its checkpoint on batches of several sizes."""
    with torch.no_grad():
        expected = load_classifier(checkpoint, models)(PIXELS)
        for count in (1, 2, 9):
            torch.testing.assert_close(network(PIXELS[:count]), expected[:count], rtol=1e-4, atol=1e-5)


def get_description(**changes: str) -> dict[str, str]:
    texts = {"made_by": export.MADE_BY, "model": "resnet20", "dataset": "shapes", "epoch": "3", "num_classes": "10"}
    texts |= {"classes": json.dumps(CLASSES), "image_size": "16", "resize": "16", "interpolation": "bilinear"}
    return texts | {"mean": json.dumps(MEAN), "std": json.dumps(STD)} | changes


def test_an_onnx_file_computes_what_the_network_does(vit_onnx):
    import onnxruntime

    checkpoint, file = vit_onnx
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert_same_logits(lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0]), checkpoint)
    assert [one.shape for one in session.get_inputs() + session.get_outputs()] == [["batch", 3, 16, 16], ["batch", 10]]
    changes = {"model": "timm:vit_tiny_patch16_224", "model_args": json.dumps(SMALL_VIT)}
    assert session.get_modelmeta().custom_metadata_map == get_description(**changes) | export_formats.PROGRAM_TEXTS
    assert [path.name for path in sorted(file.parent.iterdir())] == ["vit.onnx", "vit.pt"], "all is in one file"


def test_a_program_of_torch_computes_what_the_network_does(resnet, tmp_path, capfd):
    file = tmp_path / "model.pt2"
    (result,) = evaluate.main(["--model_path", resnet, "--export", str(file)])
    extra_files = {"metadata.json": ""}
    assert_same_logits(torch.export.load(file, extra_files=extra_files).module(), resnet)
    assert json.loads(extra_files["metadata.json"]) == get_description() | export_formats.PROGRAM_TEXTS
    shown = capfd.readouterr()
    assert shown.err == "" and re.fullmatch(
        r"exporting mine: resnet20, 10 classes, images of 16 pixels\n"
        r"checked with torch \S+ on 100 images of the shapes generator, seed 1: logits differ by at most \S+ "
        r"\(allowed: \S+\)\nwritten: \S+model\.pt2 \(1\.\d MB, program of torch \S+\)\n",
        shown.out,
    )
    assert result["images"] == 100 and result["difference"] < 1e-4 and result["bytes"] == file.stat().st_size


def test_exported_weights_are_read_with_all_that_they_say(resnet, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors")
    file = str(tmp_path / "weights.safetensors")
    evaluate.main(["--model_path", resnet, "--export", file])
    with safetensors.safe_open(file, "pt") as content:
        assert content.metadata() == get_description(format="pt")
    found, expected = (load_classifier(path, models) for path in (file, resnet))
    assert_same_logits(found, resnet)
    for key in ("model", "classes", "titles", "num_classes", "image_size", "mean", "std", "epoch", "resize"):
        assert list(np.atleast_1d(getattr(found, key))) == list(np.atleast_1d(getattr(expected, key))), key
    arguments = "--limit 20 --device cpu --model_path".split()
    capsys.readouterr()
    scores = [result["loss"] for result in evaluate.main([*arguments, file, f"resnet20={file}", resnet])]
    assert scores[0] == scores[1] == scores[2] and "note: --limit" in capsys.readouterr().out
    with pytest.raises(UserError, match="the weights of a classifier alone.*\n.*a new run .* with --init_from"):
        read_checkpoint(Path(file))


def test_the_average_is_exported(resnet, tmp_path):
    pytest.importorskip("safetensors")
    file = tmp_path / "weights.safetensors"
    evaluate.main(["--model_path", resnet, "--export", str(file), "--ema"])
    expected = SavedClassifier(resnet, averaged=True).weights
    assert all(torch.equal(value, expected[key]) for key, value in SavedClassifier(file).weights.items())


@pytest.fixture
def classifier() -> Classifier:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10)).eval()
    return Classifier("mine", network, MEAN, STD, num_classes=10, image_size=16, model="linear")


def make_format(compute, convert=lambda *args: (lambda path: path.write_text("half a file"), "")):
    """A format whose files compute what the function `compute` does."""
    return export_formats.ExportFormat((), convert, lambda path: compute, "torch")


FAULTS = {  # the fault of an exported network -> the network and the message
    "no normalisation": (lambda mine: mine.network, "its logits differ from those of the network by up to"),
    "NaN": (lambda mine: lambda pixels: mine(pixels) / 0 * 0, "its logits differ .* by up to nan"),
    "another order": (lambda mine: lambda pixels: mine(pixels).flip(1), "its logits differ"),
    "a fixed batch": (lambda mine: lambda pixels: mine(pixels.view(9, 3, 16, 16)), "fails on 1 image .RuntimeError"),
    "one row": (lambda mine: lambda pixels: mine(pixels)[:1], r"gives logits \(1, 10\) for 2 images"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_computes_something_else_is_not_written(fault, classifier, tmp_path, monkeypatch):
    make_network, message = FAULTS[fault]
    monkeypatch.setitem(export.FORMATS, ".pt2", make_format(make_network(classifier)))
    with pytest.raises(UserError, match=f"model.pt2: not written, since .*{message}"):
        export.export_classifier(tmp_path / "model.pt2", classifier, CenterCrop(16, 16), PIXELS)
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_reader_refuses_is_not_written(classifier, tmp_path, monkeypatch):
    def fail(path):
        raise ValueError("unsupported opset 99")

    monkeypatch.setitem(export.FORMATS, ".pt2", make_format(None)._replace(open=fail))
    message = (
        r"model.pt2: not written, since torch \S+ cannot open it .ValueError: unsupported opset 99.\nupdate it: pip"
    )
    with pytest.raises(UserError, match=message):
        export.export_classifier(tmp_path / "model.pt2", classifier, CenterCrop(16, 16), PIXELS)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported_leaves_nothing(classifier, tmp_path):
    class Branching(torch.nn.Linear):
        def forward(self, images):
            return super().forward(images if images.sum() > 0 else -images)

    classifier.network[1] = Branching(768, 10)
    with pytest.raises(UserError, match=r"model.pt2: mine cannot be exported \(.+: .+\)\ntry --export .*\.onnx or"):
        export.export_classifier(tmp_path / "model.pt2", classifier, CenterCrop(16, 16), PIXELS)
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_replaced(classifier, tmp_path):
    file = tmp_path / "weights.safetensors"
    export.check_target(file)
    file.write_bytes(b"weights of the user")
    with pytest.raises(UserError, match="this file was not written by --export; choose another name"):
        export.check_target(file)
    texts = export.describe(classifier, CenterCrop(16, 16))
    export_formats.convert_to_safetensors(classifier, 16, texts)[0](file)
    export.check_target(file)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="needs onnxscript\npip install onnx onnxscript onnxruntime"):
        export.check_target(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--export model.h5", "--export model.h5: give a file name that ends in .onnx, .pt2 or .safetensors"),
        ("b.pt --export model.pt2", "a file holds a single classifier; give one --model_path"),
        ("--export model.pt2 --task card", "--export: cannot be combined with --task; give one of them"),
        ("--export no/model.pt2", "the folder .*no does not exist"),
    ],
)
def test_options_that_contradict_an_export_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model_path", "a.pt", *words.split()])
    assert re.search(message, capsys.readouterr().err)
    assert tuple(export.FORMATS) == EXPORT_ENDINGS


def test_weights_without_a_normalisation_need_one(tmp_path, capsys):
    pytest.importorskip("safetensors")
    torch.save(models.build_model("resnet20", 7, 32).state_dict(), tmp_path / "bare.pt")
    command = ["--model_path", f"resnet20={tmp_path / 'bare.pt'}", "--export", str(tmp_path / "weights.safetensors")]
    with pytest.raises(UserError, match="does not store how images are normalised.*\ngive --norm"):
        evaluate.main(command)
    evaluate.main([*command, "--norm", "clip", "--batch_size", "3"])
    shown = capsys.readouterr().out
    for note in ("without effect in this call: --batch_size", "checked on drawn images", "stores no class names"):
        assert note in shown
    assert load_classifier(str(tmp_path / "weights.safetensors"), models).mean[0] == pytest.approx(0.48145466)


def test_drawn_images_stand_for_missing_ones_unless_the_user_named_them(tmp_path):
    options = {"dataset": "tiny-imagenet", "data_dir": str(tmp_path), "val_data_dir": None, "val_labels": None}
    images, note = export.load_checked_images(options, CenterCrop(64, 64), {})
    assert len(images) == 100 and images.size == 64
    assert "the images of tiny-imagenet cannot be read: checked on drawn images" in note
    with pytest.raises(UserError, match=str(tmp_path)):
        export.load_checked_images(options, CenterCrop(64, 64), {"data_dir": str(tmp_path)})


def test_the_script_of_the_page_classifies_a_photo_without_torch(vit_onnx, tmp_path):
    checkpoint, file = vit_onnx
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    (tmp_path / "model.onnx").write_bytes(file.read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((45, 30)).save(tmp_path / "photo.jpg", quality=95)
    guard = "import sys\nsys.modules['torch'] = None\n"
    shown = subprocess.run([sys.executable, "-c", guard + script], cwd=tmp_path, capture_output=True, text=True)
    (result,) = evaluate.main(["--model_path", checkpoint, "--predict", str(tmp_path / "photo.jpg"), "--device", "cpu"])
    expected = [(one["class"], 100 * one["probability"]) for one in result["predictions"][0]["top"]]
    lines = [line.rsplit(" ", 1) for line in shown.stdout.splitlines()]
    assert [name for name, _ in lines] == [name for name, _ in expected], shown.stderr
    assert [float(value.rstrip("%")) for _, value in lines] == pytest.approx([value for _, value in expected], abs=0.5)
