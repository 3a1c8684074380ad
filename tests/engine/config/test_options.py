"""Options of the scripts: parsing, help, aliases of earlier codes, recipes and checks of combinations."""

import os
import re
import subprocess
import sys

import pytest
from support import ROOT

import evaluate
import imagenet_train
import mixing
import saliency
import train
from detection.options import build_parser as build_detection_parser
from engine.config.legacy_options import (
    LEGACY_DEVICE_OPTIONS,
    LEGACY_METHOD_OPTIONS,
    LEGACY_MIXING_OPTIONS,
    LEGACY_TRACKER_OPTIONS,
    OPTION_ALIASES,
    translate_legacy,
)
from engine.config.mixing_options import OPTION_GROUPS, SIMPLE_METHODS
from engine.config.option_types import boolean, choice, int_at_least
from engine.config.parser import Parser
from engine.config.recipes import RECIPES, get_recipe_options
from engine.config.resolve import check_combinations, check_resume_options, fill_in_options
from engine.config.select import select_kwargs
from engine.config.unused_options import (
    collect_mixing_notes,
    collect_run_notes,
    describe_other_recipe,
    find_unused_options,
)
from engine.errors import UserError
from engine.launch import explain_error, run_main
from mixing import MIXERS, hyper_parameters
from saliency.casm.commands import train as casm_train
from saliency.gradient import Gradient


def resolve(*words: str, saved: dict | None = None) -> dict:
    """Return all options of train.py for a command line, where `saved` are those of a run to resume."""
    parser = train.build_parser()
    typed, _ = translate_legacy(parser.read(list(words)))
    options = fill_in_options(typed, saved or {}, parser.defaults)
    check_combinations(options, typed)
    return options


def get_usage_error(capsys, *words: str, script=train) -> str:
    with pytest.raises(SystemExit) as stop:
        script.main(list(words))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1, "a usage error has one line"
    return text


# ---- Parser ----


def test_hyphens_underscores_and_aliases_reach_the_same_option():
    for word in ("--batch_size", "--batch-size", "--cnn_batch_size", "--cnn-batch-size", "-b"):
        assert resolve(word, "7")["batch_size"] == 7
    assert resolve("--batch-size=9")["batch_size"] == 9
    assert resolve("--arch", "wideresnet")["model"] == "wrn28_10"
    assert resolve("--method", "vanilla")["method"] == ["none"]


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--log_off"], True), (["--log_off", "True"], True), (["--log_off", "no"], False), ([], False)],
)
def test_switches_take_an_optional_value(words, value):
    assert resolve(*words)["log_off"] is value


def test_abbreviations_are_refused(capsys):
    assert "--batch_size" in get_usage_error(capsys, "--batch_siz", "3")
    assert "--help" in get_usage_error(capsys, "--zzzzqqq")
    for word in ("--frobnicate", "--xyzzy"):  # no option is like it but for the hyphens
        assert "did you mean" not in get_usage_error(capsys, word, "sgd")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "resnet2O"], "did you mean resnet20?"),
        (["--method", "saliencymx"], "did you mean saliencymix?"),
        (["--dataset", "cifar"], "did you mean cifar10"),
        (["--method", "cutmix", "--saliency_probab", "0.5"], "name different methods"),
        (["--saliency_probab", "0.5", "--cutmix_probab", "0.5"], "name different methods"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "-1"], "above 0"),
        (["--lr", "fast"], "expected a number"),
        (["--mix_prob", "1.5"], "between 0 and 1"),
        (["--ngpu", "4"], "torchrun --nproc_per_node 4"),
        (["--compile", "--method", "manifold"], "leave it out"),
        (["--compile", "--graph_step"], "give one of them"),
        (["--loss", "bce", "--label_smoothing", "0.1"], "--loss ce"),
        (["--gammas", "0.1", "0.2", "--schedule", "1", "2", "3", "--scheduler", "multistep"], "2 factors for the 3"),
        (["--evaluate"], "--checkpoint"),
        (["--optimizer", "lamb"], "timm:lamb"),
        (["--min_lr", "0.2", "--lr", "0.1"], "--min_lr 0.2 is above --lr 0.1"),
        (["--warmup_lr", "0.2", "--lr", "0.1"], "--warmup_lr 0.2 is above --lr 0.1"),
        (["--clean_weight", "1", "--clean_lam", "0.5"], "--clean_weight 1: --clean_lam 0.5 sets the weight"),
        (["--clean_weight", "0", "--update_ratio", "0.7"], "--update_ratio 0.7 sets the weight"),
        (["--clean_weight", "-1"], "--clean_weight"),
        (["--mix_schedule", "delayed"], "--mix_scheduled_epoch"),
    ],
)
def test_usage_errors_have_one_line_and_exit_code_2(capsys, words, expected):
    assert expected in get_usage_error(capsys, *words)


