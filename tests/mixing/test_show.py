"""python -m mixing.show, called as a user calls it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import saliency
from engine.errors import UserError
from mixing import build_mixer
from mixing.show import __main__ as show
from mixing.show.__main__ import METHODS, collect_mixtures, pixel_shares
from models import build_model
from saliency import Source
from saliency.static import FineGrained


@pytest.fixture
def image_files(tmp_path):
    """Three image files of different shapes and modes."""
    files = []
    for number, (size, mode) in enumerate([((80, 64), "RGB"), ((64, 90), "L"), ((70, 70), "RGBA")]):
        channels = {"RGB": 3, "L": 0, "RGBA": 4}[mode]
        values = np.random.RandomState(number).randint(0, 256, (size[1], size[0], *([channels] if channels else [])))
        files.append(tmp_path / f"picture{number}.png")
        Image.fromarray(values.astype(np.uint8), mode).save(files[-1])
    return [str(file) for file in files]


def test_all_methods_are_shown_without_a_network(image_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "MAX_DRAWS", 4)  # cutout, s2mix, and comixup with noise images, never show another image
    output = tmp_path / "mix.png"
    weights = show.main(
        ["--images", *image_files, "--method", "all", "--image_size", "64", "--n", "2", "-o", str(output)]
    )
    assert weights.keys() == set(METHODS) and Image.open(output).size[0] > 400
    output_text = capsys.readouterr().out
    for name, soft in weights.items():
        assert soft.shape == (2, 3) and torch.allclose(soft.sum(1), torch.ones(2), atol=1e-5)
        assert name in ("cutout", "comixup", "s2mix") or soft.max() < 1, (
            "the images shown must be mixed"
        )  # of noise images comixup shows whole ones
        assert f"{name}: " in output_text
    assert "picture0" in output_text and str(output) in output_text


def test_a_constant_map_is_told_and_pictures_of_one_name_are_told_apart(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("engine.drawing.figures.draw_mixtures", lambda path, **given: drawn.append(given))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / folder / "dog.png")
    words = ["--images", str(tmp_path / "a" / "dog.png"), str(tmp_path / "b" / "dog.png"), "--image_size", "32"]
    show.main([*words, "--method", "mixup", "--dpi", "300", "-o", str(tmp_path / "mix.svg")])
    assert drawn[0]["names"] == ["a/dog.png", "b/dog.png"] and drawn[0]["dpi"] == 300
    assert "saliency is the same everywhere in a/dog.png, b/dog.png" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_figure_is_written_in_the_format_of_its_name(image_files, tmp_path, ending):
    output = tmp_path / f"mix.{ending}"
    show.main(["--images", *image_files, "--method", "mixup", "--image_size", "32", "--n", "1", "-o", str(output)])
    assert output.read_bytes()[:4] == {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xm"}[ending]


def test_the_gradient_of_a_trained_run_guides_the_mix(shapes_run, few_shapes, tmp_path, monkeypatch):
    run = shapes_run(epochs=1)
    args = ["--dataset", "shapes", "--indices", "1", "2", "3", "--model_path", str(run), "--n", "3"]
    first = show.main([*args, "--method", "puzzlemix", "rlmix", "-o", str(tmp_path / "a.png")])
    drawn = []
    monkeypatch.setattr("engine.drawing.figures.draw_mixtures", lambda path, **given: drawn.append(given))
    again = show.main([*args, "--method", "puzzlemix"])
    static = show.main([*args, "--method", "puzzlemix", "--saliency", "static"])
    assert torch.equal(first["puzzlemix"], again["puzzlemix"]), "the same seed must give the same mix"
    assert not torch.equal(first["puzzlemix"], static["puzzlemix"])
    show.main([*args, "--method", "saliencymix"])
    assert drawn[-1]["guide"] == "pixel gradient" and not torch.equal(
        drawn[-1]["saliency"], FineGrained(drawn[-1]["mean"], drawn[-1]["std"])(drawn[-1]["images"])
    )
    assert drawn[-1]["images"].shape[-1] == 16, "the size of the run, not the 32 pixels of the data set"
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_gradient_of_a_torchvision_network_guides_the_mix(image_files, tmp_path):
    from torchvision.models import get_model

    torch.save(get_model("squeezenet1_1", weights=None, num_classes=1000).half().state_dict(), tmp_path / "net.pt")
    args = ["--images", *image_files[:2], "--image_size", "64", "--method", "rmix", "-o", str(tmp_path / "mix.png")]
    args += ["--model_path", str(tmp_path / "net.pt")]
    assert show.main([*args, "--model", "squeezenet1_1"])["rmix"].shape == (4, 2)
    with pytest.raises(UserError, match="weights of another architecture than torchvision:squeezenet1_0"):
        show.main([*args, "--model", "squeezenet1_0"])
    with pytest.raises(UserError, match="did you mean squeezenet1_"):
        show.main([*args, "--model", "squeezenet"])
    with pytest.raises(UserError, match="name the network with --model"):
        show.main(args)


@pytest.mark.parametrize("name", METHODS)
def test_pixel_shares_reconstruct_the_mixed_image(name):
    """The inputs, weighted by their shares, are the mixed image, for all methods that do not move pixels."""
    images, targets = torch.randn(4, 3, 32, 32), torch.eye(4)
    mixer = build_mixer(name, mix_prob=1.0, transport=False)
    mixer(images, targets, lambda images, targets: images.abs().mean(1))  # RL-Mix initialises its agent here
    for seed in range(3):
        torch.manual_seed(seed)
        mixed, soft = mixer(images, targets, lambda images, targets: images.abs().mean(1))
        shares = pixel_shares(mixer, images, targets, lambda images, targets: images.abs().mean(1), seed)
        if name not in ("sage", "smmix", "s2mix", "snapmix", "resizemix", "recursivemix"):
            torch.testing.assert_close(torch.einsum("ijhw,jchw->ichw", shares, images), mixed, atol=1e-5, rtol=1e-5)
        if name not in ("sage", "snapmix", "cutout", "manifold", "recursivemix"):
            atol = 1 / 32**2 if name == "fmix" else 1e-5  # its labels follow lam, its mask is rounded to whole pixels
            torch.testing.assert_close(shares.mean((2, 3)), soft, atol=atol, rtol=0)


def test_batches_mixed_in_a_hidden_layer_are_not_shown():
    images = torch.randn(3, 3, 32, 32)
    _, shares, soft, _ = collect_mixtures(build_mixer("manifold"), images, None, 8, 0)
    torch.testing.assert_close(shares.mean((2, 3)), soft)
    assert len(soft) == 8 and soft.max() < 0.99


def test_errors_name_the_option_and_the_remedy(image_files, few_shapes, tmp_path, capsys):
    for args, message in (
        (["--method", "mixup"], "--images with two or more"),
        (["--images", image_files[0]], "at least two images"),
        (["--images", *image_files, "--method", "puzzle-mix"], "puzzlemix"),
        (["--images", *image_files, "--model", "resnet18"], "--model_path"),
        (["--images", *image_files, "--output", "mix.jpg"], "ends in .png, .pdf or .svg"),
        (["--images", *image_files, "nothing.jpg"], "--images nothing.jpg: no such file"),
    ):
        with pytest.raises(SystemExit) as exit_:
            show.main(args)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    (tmp_path / "text.jpg").write_text("no picture")
    small = ["--images", *image_files, "--image_size", "32"]
    for args, message in (
        (["--images", *image_files, str(tmp_path / "text.jpg")], r"text\.jpg"),
        (["--images", *image_files, "--image_size", "50", "--method", "puzzlemix"], "puzzlemix: block_num: 50x50"),
        ([*small, "--saliency", "gradient", "--method", "rmix"], "needs --model_path"),
        ([*small, "--saliency", "bank", "--method", "rmix"], "while a classifier trains"),
        ([*small, "--adv_p", "1", "--method", "puzzlemix"], "signed pixel gradient"),
        (["--dataset", "shapes", "--indices", "1", "9999"], "40 training images"),
    ):
        with pytest.raises(UserError, match=message):
            show.main([*args, "--output", str(tmp_path / "mix.png")])


def test_the_options_of_a_new_source_reach_it(image_files, tmp_path, monkeypatch):
    received = []

    class Contrast(Source):
        def __init__(self, n_holes: int = 1):  # any flag of the command will do
            received.append(n_holes)

        def __call__(self, images, targets):
            return images.square().sum(1)

    monkeypatch.setitem(sys.modules, "contrast", SimpleNamespace(Contrast=Contrast))
    monkeypatch.setitem(saliency.SOURCES, "contrast", ("contrast", "Contrast"))
    args = [
        "--images",
        *image_files[:2],
        "--image_size",
        "32",
        "--method",
        "saliencymix",
        "-o",
        str(tmp_path / "a.png"),
    ]
    show.main([*args, "--method", "saliencymix", "--saliency", "contrast", "--n_holes", "7"])
    assert received and set(received) == {7}


def test_the_gradient_of_a_vision_transformer_guides_the_mix(image_files, tmp_path):
    pytest.importorskip("timm")
    model, arguments = "timm:vit_tiny_patch16_224", {"patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 3}
    torch.save(build_model(model, 10, 32, model_args=arguments).state_dict(), tmp_path / "net.pt")
    words = ["--images", *image_files[:2], "--method", "sage", "-o", str(tmp_path / "mix.png"), "--n", "2"]
    words += ["--model_path", str(tmp_path / "net.pt"), "--model", model, "--model_args"]
    words += [f"{key}={value}" for key, value in arguments.items()]
    assert show.main(words)["sage"].shape == (2, 2)
    with pytest.raises(UserError, match="net cannot take images of 64 pixels .*\nset another --image_size"):
        show.main([*words, "--image_size", "64"])
    with pytest.raises(SystemExit):
        show.main([*words[:3], "--model_args", "depth=1"])


def test_a_label_rule_changes_the_label_weights_alone(image_files, tmp_path, monkeypatch):
    """ResizeMix shows its whole partner: with a uniform map, the share s of the image becomes s / (s + 1)."""
    drawn, found = [], []
    monkeypatch.setattr("engine.drawing.figures.draw_mixtures", lambda path, **given: drawn.append(given["rows"][0]))
    words = ["--images", *image_files, "--method", "resizemix", "--saliency", "uniform", "--image_size", "32"]
    for rule in ([], ["--labels", "saliency"]):
        found.append(show.main([*words, *rule, "--n", "1", "-o", str(tmp_path / "mix.png")])["resizemix"][0])
    assert torch.equal(drawn[0][1], drawn[1][1]) and torch.equal(drawn[0][2], drawn[1][2])
    assert (found[1] - found[0] / (found[0] + 1)).abs().min() < 1e-6 and not torch.equal(*found)
    with pytest.raises(UserError, match="--method s2mix: labels mean: S2Mix keeps the label of each image"):
        show.main([*words[:-4], "--labels", "mean", "--method", "s2mix", "--image_size", "32"])
    left_out = {"cutout", "manifold", "comixup", "s2mix", "recursivemix"}
    assert show.list_methods(method=["all"], labels="mean") == [name for name in METHODS if name not in left_out]
    assert show.list_methods(method=["all"], labels=None) == METHODS
