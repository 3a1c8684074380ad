"""Recipes that depend on network, method and batch size, and what `--recipe auto` means."""

import pytest

import imagenet_train
import train
from engine.config.modern_recipes import drop_path
from engine.config.recipes import IMAGENET_RECIPES, RECIPES, choose_recipe, get_recipe_options
from engine.config.resolve import check_combinations, fill_in_options, get_phase_options
from engine.config.select import select_kwargs
from engine.config.unused_options import describe_other_recipe
from mixing import MIXERS, collect_hyper_parameters, compose_options, hyper_parameters
from models import check_model_name


def resolve(words: str, script=train, saved: dict | None = None) -> dict:
    """Return all options of a script for a command line."""
    parser = script.build_parser()
    typed = parser.read(words.split())
    options = fill_in_options(typed, saved or {}, parser.defaults)
    check_combinations(options, typed)
    return options


def get_hyper_parameters(words: str, script=train) -> dict[str, dict]:
    """Return method -> the hyper-parameters with which a command mixes."""
    options = get_phase_options(resolve(words, script), 0) if script is imagenet_train else resolve(words, script)
    return collect_hyper_parameters(options["method"], **select_kwargs(options, compose_options(options["method"])))


@pytest.mark.parametrize(
    "script, name", [(train, n) for n in RECIPES] + [(imagenet_train, n) for n in IMAGENET_RECIPES]
)
def test_recipes_name_options_hyper_parameters_and_networks_that_exist(script, name):
    known = script.build_parser().defaults
    for given in (
        {"dataset": None, "model": None},
        {"dataset": "tiny-imagenet", "model": "resnext50", "method": ["cutmix"], "batch_size": 64},
        {"dataset": "cifar10", "model": "timm:convnext_tiny"},
    ):
        options = get_recipe_options(name, **given)
        assert options.keys() <= known.keys()
        assert given["model"] or check_model_name(options["model"]) == options["model"]
        for method, own in options["method_options"].items():
            assert own.keys() <= hyper_parameters(method).keys() and method in MIXERS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ("resnet18", "cifar100", 400, 100, 0.1, 1e-4, "cosine", "cifar", None)),
        ("--model resnext50 --method mixup", ("resnext50", "cifar100", 400, 100, 0.1, 1e-4, "cosine", "cifar", None)),
        ("--model resnext50 --method cutmix", ("resnext50", "cifar100", 400, 100, 0.1, 5e-4, "cosine", "cifar", None)),
        ("--model wrn28_8", ("wrn28_8", "cifar100", 400, 100, 0.03, 1e-3, "cosine", "cifar", None)),
        (
            "--dataset tiny-imagenet --method cutmix --model resnext50 --epochs 200",
            ("resnext50", "tiny-imagenet", 200, 100, 0.2, 5e-4, "cosine", "imagenet", 0.08),
        ),
    ],
)
def test_openmixup_depends_on_network_method_and_data(words, expected):
    keys = ("model", "dataset", "epochs", "batch_size", "lr", "weight_decay", "scheduler", "norm", "min_scale")
    options = resolve(f"--recipe openmixup {words}")
    assert tuple(options[key] for key in keys) == expected
    assert (options["loss"], options["nesterov"], options["dropout"]) == ("ce", False, 0.0)
    assert (options["crop_padding"], options["crop_padding_mode"]) == (4, "reflect")


@pytest.mark.parametrize("data", ["", "--dataset tiny-imagenet"])
def test_openmixup_mixes_every_batch_with_the_alphas_of_its_table(data):
    found = get_hyper_parameters(
        f"--recipe openmixup {data} --method mixup cutmix manifold saliencymix puzzlemix comixup"
    )
    alphas = {name: values["mixup_alpha"] for name, values in found.items()}
    expected = {"mixup": 1, "cutmix": 0.2, "manifold": 2, "saliencymix": 0.2, "puzzlemix": 1, "comixup": 2}
    assert alphas == expected and all(values["mix_prob"] == 1 for values in found.values())
    assert found["puzzlemix"]["clean_lam"] == 0, "only the setting of Puzzle Mix trains on the clean images there"
    typed = get_hyper_parameters("--recipe openmixup --method cutmix --mixup_alpha 0.7")
    assert typed["cutmix"]["mixup_alpha"] == 0.7, "a typed value wins"


def test_deit_switches_between_two_methods_and_scales_its_learning_rate():
    options = resolve("--recipe deit", imagenet_train)
    assert options["method"] == ["mixup", "cutmix"] and options["model_args"] == {"drop_path_rate": 0.1}
    assert (options["optimizer"], options["batch_size"], options["lr"]) == ("adamw", 1024, pytest.approx(1e-3))
    assert resolve("--recipe deit --batch_size 256", imagenet_train)["lr"] == pytest.approx(2.5e-4)
    assert resolve("--recipe deit --batch_size 256 --lr 0.1", imagenet_train)["lr"] == 0.1
    found = get_hyper_parameters("--recipe deit", imagenet_train)
    assert (found["mixup"]["mixup_alpha"], found["cutmix"]["mixup_alpha"]) == (0.8, 1.0)
    assert found["cutmix"]["mix_prob"] == 1, "every batch is mixed"
    assert resolve("--recipe deit --method puzzlemix", imagenet_train)["method"] == ["puzzlemix"]