def test_evaluate_needs_a_model_path(capsys):
    assert "--model_path" in get_usage_error(capsys, script=evaluate)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_is_fast_and_does_not_import_torch(script):
    begin = os.times()  # CPU time of child processes, which does not depend on other programs
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    end = os.times()
    assert end.children_user + end.children_system - begin.children_user - begin.children_system < 2
    assert "--model" in done.stdout and "[recipe]" in done.stdout or script == "evaluate.py"
    code = (
        f"import sys, {script[:-3]} as s; s.build_parser(); assert not {{'torch', 'cv2', 'numpy'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def get_help(capsys, *words: str, script=train) -> str:
    with pytest.raises(SystemExit) as stop:
        script.build_parser().read([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def find_options(text: str) -> list[str]:
    """Return the options that a help text explains, each by the first of its names."""
    return re.findall(r"^  (-[-\w]+)", text, re.M)


def test_help_lists_at_most_100_options(capsys):
    assert len(find_options(get_help(capsys, "--help"))) <= 100


def test_help_hides_legacy_options(capsys):
    text, parser = get_help(capsys, "--help", "all"), train.build_parser()
    hidden = {*LEGACY_MIXING_OPTIONS, *LEGACY_METHOD_OPTIONS, *LEGACY_DEVICE_OPTIONS, *LEGACY_TRACKER_OPTIONS}
    assert hidden <= parser.defaults.keys(), "legacy options must still be accepted"
    others = {alias for name, aliases in OPTION_ALIASES.items() if name in parser.defaults for alias in aliases}
    assert not (hidden | others) & {name.lstrip("-") for name in re.findall(r"--\w+", text)}
    shown = {name.lstrip("-") for name in find_options(text)} - {"h"}
    assert shown == parser.defaults.keys() - hidden - {"method_options"}


def test_help_shows_a_single_group_on_request(capsys):
    assert find_options(get_help(capsys, "--help", "sage"))[0] == "--upper_lambda"
    assert get_help(capsys, "-h", "rlmix") == get_help(capsys, "--help", "rmix")
    assert "--upper_lambda" not in get_help(capsys, "--help") and "--help GROUP" in get_help(capsys, "--help")
    for method in MIXERS:
        if method != "none":
            shown = find_options(get_help(capsys, "--help", method))
            assert ("--mixup_alpha" in shown) == (method in SIMPLE_METHODS) and len(shown) < 40
    assert "--saliency" in find_options(get_help(capsys, "--help", "saliencymix"))
    with pytest.raises(SystemExit):
        train.build_parser().read(["--help", "sgae"])
    assert "did you mean sage?" in capsys.readouterr().err


def test_errors_are_printed_without_a_traceback(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "train.py", "--dataset", "cifar10", "--data_dir", str(tmp_path), "--download", "no"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert (
        done.returncode == 1
        and done.stderr.startswith("train.py: cifar10 not found")
        and "Traceback" not in done.stderr
    )
    monkeypatch.setattr(sys, "argv", [*command[1:], "--debug"])
    with pytest.raises(SystemExit, match="1"):
        run_main(train.main)
    assert "Traceback" in capsys.readouterr().err
    assert explain_error(UserError("what\nhow")) == "what\nhow" and "--debug" in explain_error(KeyError("x"))
    for reason in ("not enough memory", "can't allocate memory"):  # depending on the version of torch
        assert "out of memory" in explain_error(RuntimeError(f"DefaultCPUAllocator: {reason}: you tried to allocate"))


def test_read_returns_only_typed_options():
    parser = Parser("test")
    parser.group("one")
    parser.option("--some_number", "-s", type=int_at_least(), default=3)
    parser.option("--flag", type=boolean, default=True)
    parser.option("--kind", type=choice(["a", "b"], {"x": "a"}))
    assert parser.read(["-s", "5", "--flag", "off", "--kind", "X"]) == {
        "some_number": 5,
        "flag": False,
        "kind": "a",
    }
    assert parser.read([]) == {} and parser.defaults == {"some_number": 3, "flag": True, "kind": None}
    assert parser.get_option_names("one") == {"some_number", "flag", "kind"}


# ---- Recipes ----


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ([], "shapes"),
        (["--dataset", "shapes", "--method", "mixup"], "shapes"),
        (["--method", "none"], "saliencymix"),
        (["--method", "cutmix"], "saliencymix"),
        (["--saliency_probab", "0.5"], "saliencymix"),
        (["--model", "resnet20"], "saliencymix"),
        (["--method", "mixup"], "puzzle"),
        (["--method", "manifold"], "puzzle"),
        (["--method", "cutmix", "--recipe", "rmix"], "rmix"),
    ],
)
def test_auto_chooses_the_recipe_by_dataset_and_method(words, recipe):
    assert resolve(*words)["recipe"] == recipe


def test_a_recipe_sets_options_that_were_not_typed():
    options = resolve("--method", "mixup", "--lr", "0.05")
    assert (options["model"], options["dataset"], options["epochs"], options["batch_size"]) == (
        "preactresnet18",
        "cifar100",
        300,
        100,
    )
    assert (options["loss"], options["lr"]) == ("softmax_bce", 0.05)
    assert (options["schedule"], options["gammas"]) == ([100, 200], [0.1])
    options = resolve("--method", "none", "--recipe", "rmix")
    assert (options["max_lr"], options["div_factor"], options["drop_last"]) == (0.29947526988779305, 100.0, True)
    assert resolve("--recipe", "rmix", "--lr", "0.1")["max_lr"] is None, "a typed lr is the peak of one-cycle"
    options = resolve("--method", "cutmix", "--model", "wrn28_10")
    assert options["dropout"] == 0.3 and options["schedule"] == [60, 120, 160] and options["trad_augment"] is False
    tiny = resolve("--method", "none", "mixup", "--dataset", "tiny-imagenet")
    assert tiny["method_options"]["mixup"] == {"mixup_alpha": 0.2} and tiny["crop_padding"] == 4
    options = resolve("--method", "cutmix", "--recipe", "puzzle")
    assert options["method_options"]["cutmix"] == {"mix_prob": 1.0, "cutmix_box": "real"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_set_only_options_that_exist(name):
    known = train.build_parser().defaults
    for dataset in (None, "tiny-imagenet"):
        options = get_recipe_options(name, dataset=dataset, model="wrn28_10")
        assert options.keys() <= known.keys()
        for method, own in options["method_options"].items():
            assert own.keys() <= hyper_parameters(method).keys()
    with pytest.raises(KeyError, match="do not exist"):
        fill_in_options({"recipe": name}, {}, {key: value for key, value in known.items() if key != "lr"})


def test_every_hyper_parameter_has_a_flag():
    known = train.build_parser().defaults
    for method in MIXERS:
        assert hyper_parameters(method).keys() - {"mean", "std"} <= known.keys(), method


def test_legacy_options_are_translated():
    assert translate_legacy({"saliency_probab": 0.5})[0] == {"method": ["saliencymix"], "mix_prob": 0.5}
    assert translate_legacy({"method": ["cutmix"], "cutmix_probab": 0.3})[0] == {"method": ["cutmix"], "mix_prob": 0.3}
    assert translate_legacy({"saliency_probab": 0.0})[0] == {}
    assert translate_legacy({"train": "mixup", "box": True}) == (
        {"method": ["cutmix"]},
        ["--train mixup --box means --method cutmix"],
    )
    assert translate_legacy({"train": "mixup_hidden"})[0] == {"method": ["manifold"]}
    assert translate_legacy({"saliency_legacy_float": True})[0] == {
        "saliency": "float_bytes",
        "saliency_scope": "batch",
    }
    assert translate_legacy({"use_fp16": True, "ngpu": 0})[0] == {"amp": "fp16", "device": "cpu"}
    one_box = translate_legacy({"method": ["saliencymix"], "per_sample": False})[0]
    assert one_box == {"method": ["saliencymix"], "saliency_scope": "batch"}


def test_unused_options_are_found():
    typed = {"mixup_alpha": 1.0, "saliency_scope": "batch", "cutout_length": 8, "epochs": 3}
    group = train.build_parser().get_option_names(*OPTION_GROUPS)
    assert find_unused_options(typed, group, set(hyper_parameters("mixup"))) == ["--cutout_length", "--saliency_scope"]
    assert find_unused_options(typed | {"cutout": True}, group, set(hyper_parameters("saliencymix"))) == []


@pytest.mark.parametrize(("clean_weight", "smoothing"), [(1.0, 0.1), (0.0, 0.1), (1.0, 0.0)])
def test_a_note_says_that_labels_of_clean_images_are_not_smoothed(clean_weight, smoothing):
    source = Gradient(None, clean_weight=clean_weight)
    options = {"method": ["comixup"], "label_smoothing": smoothing, "clean_lam": clean_weight, "graph_step": False}
    options |= {"clean_weight": None, "auto_augment": "none"}
    notes = collect_mixing_notes(options, {}, train.build_parser(), methods=mixing, saliency=saliency, sources=[source])
    assert any("stay hard" in note for note in notes) == (clean_weight > 0 and smoothing > 0)


@pytest.mark.parametrize(
    ("method", "typed", "expected"),
    [
        ("comixup", {}, ["only --saliency gradient also trains on the unmixed images"]),
        ("comixup", {"clean_weight": 1.0}, []),
        ("mixup", {"labels": "mean"}, ["no effect with --method mixup: --labels"]),
        ("cutmix", {"labels": "mean", "saliency": "uniform"}, []),
        (
            "attentivemix",
            {"top_k": 6, "mixup_alpha": 1.0, "in_batch": True},
            ["no effect with --method attentivemix: --in_batch, --mixup_alpha"],
        ),
        ("attentivemix", {"mixup_alpha": 1.0, "in_batch": True}, []),
        ("none", {"clean_weight": 1.0}, ["no effect with --method none: --clean_weight"]),
        ("sage", {"clean_weight": 1.0, "blur_sigma": 1.0}, ["no effect with --method sage: --blur_sigma"]),
        ("guidedmixup", {"clean_weight": 1.0, "blur_sigma": 1.0, "kernel_size": 3}, []),
    ],
)
def test_notes_say_what_is_trained_on(method, typed, expected):
    sources = [saliency.build_source("uniform")] if method != "none" else []
    options = {"method": [method], "label_smoothing": 0.1, "clean_lam": None, "graph_step": False}
    options |= {"clean_weight": None, "auto_augment": "none"} | typed
    arguments = {"methods": mixing, "saliency": saliency, "sources": sources}
    notes = collect_mixing_notes(options, typed, train.build_parser(), **arguments)
    assert len(notes) == len(expected) and all(map(str.startswith, notes, expected))


def test_clean_weight_replaces_what_a_recipe_or_the_resumed_run_says_of_the_unmixed_images():
    options = resolve("--method", "puzzlemix", "--dataset", "tiny-imagenet", "--clean_weight", "0.5")
    hyper_parameters = select_kwargs(options, mixing.compose_options(options["method"]))
    assert mixing.collect_hyper_parameters(["puzzlemix"], **hyper_parameters)["puzzlemix"]["clean_lam"] == 0
    saved = resolve("--method", "sage", "--update_ratio", "0.7")
    assert resolve("--clean_weight", "1", saved=saved)["update_ratio"] is None


@pytest.mark.parametrize(("method", "unused"), [("saliencymix", False), ("cutmix", True)])
def test_kernels_has_an_effect_where_something_would_be_captured(method, unused):
    sources = [saliency.build_source("fine_grained", mean=(0.5,) * 3, std=(0.5,) * 3)] if not unused else []
    options = {"method": [method], "label_smoothing": 0.0, "clean_lam": None, "clean_weight": None, "graph_step": False}
    options["auto_augment"] = "none"
    arguments = {"methods": mixing, "saliency": saliency, "sources": sources}
    notes = collect_mixing_notes(options, {"kernels": "torch"}, train.build_parser(), **arguments)
    assert any("--kernels" in note for note in notes) == unused


@pytest.mark.parametrize(
    ("words", "saved", "expected"),
    [
        ("--epochs 5 --schedule 3 --gammas 0.1 --momentum 0.8", {}, ["onecycle: --gammas, --momentum, --schedule"]),
        ("--lr 0.1 --max_lr 0.2 --momentum 0 --warmup_epochs 1", {}, ["onecycle: --lr, --warmup_epochs"]),
        ("--lr 0.1 --warmup_epochs 0", {}, []),
        ("--scheduler points --lr_points 0:1,2:0 --warmup_epochs 1 --pct_start 0.2", {}, ["--pct_start, --warmup"]),
        ("--scheduler multistep --schedule 50 --max_lr 1", {}, ["multistep: --max_lr", "never drops"]),
        ("--scheduler cosine --warmup_epochs 30", {}, ["within the warm-up, at epoch 20"]),
        ("--mix_off_epoch 20", {}, ["--mix_off_epoch 20: nothing is mixed"]),
        ("--mix_scheduled_epoch 5 --log_off --name a", {}, ["no effect in this run: --mix_scheduled_epoch, --name"]),
        ("--data_dir x --val_labels y", {}, ["no effect in this run: --data_dir, --val_labels"]),
        ("--scheduler cosine", {"epochs": 10}, ["--epochs 20 instead of 10: the cosine schedule now ends at epoch 20"]),
        ("--scheduler linear --mix_off_epoch 2", {"epochs": 10}, ["the linear", "2 now means the last of 20 epochs"]),
        ("--scheduler multistep", {"epochs": 10}, []),
        ("--betas 0.9 0.99 --eps 1e-6", {}, ["--optimizer sgd: --betas, --eps"]),
        ("--optimizer adamw --momentum 0.8 --nesterov --no_decay_bn", {}, ["adamw and --no_decay_1d: --momentum, --n"]),
        ("--optimizer adamw --betas 0.9 0.99 --min_lr 0.01", {}, ["onecycle: --min_lr", "the first of the --betas"]),
        ("--scheduler cosine --min_lr 0.01 --warmup_lr 0.01", {}, ["no effect in this run: --warmup_lr"]),
        ("--bce_target_thresh 0.2 --freeze conv1", {}, ["random weights", "in this run: --bce_target_thresh"]),
        ("--scheduler cosine_step --ema_ramp", {"epochs": 10}, ["cosine_step schedule now ends", "--ema_ramp now"]),
        ("--scheduler cosine", {"epochs": 20}, []),
        ("--rand_augment_std 1 --auto_augment trivial", {}, ["no effect in this run: --rand_augment_std"]),
        ("--auto_augment rand --rand_augment_ops 1 --interpolation bicubic --random_erasing 0.1", {}, []),
        ("--min_scale 0.5 --crop_padding 4 --interpolation bicubic", {}, ["no effect in this run: --crop_padding"]),
        ("--crop_padding 0 --crop_padding_mode reflect", {}, ["no effect in this run: --crop_padding_mode"]),
        ("--interpolation bicubic", {}, ["no effect in this run: --interpolation"]),
        ("--dataset cifar10 --image_size 64 --interpolation bicubic --recipe shapes", {}, []),
        ("--trad_augment false --min_scale 0.5 --auto_augment trivial", {}, ["no effect in this run: --min_scale"]),
    ],
)
def test_options_without_effect_and_moved_schedules_are_noted(words, saved, expected):
    parser = train.build_parser()
    typed = parser.read(["--dataset", "shapes", *words.split()])
    taken = {"betas", "eps"} if "adamw" in words else {"momentum", "nesterov"}
    notes = collect_run_notes(fill_in_options(typed, {}, parser.defaults), typed, saved, 100, taken)
    assert len(notes) == len(expected) and all(map(str.__contains__, notes, expected)), notes


@pytest.mark.parametrize(
    ("words", "steps", "expected"),
    [
        ("--dataset folder --method puzzlemix", 1, "only 1 step: recipe puzzle, with"),
        ("--dataset folder", 9, "only 9 steps: recipe saliencymix, with"),
        ("--dataset cifar10 --method rmix", 9, "take --recipe small"),
        ("--dataset folder", 10, ""),
        ("--dataset folder --recipe small", 6, ""),
        ("--dataset folder --batch_size 32 --lr 0.05", 6, ""),
        ("--dataset folder --limit 40", 1, ""),
    ],
)
def test_a_recipe_for_large_data_sets_is_noted_where_an_epoch_has_few_steps(words, steps, expected):
    parser = train.build_parser()
    typed = parser.read(words.split())
    options = fill_in_options(typed, {}, parser.defaults)
    notes = [note for note in collect_run_notes(options, typed, {}, steps) if "step" in note]
    assert (len(notes) == 1 and expected in notes[0]) if expected else not notes
    assert not [note for note in collect_run_notes(options, typed, options, steps) if "step" in note], "on a resume"


@pytest.mark.parametrize(("words", "count"), [("", 0), ("--norm own", 1), ("--norm imagenet", 0)])
def test_the_statistics_of_a_folder_are_noted_where_its_own_are_asked_for(words, count):
    parser = train.build_parser()
    typed = parser.read(["--dataset", "folder", *words.split()])
    notes = collect_run_notes(fill_in_options(typed, {}, parser.defaults), typed, {}, steps=100)
    assert len(notes) == count and all("those of ImageNet" in note for note in notes)


def test_a_command_with_the_values_of_another_recipe_is_noted():
    """The command line of SAGE's README: `auto` trains its baselines with another batch, loss and augmentation."""
    words = "--dataset cifar10 --model preactresnet18 --lr 0.2 --epochs 300 --schedule 100 200 --gammas 0.1 0.1".split()
    typed = train.build_parser().read(words)
    for method, expected in (("none", 1), ("cutmix", 1), ("sage", 0), ("puzzlemix", 0)):
        options = resolve(*words, "--method", method)
        assert len(describe_other_recipe(options, typed)) == expected, method
        assert describe_other_recipe(options, {**typed, "recipe": options["recipe"]}) == []
    assert describe_other_recipe(resolve("--method", "cutmix", "--epochs", "300"), {"epochs": 300}) == [], "one value"
    for data in (["--dataset", "cifar100"], ["--dataset", "cifar100", "--trad_augment"]):
        found = describe_other_recipe(resolve(*data, "--method", "cutmix"), train.build_parser().read(data))
        assert found == [], "the data set is no setting of a recipe"
    (note,) = describe_other_recipe(resolve(*words, "--method", "cutmix"), typed)
    assert note.startswith("--recipe auto means saliencymix for cutmix, but --model --lr --epochs --schedule --gammas")
    assert "are as in --recipe puzzle, which also sets" in note
    for difference in ("loss softmax_bce (not ce)", "batch_size 100 (not 128)", "trad_augment true (not false)"):
        assert difference in note


LEGACY_COMMANDS = [  # commands in the READMEs of earlier codes
    "--model resnet50 --dataset cifar100 --saliency_probab 0.5 --batch_size 128 --epochs 200",
    "--model wideresnet --dataset cifar10 --cutmix_probab 0.5 --cutout --cutout_length 16 --trad_augment --lr 0.1",
    "--dataset cifar10 --labels_per_class 5000 --arch preactresnet18 --learning_rate 0.2 --momentum 0.9 --decay 0.0001 "
    "--epochs 300 --schedule 100 200 --gammas 0.1 0.1 --method input --mixup_alpha 1.0 --seed 1 --log_off True",
    "--dataset cifar100 --arch resnext29_4_24 --method manifold --mixup_alpha 2.0 --workers 0 --tag x",
    "--dataset tiny-imagenet-200 --train mixup --box True --batch_size 100 --in_batch False --prob_mix 1.0",
    "--method cutmix --scheduler MultiStepLR --milestones 150 225 --lr_step_gamma 0.1 --model_name wrn16_8",
    "--method cutmix --use_wandb 1 --wandb_key K --wandb_project p --wandb_entity e --wandb_name n --wandb_offline no",
    "--method cutmix input vanilla --vis_epoch 10 --save_epoch 0 --use_fp16 False --cnn_epoch 300 --max_lr 0.3",
    "--dataset cifar100 --labels_per_class 500 --arch wrn28_10 --learning_rate 0.2 --epochs 200 --schedule 120 170 "
    "--gammas 0.1 0.1 --train mixup --mixup_alpha 1.0 --graph True --n_labels 3 --eta 0.2 --beta 1.2 --gamma 0.5 "
    "--neigh_size 4 --transport True --t_size 4 --t_eps 0.8 --adv_p 0.1 --adv_eps 10 --clean_lam 1 --mp 8",
    "--dataset tiny-imagenet-200 --method puzzle --t_size -1 --clean_lam 1",
    "--comix True --parallel True --m_part 20 --m_block_num 4 --m_beta 0.32 --m_gamma 1.0 --m_thres 0.83 --m_eta 0.05 "
    "--m_thres_type hard --m_omega 0.001 --set_resolve True --m_niter 4 --mixup_alpha 2.0 --clean_lam 1.0",
    "--dataset cifar10 --method sage --mixup_alpha 1.0 --upper_lambda 0.6 --rand_pos 0.01 --update_ratio 0.7 --seed 1 "
    "--blur_sigma 1.0 --kernel_size 5 --eval_mode False --log_off True",
    "--method comix --dataset cifar10 --arch wrn16_8",
    "--method rmix --scheduler MultiStepLR --random_patches 8 16 --use_random_patches True --num_patches 8 "
    "--num_action 10 --dirichlet_alpha 1.0",
    "--method rlmix --agent_lr 0.0003 --agent_batch_size 250 --agent_trajectory_size 1000 --agent_epochs 15 "
    "--reward_step 1 --reward_scaling 1 --grad_sim True --env VanillaMixupPatchDiscrete --shuffle_data True",
    "--dataset cifar100 --arch preactresnet18 --initial_channels 64 --dropout False --method vanilla --job_id 3",
]


@pytest.mark.parametrize("command", LEGACY_COMMANDS)
def test_training_commands_of_earlier_codes_are_accepted(command):
    assert resolve(*command.split())["model"]


def test_the_evaluation_command_of_an_earlier_code_is_accepted():
    words = (
        "--model resnet50 --dataset cifar100 --model_path f.pt --batch_size 64 --cutout --trad_augment --parallel False"
    )
    assert evaluate.build_parser().read(words.split())["model_path"] == ["f.pt"]


def test_legacy_options_of_the_gradient_methods_are_translated():
    puzzle, notes = translate_legacy({"train": "mixup", "graph": True, "mp": 8})
    assert puzzle == {"method": ["puzzlemix"]} and notes[0] == "--train mixup --graph means --method puzzlemix"
    assert notes[1] == "--mp: ignored; used by an earlier code only"
    assert translate_legacy({"comix": True})[0] == {"method": ["comixup"]}
    assert translate_legacy({"comix": False})[0] == {"method": ["none"], "recipe": "puzzle"}
    with pytest.raises(ValueError, match="different methods"):
        translate_legacy({"comix": True, "method": ["sage"]})
    parser = train.build_parser()
    assert parser.read(["--method", "rmix rlmix", "cutmix"])["method"] == ["rmix", "rlmix", "cutmix"]
    assert parser.read(["--random_patches", "8 16"]) == parser.read(["--random-patches", "8", "16"])


def test_published_settings_depend_on_method_dataset_and_network():
    def get_method_options(*words):
        return resolve(*words)["method_options"]

    assert resolve("--method", "sage")["recipe"] == "puzzle" and resolve("--method", "rlmix")["recipe"] == "rmix"
    assert get_method_options("--method", "sage", "--dataset", "cifar10")["sage"] == {
        "upper_lambda": 0.6,
        "update_ratio": 0.7,
    }
    assert get_method_options("--method", "sage")["sage"] == {"upper_lambda": 0.5, "update_ratio": 0.7}
    assert get_method_options("--method", "sage", "--model", "wrn16_8")["sage"] == {
        "upper_lambda": 0.7,
        "update_ratio": 0.5,
    }
    assert get_method_options("--method", "puzzlemix")["puzzlemix"] == {"t_size": 4}
    tiny = ("--method", "cutmix", "--dataset", "tiny-imagenet", "--recipe")
    assert "cutmix" not in get_method_options(*tiny, "saliencymix"), "alpha 1, probability 0.5 and the integer box"
    assert get_method_options(*tiny, "puzzle")["cutmix"] == {"mixup_alpha": 0.2, "mix_prob": 1.0, "cutmix_box": "real"}
    assert get_method_options("--method", "cutmix", "--recipe", "puzzle")["cutmix"]["mix_prob"] == 1.0
    for recipe in ("cutmix300", "fast100"):
        assert get_recipe_options(recipe, dataset=None, model=None)["method_options"]["mixup"] == {"mixup_alpha": 0.2}
    assert get_method_options("--method", "puzzlemix", "--dataset", "tiny-imagenet")["puzzlemix"] == {"clean_lam": 1.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method comixup --batch_size 1", "several images"),
        ("--method rlmix --mix_off_epoch 2", "use --method rmix"),
        ("--method rlmix --mix_schedule scheduled --mix_scheduled_epoch 2", "use --method rmix"),
        ("--method sage --adv_p 0.1", "only puzzlemix"),
        ("--method puzzlemix --adv_p 0.1 --saliency static", "signed pixel gradient"),
    ],
)
def test_invalid_combinations_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        train.main(words.split())
    assert message in capsys.readouterr().err


def test_method_weights_belong_to_the_methods_of_the_saved_run():
    saved = resolve("--method", "mixup", "cutmix", "--method_weights", "2", "1")
    assert (
        saved["method_weights"] == [2.0, 1.0] == resolve("--method", "mixup", "cutmix", saved=saved)["method_weights"]
    )
    assert resolve("--method", "cutmix", saved=saved)["method_weights"] is None
    earlier = {key: value for key, value in saved.items() if key != "method_weights"}
    for other in (saved, earlier):
        with pytest.raises(UserError, match=r"--method_weights  .* ->  \[1.0, 1.0\]"):
            check_resume_options({"method_weights": [1.0, 1.0]}, other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method puzzlemix --image_size 36", "36x36 pixels cannot be cut into 8x8 blocks"),
        ("--method rmix --image_size 36", "random_patches"),
        ("--method comixup --m_block_num 5", "m_block_num"),
        ("--method sage --saliency_size 16", "set clean_weight to 0"),
        ("--method sage --mix_fraction 0.5", "clean_weight 0"),
        ("--method sage --kernel_size 65", "kernel_size 65"),
        ("--method mixup cutmix --method_weights 1 2 3", "method_weights 1 2 3: there are 2 methods; give 2 weights"),
    ],
)
def test_invalid_hyper_parameters_are_usage_errors(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main([*words.split(), "--dataset", "shapes", "--limit", "40", "--root_dir", str(tmp_path)])
    assert exit_.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


BAD_NAMES = ["", " ", ".", "..", "/tmp/x", "../../x", "a/b", "a\\b", "a\nb", "a\0b", 201 * "x", 101 * "ü"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize(
    "build_parser",
    [train.build_parser, imagenet_train.build_parser, build_detection_parser, casm_train.build_parser],
    ids=["train", "imagenet_train", "detect", "casm"],
)
def test_the_name_of_a_run_never_leaves_the_folder_of_runs(build_parser, name, capsys):
    parser = build_parser()
    assert parser.read(["--name", "v1.0 ü (2)"])["name"] == "v1.0 ü (2)" and parser.read(["--name", 100 * "ü"])
    with pytest.raises(SystemExit) as exit_:
        parser.read(["--name", name])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert ("without slashes" in error) if len(name) < 50 else "at most 200 bytes" in error
