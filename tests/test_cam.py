"""End-to-end tests of cam.py on images of all kinds."""

import sys
import types
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.models import get_model

import cam
from engine.data.views import CenterCrop
from engine.errors import UserError
from engine.inference.classifier import Classifier
from explanation import crop_for_model, show_images
from explanation.explainer import make_view
from models import build_model

RED = (200, 40, 20)


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    """torchvision's squeezenet1_1 with random weights: its classes have ImageNet's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.pt"
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), path)
    return f"squeezenet1_1={path}"


class BrightnessNet(nn.Module):
    """A network that sees class 0 in bright areas, class 1 in dark ones, class 2 nowhere, class 3 like 0 but weaker."""

    def __init__(self, average: bool = True, scale: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 8, stride=8, bias=False)
        nn.init.constant_(self.conv.weight, scale)
        self.pool = nn.AdaptiveAvgPool2d(1 if average else 2)
        self.linear = nn.Linear(1 if average else 4, 4, bias=False)
        self.linear.weight.data = torch.tensor([[1.0], [-1.0], [0.0], [0.5]]).expand_as(self.linear.weight).clone()

    def forward(self, images):
        return self.linear(self.pool(self.conv(images)).flatten(1))


@pytest.fixture
def use_toy(monkeypatch):
    """A function that makes every --model_path load a BrightnessNet for images of `size` pixels.

    No file can hold a network that is neither of this project nor of torchvision.
    """

    def use(size: int = 64, titles: tuple[str, ...] = (), **settings) -> None:
        network = BrightnessNet(**settings).eval()
        load_toy = lambda word, models, **_: Classifier(  # noqa: E731
            word, network, (0.0,) * 3, (1.0,) * 3, num_classes=4, image_size=size, titles=list(titles)
        )
        monkeypatch.setattr("explanation.explainer.load_classifier", load_toy)

    return use


@pytest.fixture
def photo(tmp_path) -> str:
    """An image of dark noise, 160 x 240, with a bright square in rows 80..100, columns 60..80."""
    values = np.random.RandomState(0).randint(0, 60, (160, 240, 3)).astype(np.uint8)
    values[80:100, 60:80] = 250
    Image.fromarray(values).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def write_images(root: Path, names: list[str], size=(20, 16)) -> list[str]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, RED).save(root / name)
    return [str(root / name) for name in names]


# ---- The map lies on the part of the image that the classifier sees ----


@pytest.mark.parametrize(
    ("resize", "box"),
    [
        ("keep", (10, 150, 50, 190)),  # 160 x 240 is not resized, and the centre 140 x 140 is seen
        ("square", (10, 150, 15, 225)),  # squeezed to 160 x 160, of which 140 x 140 is seen
        ("whole", (0, 160, 0, 240)),
    ],
)
def test_map_covers_the_crop_and_the_rest_is_pale_and_grey(use_toy, photo, tmp_path, resize, box):
    use_toy(140)
    words = ["--image_path", photo, "--model_path", "a", "--resize", resize, "--raw", "--target_class", "0", "1"]
    bright, dark = cam.main([*words, "-o", str(tmp_path / "out"), "--alpha", "0.3", "--colormap", "viridis"])
    y1, y2, x1, x2 = box
    outside = np.ones((160, 240), bool)
    outside[y1:y2, x1:x2] = False
    before, drawn, heat = pixels(photo), pixels(bright["output"]), np.load(bright["raw"])
    assert heat.shape == (160, 240) and heat.dtype == np.float32 and not heat[outside].any()
    grey = before[outside] @ (0.299, 0.587, 0.114)
    assert np.abs(drawn[outside] - (0.4 * grey + 0.6 * 255)[:, None]).max(initial=0) < 2, "the network did not see it"
    assert heat[y1:y2, x1:x2].min() == 0 and heat.max() == 1
    colours = np.array(matplotlib.colormaps["viridis"](heat))[..., :3] * 255
    expected = 0.7 * before + 0.3 * colours
    assert np.abs(drawn - expected)[~outside].max() < 2, "--raw saves the map that is drawn"
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert 76 <= peak[0] < 104 and 52 <= peak[1] < 88, "the peak is on the bright square, within one cell of the map"
    assert np.load(dark["raw"])[90, 70] < 0.2 and np.load(dark["raw"]).max() == 1


def test_images_are_resized_as_for_the_weights():
    image = np.random.RandomState(0).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    crop, box = crop_for_model(image, make_view(16, "keep", side=20, interpolation="bicubic"))
    expected = Image.fromarray(image).resize((30, 20), Image.Resampling.BICUBIC).crop((7, 2, 23, 18))
    assert box == (4, 36, 14, 46) and np.array_equal(crop, np.asarray(expected))
    assert not np.array_equal(crop, crop_for_model(image, make_view(16, "keep", side=20))[0])


def test_constant_map_is_zero_and_adds_no_colour(use_toy, photo, tmp_path, capsys):
    use_toy()
    words = ["--image_path", photo, "--model_path", "a", "--target_class", "2", "--raw", "--method", "cam", "gradcam"]
    rows = cam.main([*words, "-o", str(tmp_path / "out"), "--resize", "whole"])
    printed = capsys.readouterr().out
    for row in rows:
        assert not np.load(row["raw"]).any() and np.array_equal(pixels(row["output"]), pixels(photo))
        assert f"note: {row['output']}: the map has the same value everywhere" in printed
    name = str(tmp_path / "out" / "one.png")
    (row,) = cam.main([*words[:4], "-o", name, "--alpha", "0", "--resize", "whole"])
    assert row["output"] == name and np.array_equal(pixels(name), pixels(photo)), "alpha 0 shows only the image"


def test_rows_of_the_figure_tell_pictures_of_one_name_apart(use_toy, tmp_path, monkeypatch):
    use_toy()
    drawn = []
    monkeypatch.setattr("explanation.overlay.draw_comparison", lambda path, **given: drawn.append(given))
    files = write_images(tmp_path, ["a/dog.png", "b/dog.png", "a/cat.png"])
    words = ["--image_path", *files, "--model_path", "m", "-o", str(tmp_path / "out"), "--dpi", "50"]
    cam.main([*words, "--figure", str(tmp_path / "f.svg")])
    assert drawn[0]["names"] == ["a/dog.png", "b/dog.png", "cat.png"] and drawn[0]["dpi"] == 50


def test_casm_masks_are_drawn_without_rescaling(casm_file, photo, tmp_path, capsys):
    from saliency.casm.network import load_casm

    words = ["--image_path", photo, "--casm", casm_file, "--raw", "-o", str(tmp_path)]
    words += ["--target_class", "1", "--batch_size", "4"]
    (row,) = cam.main(words)
    saved = load_casm(casm_file)
    crop = torch.from_numpy(crop_for_model(pixels(photo), CenterCrop(32, 32))[0]).permute(2, 0, 1) / 255
    with torch.no_grad():
        mask = saved.network.predict_masks(((crop - 0.5) / 0.25)[None])[0, 0]
    heat = np.load(row["raw"])[:, 40:200]
    assert row["method"] == "casm" and row["predicted"] in saved.classes
    expected = torch.nn.functional.interpolate(mask[None, None], (160, 160), mode="bilinear")[0, 0]
    torch.testing.assert_close(torch.from_numpy(heat), expected)  # not rescaled
    printed = capsys.readouterr().out
    assert "note: no effect with casm: --batch_size, --target_class" in printed
    assert "  casm mask  " in printed and " of " not in printed


# ---- Figures and output files ----


def test_figure_has_a_row_per_image_and_a_column_per_model_and_method(
    net, casm_file, tmp_path, monkeypatch, capsys, recwarn
):
    texts, inner = [], Figure.text
    monkeypatch.setattr(
        Figure, "text", lambda figure, *words, **look: (texts.append(words[2]), inner(figure, *words, **look))
    )
    files = write_images(tmp_path, ["a b.png", "$\\frac$ \u65e5\u672c.png"], (90, 40))
    files += write_images(tmp_path, ["c.png"], (20, 130))
    words = ["--image_path", *files, "--model_path", net, casm_file, "--image_size", "64", "--casm", casm_file]
    words += ["--method", "cam", "layercam", "--target_class", "top2", "--figure", str(tmp_path / "figs" / "all.png")]
    rows = cam.main([*words, "-o", str(tmp_path / "out")])
    columns = [f"{model}\n{method}" for model in ("squeezenet1_1", "random") for method in ("cam", "layercam")]
    assert texts[:9] == [name for name in columns for _ in range(2)] + ["random\ncasm"]
    assert texts[9::10] == [Path(file).name for file in files] and len(texts) == 9 + 3 * 10
    assert texts[10:19] == [f"{row['target']} {row['target_probability']:.0%}" for row in rows[:9]]
    assert [row["image"] for row in rows] == [file for file in files for _ in range(9)]
    width, height = Image.open(tmp_path / "figs" / "all.png").size
    assert width > 10 * 200 and height > 3 * 100
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    assert len({row["output"] for row in rows}) == 27
    printed = capsys.readouterr().out
    for row in rows:
        assert Image.open(row["output"]).size == Image.open(row["image"]).size
        assert (
            f"  predicted {row['predicted']} {row['predicted_probability']:.1%}  " in printed
            and row["output"] in printed
        )
    for first, second in zip(rows[0:4:2], rows[1:4:2], strict=True):  # top2 of the first model, per method
        assert first["target_probability"] == first["predicted_probability"] >= second["target_probability"]


def test_output_names_are_unique(use_toy, tmp_path, capsys):
    use_toy(titles=("Crane", "crane", "a" * 300, "\u65e5" * 300))
    names = ["a/x.png", "b/x.png", "a/x.jpg", "z.png", "\u65e5" * 70 + "1.png", "\u65e5" * 70 + "2.png"]
    files = write_images(tmp_path, names)
    words = ["--image_path", *files, "--model_path", "m" * 200, "--target_class", "0", "1", "2", "3"]
    rows = cam.main([*words, "-o", str(tmp_path / "out"), "--raw"])
    outputs = {Path(row["output"]).name.lower() for row in rows}
    assert len(outputs) == 6 * 4, "one file per image and class"
    assert len(list((tmp_path / "out").iterdir())) == 2 * 6 * 4, "also its raw map, and no temporary files"
    capsys.readouterr()


# ---- Unusual images ----


def test_images_of_extreme_shapes_are_drawn(net, tmp_path):
    sizes = [(1, 1), (1, 400), (400, 1), (2000, 7)]
    files = [write_images(tmp_path, [f"{number}.png"], size)[0] for number, size in enumerate(sizes)]
    words = ["--image_path", *files, "--model_path", net, "--image_size", "64", "--figure", str(tmp_path / "f.png")]
    rows = cam.main([*words, "-o", str(tmp_path / "out"), "--raw"])
    assert [Image.open(row["output"]).size for row in rows] == sizes and all(
        np.load(row["raw"]).any() for row in rows[3:]
    )


def test_unreadable_image_raises_or_is_skipped(use_toy, photo, tmp_path, capsys):
    use_toy()
    bad = [str(tmp_path / name) for name in ("bad.jpg", "empty.jpg")]
    for file, text in zip(bad, ["no picture", ""], strict=True):
        Path(file).write_text(text)
    words = ["--image_path", *bad, photo, "--model_path", "a", "-o", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"bad\.jpg: .*\n.*--on_bad_image skip"):
        cam.main(words)
    assert not (tmp_path / "out").exists()
    (row,) = cam.main([*words, "--on_bad_image", "skip", "--figure", str(tmp_path / "f.png")])
    assert row["image"] == photo and capsys.readouterr().out.count("note: skipped: ") == len(bad)
    with pytest.raises(UserError, match="2 images found, but none can be read"):
        cam.main(["--image_path", *bad, "--model_path", "a", "--on_bad_image", "skip"])


# ---- Target classes ----


def test_several_target_classes_with_names_from_a_file(use_toy, photo, tmp_path):
    use_toy()
    (tmp_path / "names.txt").write_text("n01440764 light, bright\ndark\n\nnone\nhalf\n")
    words = ["--image_path", photo, "--model_path", "a", "--labels", str(tmp_path / "names.txt")]
    rows = cam.main([*words, "--target_class", "none", "TOP2", "1", "none", "-o", str(tmp_path / "out")])
    assert [row["target_index"] for row in rows] == [2, 0, 3, 1], "a class given twice is drawn once"
    assert rows[0]["predicted"] == "light, bright" and rows[0]["target"] == "none"
    assert Path(rows[1]["output"]).name == "photo_a_cam_light_bright.png"
    assert sum(row["target_probability"] for row in rows) == pytest.approx(1)


def test_classes_far_below_the_predicted_one_keep_their_order(use_toy, photo, tmp_path):
    use_toy(scale=100.0)  # the logits are 2000 times 1, -1, 0 and 0.5: all probabilities but one are 0
    words = ["--image_path", photo, "--model_path", "a", "--target_class", "top3", "-o", str(tmp_path)]
    rows = cam.main(words)
    assert [row["target_index"] for row in rows] == [0, 3, 2] and rows[1]["target_probability"] == 0
    assert {row["predicted_index"] for row in rows} == {0}


def test_methods_that_a_network_lacks_are_named_and_the_others_drawn(use_toy, photo, tmp_path, capsys):
    use_toy(average=False)
    words = ["--image_path", photo, "--model_path", "a", "-o", str(tmp_path)]
    for typed, drawn in (([], ["gradcam"]), (["--method", "cam", "layercam", "gradcam"], ["layercam", "gradcam"])):
        assert [row["method"] for row in cam.main([*words, *typed])] == drawn
        assert (
            "note: a: no cam, " in (printed := capsys.readouterr().out) and f"; using {', '.join(drawn)}\n" in printed
        )
    with pytest.raises(UserError, match="use gradcam"):
        cam.main([*words, "--method", "cam"])


# ---- Errors ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--image_path is missing"),
        (["--image_path", "PHOTO", "--method", "casm"], "needs --casm FILE"),
        (["--image_path", "PHOTO", "--method", "grad-cam"], "did you mean gradcam"),
        (["--image_path", "PHOTO", "--colormap", "jett"], "did you mean jet"),
        (["--image_path", "PHOTO", "--figure", "f.jpg"], "ends in .png, .pdf or .svg"),
        (["--image_path", "PHOTO", "--output", "f.jpg"], "must be a folder or end in .png; a map has"),
        (["--image_path", "PHOTO", "--layer", "features"], "--method gradcam"),
        (["--image_path", "PHOTO", "--alpha", "1.5"], "between 0 and 1"),
    ],
)
def test_usage_errors(photo, words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cam.main([photo if word == "PHOTO" else word for word in words])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_path", "nothing.jpg"], "nothing.jpg: no such file"),
        (["--image_path", "*.gif"], r"\*.gif: no image matches"),
        (["--image_path", "hollow"], "hollow: no images in this folder"),
        (["--output", "names.txt"], "names.txt is a file, not a folder"),
        (["--output", "names.txt/deep/a.png"], "names.txt is a file, not a folder"),
        (["--output", "photo.png"], "one of the input images"),
        (["--figure", "./photo.png"], "one of the input images"),
        (["--output", "x.png", "--target_class", "top2"], "2 maps need a folder"),
        (["--output", "folder.png"], "a folder; give a file"),
        (["--target_class", "4"], "--target_class 4: .*0 to 3"),
        (["--target_class", "top0"], "top1 to top4"),
        (["--target_class", "top5"], "top1 to top4"),
        (["--target_class", "brigth"], "the nearest are bright"),
        (["--target_class", "none", "r"], "3 classes match"),
        (["--labels", "names.txt"], "2 names, but a has 4 classes"),
        (["--labels", "photo.png"], "not a text file"),
        (["--method", "gradcam", "--layer", "cnov"], "nearest is 'conv'"),
        (["--method", "gradcam", "--layer", "linear"], "must return maps"),
        (["--image_size", "8", "--method", "cam", "layercam", "--layer", "linear"], "linear"),
    ],
)
def test_user_errors_are_raised_before_anything_is_written(use_toy, photo, tmp_path, monkeypatch, words, message):
    use_toy(titles=("bright", "dark", "none", "other"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "folder.png").mkdir()
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(UserError, match=message):
        cam.main(["--image_path", photo, "--model_path", "a", *words])
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_errors_of_a_network_name_the_classifier(use_toy, net, photo, tmp_path):
    words = ["--image_path", photo, "-o", str(tmp_path / "out"), "--model_path"]
    with pytest.raises(UserError, match=r"squeezenet1_1 takes no images of 8 pixels .*--image_size"):
        cam.main([*words, net, "--image_size", "8"])
    use_toy(average=False)
    with pytest.raises(UserError, match="a: .*gradcam"):
        cam.main([*words, "a", "--method", "cam"])
    use_toy(scale=float("nan"))
    with pytest.raises(UserError, match="a: the outputs are NaN or infinite"):
        cam.main([*words, "a"])
    assert not (tmp_path / "out").exists()


def test_failed_download_error_says_where_to_put_the_weights(photo, monkeypatch):
    def no_network(url, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"put the file resnet50-\w+\.pth into .*checkpoints, or .*resnet50=FILE"):
        cam.main(["--image_path", photo])


# ---- Windows, layers, other networks ----


def test_windows_open_only_with_show_and_a_display(use_toy, photo, tmp_path, monkeypatch, capsys):
    use_toy()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    words = ["--image_path", photo, "--model_path", "a", "-o", str(tmp_path), "--figure", str(tmp_path / "f.png")]
    cam.main(words)
    assert "note" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "platform", "linux")
    cam.main([*words, "--show"])
    assert "no display is available" in capsys.readouterr().out and "matplotlib.pyplot" not in sys.modules

    shown = []
    fake = types.ModuleType("matplotlib.pyplot")
    fake.figure = lambda name, **_: (shown.append(name), matplotlib.figure.Figure())[1]
    fake.show = lambda: shown.append("shown")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", fake)
    monkeypatch.setattr(matplotlib, "pyplot", fake, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    cam.main([*words, "--show"])
    assert shown == [str(tmp_path / "f.png"), "shown"]
    (row,) = cam.main([*words[:6], "--figure", str(tmp_path / "f.pdf"), "--show"])
    assert shown[2:] == [row["output"], "shown"], "a window cannot show a PDF file"
    fake.show = lambda: 1 / 0
    cam.main([*words[:6], "--show"])
    assert "no window could be opened (ZeroDivisionError)" in capsys.readouterr().out
    show_images([str(tmp_path / "f.png")] * 12)
    assert shown.count(str(tmp_path / "f.png")) == 1 + 10


def test_list_layers_prints_names_and_shapes(net, casm_file, use_toy, capsys):
    listed = cam.main(["--list_layers", "--model_path", net, casm_file, "--casm", casm_file])
    assert [one["model"] for one in listed] == ["squeezenet1_1", "random"]
    assert listed[0]["layers"][0] == "features.0" and "layer3.2" in listed[1]["layers"]
    printed = capsys.readouterr().out
    assert (
        "features.0                               64 x 111 x 111" in printed
        and printed.count("(default: the last one before") == 2
    )
    use_toy()
    assert cam.main(["--list_layers", "--method", "casm", "--casm", casm_file]) == [
        {"model": "resnet50", "layers": ["conv", "pool"]}
    ]


def test_network_for_small_images_sees_the_centre_square(shapes_run, photo, tmp_path, capsys):
    run = shapes_run(epochs=1)
    capsys.readouterr()
    words = ["--image_path", photo, "--model_path", str(run), str(run / "last.pt"), "-o", str(tmp_path / "out")]
    rows = cam.main([*words, "--raw", "--method", "gradcam++", "scorecam", "--layer", "layer2", "--batch_size", "7"])
    assert len(rows) == 4 and "note" not in capsys.readouterr().out
    assert rows[0]["predicted"].isalpha() and len({row["model"] for row in rows}) == 2
    heat = np.load(rows[0]["raw"])
    assert not heat[:, :38].any() and not heat[:, 202:].any() and heat[:, 41:60].any() and heat[0].any()


@pytest.mark.data
def test_map_of_a_real_bird_covers_the_bird(real_data, tmp_path):
    """The brambling fills rows 85 to 125 and columns 160 to 195 of the image, 256 x 340."""
    model = f"mobilenet_v2={real_data / 'weights' / 'mobilenet_v2_imagenet_f16.pt'}"
    image = str(real_data / "imagenet_samples" / "n01530575" / "n01530575.jpg")
    words = ["--image_path", image, "--model_path", model, "--raw", "-o", str(tmp_path)]
    predicted, other = cam.main([*words, "--target_class", "predicted", "volcano"])
    assert predicted["target"] == "brambling" and predicted["target_probability"] > 0.9
    heat = np.load(predicted["raw"])
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert 16 <= peak[0] < 240 and 58 <= peak[1] < 282
    assert heat[85:165, 140:230].mean() > 0.7 and heat[16:60, 58:110].mean() < 0.2
    assert np.abs(np.load(other["raw"]) - heat).max() > 0.3


def test_long_classifier_names_give_different_files(photo, tmp_path):
    words = [str(tmp_path / f"{'a' * 70}{number}.pt") for number in (0, 1)]
    for file in words:
        torch.save(build_model("resnet20", 10).state_dict(), file)
    rows = cam.main(["--image_path", photo, "--model_path", *words, "--output", str(tmp_path / "out")])
    assert len({row["output"] for row in rows}) == 2 == len(list((tmp_path / "out").iterdir()))


def test_class_given_twice_is_written_once(use_toy, photo, tmp_path, capsys):
    use_toy()
    words = ["--image_path", photo, "--model_path", "x", "--output", str(tmp_path / "out")]
    (row,) = cam.main(words)
    capsys.readouterr()
    again = cam.main([*words, "--target_class", "predicted", str(row["predicted_index"])])
    assert [one["output"] for one in again] == [row["output"]] * 2 and capsys.readouterr().out.count(row["output"]) == 1


def test_normalisation_comes_from_the_file_or_norm(photo, tmp_path, capsys):
    torch.save(build_model("resnet20", 10).state_dict(), tmp_path / "bare.pt")
    words = ["--image_path", photo, "--model_path", str(tmp_path / "bare.pt"), "--output", str(tmp_path / "out")]
    (plain,) = cam.main(words)
    assert "assuming that of imagenet (set --norm)" in capsys.readouterr().out
    (half,) = cam.main([*words, "--norm", "half"])
    assert "assuming" not in capsys.readouterr().out and half["predicted_probability"] != plain["predicted_probability"]