def test_s2mix_mixes_each_batch_by_one_of_four_methods_in_the_setting_of_openmixup():
    options, found = resolve("--recipe s2mix"), get_hyper_parameters("--recipe s2mix")
    base = resolve("--recipe openmixup --method s2mix mixup cutmix resizemix --epochs 800")
    assert options | {"recipe": "openmixup"} == base and options["method"] == base["method"]
    assert [*found] == base["method"] and all(values["mix_prob"] == 1 for values in found.values())
    assert resolve("--recipe s2mix --method s2mix")["method"] == ["s2mix"], "a typed method wins"
    assert resolve("--recipe s2mix --method_weights 3 1 1 1")["method"] == base["method"]
    assert resolve("--recipe s2mix --model resnext50")["weight_decay"] == 5e-4, "it has cutmix"
    assert resolve("--recipe s2mix --dataset tiny-imagenet")["epochs"] == 400
    assert resolve("--recipe s2mix --epochs 3", saved=options)["method"] == base["method"]


def test_vit_cifar_has_the_alphas_of_deit_where_mixup_and_cutmix_take_turns():
    for methods, alphas in (("cutmix", [2.0]), ("mixup cutmix", [0.8, 1.0]), ("cutmix none mixup", [1.0, 0.8])):
        found = get_hyper_parameters(f"--recipe vit_cifar --method {methods}")
        assert [values["mixup_alpha"] for values in found.values() if values] == alphas
    assert all(values["mix_prob"] == 1 for values in get_hyper_parameters("--recipe deit", imagenet_train).values())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("timm:deit_small_patch16_224", (224, 1e-3, 5.0, 0.8, {"drop_path_rate": 0.1})),
        ("timm:swin_tiny_patch4_window7_224", (224, 5e-4, 5.0, 0.8, {"drop_path_rate": 0.2})),
        ("timm:convnext_tiny", (None, 1e-3, 0.0, None, {"drop_path_rate": 0.3, "patch_size": 1})),
        ("torchvision:vit_b_16", (224, 1e-3, 5.0, 0.8, {})),
    ],
)
def test_vit_cifar_depends_on_the_network(model, expected):
    options = resolve(f"--recipe vit_cifar --model {model}")
    assert tuple(options[key] for key in ("image_size", "lr", "clip_grad", "min_scale", "model_args")) == expected
    assert (options["epochs"], options["warmup_epochs"], options["label_smoothing"]) == (200, 20, 0.1)


def test_drop_path_has_the_name_that_the_constructor_takes():
    assert drop_path("torchvision:convnext_tiny", 0.3) == {"stochastic_depth_prob": 0.3}
    assert drop_path("wrn28_8", 0.3) == {}


@pytest.mark.parametrize(
    ("script", "words", "recipe"),
    [
        (train, "--dataset folder --method puzzlemix", "puzzle"),
        (imagenet_train, "--dataset folder --pretrained", "fine_tune"),
        (imagenet_train, "--dataset folder", "cutmix300"),
        (imagenet_train, "--pretrained", "cutmix300"),
        (imagenet_train, "--recipe small_photos", "fine_tune"),
    ],
)
def test_auto_fine_tunes_a_pretrained_network_on_own_images(script, words, recipe):
    assert resolve(words, script)["recipe"] == recipe
    assert choose_recipe({"dataset": "folder", "pretrained": True}, ["puzzlemix"], large_images=False) == "fine_tune"


def test_a_run_with_the_earlier_name_of_a_recipe_resumes_with_its_own_options():
    saved = resolve("--dataset folder --pretrained", imagenet_train) | {"recipe": "small_photos", "lr": 0.01}
    assert resolve("--epochs 40", imagenet_train, saved=saved)["lr"] == 0.01
    earlier = {key: value for key, value in saved.items() if "aug" not in key or key == "trad_augment"}
    assert resolve("", imagenet_train, saved=earlier)["auto_augment"] == "none", "it is younger than that name"


def test_a_command_with_the_values_of_openmixup_is_noted():
    words = "--method cutmix --dataset cifar100 --model resnet18 --lr 0.1 --batch_size 100 --nesterov false"
    (note,) = describe_other_recipe(resolve(words), train.build_parser().read(words.split()))
    assert "are as in --recipe openmixup, which also sets" in note and "scheduler cosine (not multistep)" in note
