"""Checkpoint files: our own and those of other code bases, damaged ones, and atomic writing."""

import argparse
import collections
import os
import resource
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support import start_script

from engine.errors import UserError
from engine.runtime.checkpoint import find_checkpoint, read_checkpoint, read_file, save_checkpoint
from engine.runtime.files import delay_interrupt, make_side_path, write_atomic
from engine.runtime.foreign_weights import extract_weights, find_prefix, load_weights
from models import MODELS, build_model, find_matching_models, get_model_shapes


class Recorder:
    """A class of some training code whose object is pickled beside the weights."""

    def __init__(self):
        self.losses = [1.0]


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_code_ran",)


def make_weights(name="resnet20", classes=10):
    return build_model(name, classes).state_dict()


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- Files of other code bases ----


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}, "best_acc": 93.2, "epoch": 3},
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}, "arch": "x", "recorder": Recorder()},
        lambda w: {"model": w, "args": argparse.Namespace(a=1), "config": collections.defaultdict(list, {"b": [2]})},
        lambda w: {"net": {f"module._orig_mod.{k}": v for k, v in w.items()}, "acc": __import__("numpy").float64(1.0)},
        lambda w: {"state_dict_classifier": {f"model.{k}": v for k, v in w.items()}, "path": Path("x")},
        lambda w: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()},
        lambda w: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in w.items()}},
        lambda w: {"model_ema": {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in w.items()}}},
        lambda w: {**w, "total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)},
        lambda w: {"state_dict": {"criterion.weight": torch.ones(3), **{f"model.{k}": v for k, v in w.items()}}},
        lambda w: {
            "state_dict": {f"module.{name}.{k}": v for name in ("encoder_q", "encoder_k") for k, v in w.items()}
        },
        lambda w: {f"net.backbone.{k}": v for k, v in w.items()},
        lambda w: {f"network.module.encoder.{k}": v for k, v in w.items()},
        lambda w: {"teacher": {f"backbone.{k}": v for k, v in w.items()}},
        lambda w: {"params": w, "epoch": 3},
        lambda w: {"model": {"state_dict": w, "arch": "x"}},
    ],
)
def test_weights_are_found_in_every_published_layout(tmp_path, wrap, old_format):
    weights = make_weights()
    file = tmp_path / "old.pth.tar"
    torch.save(wrap(weights), file, _use_new_zipfile_serialization=not old_format)
    assert same_tensors(extract_weights(read_file(file), file), weights)


def test_the_weights_that_are_used_are_named(capsys):
    both = {"state_dict": make_weights(), "state_dict_ema": make_weights("resnet32")}
    assert same_tensors(extract_weights(both, "f"), both["state_dict"])
    assert capsys.readouterr().out == (
        "note: f: the weights under state_dict are used, not those under state_dict_ema\n"
    )
    assert same_tensors(extract_weights(both, "f", averaged=True), both["state_dict_ema"])
    extract_weights({"model.w": torch.ones(1), "loss.w": torch.ones(1)}, "f")
    assert "note: f: left out, being no part of the network: loss.w\n" in capsys.readouterr().out
    extract_weights({"format": 2, "model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}, "f")
    assert not capsys.readouterr().out


def test_no_key_of_our_networks_is_taken_for_a_wrapper():
    for name in MODELS:
        assert find_prefix(get_model_shapes(name)) is None, name


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"epoch": 3, "model": module}])
def test_a_whole_pickled_network_is_refused_with_the_call_that_saves_its_weights(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(torch.nn.Linear(2, 2)), "whole.pt")
    with pytest.raises(UserError, match="whole pickled object") as error:
        extract_weights(read_file(Path("whole.pt")), Path("whole.pt"))
    exec(str(error.value).partition("save its weights: ")[2])
    assert extract_weights(read_file(Path("weights.pt")), "weights.pt").keys() == {"weight", "bias"}


def test_tensors_that_have_no_names_are_no_weights():
    with pytest.raises(UserError, match=r"no weights found \(first keys: 0, 1\)"):
        extract_weights({0: torch.ones(2), 1: torch.ones(3)}, "f")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    weights = make_weights()
    weights["layer1.0.conv1.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"f: the weights are NaN or infinite \(layer1.0.conv1.weight\)"):
        extract_weights({"state_dict": {f"module.{key}": one for key, one in weights.items()}}, "f")
    for key in ("model", "ema"):
        torch.save({"format": 2, key: weights}, tmp_path / "last.pt")
        with pytest.raises(UserError, match="last.pt: the weights are NaN or infinite"):
            read_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("old_format", [False, True])
def test_reading_a_hostile_file_runs_no_code(tmp_path, monkeypatch, old_format):
    monkeypatch.chdir(tmp_path)
    weights = make_weights()
    torch.save({"state_dict": weights, "extra": Hostile()}, "bad.pt", _use_new_zipfile_serialization=not old_format)
    assert same_tensors(extract_weights(read_file("bad.pt"), "bad.pt"), weights)
    assert not Path("hostile_code_ran").exists()


def test_reading_a_file_imports_no_foreign_code(tmp_path, monkeypatch):
    (tmp_path / "their_code.py").write_text("class Logger:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"model": {"w": torch.ones(2)}, "log": import_module("their_code").Logger()}, tmp_path / "f.pt")
    monkeypatch.delitem(sys.modules, "their_code")
    assert "w" in read_file(tmp_path / "f.pt")["model"] and "their_code" not in sys.modules


def test_replication_keys_are_renamed_and_biases_folded():
    model = build_model("resnet50", 10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    foreign = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] in ("conv1", "bn1"):
            parts[0] = parts[0].replace("1", "0")
        elif parts[0] == "fc":
            pass
        elif parts[2] == "downsample":
            parts[2:4] = ["projection", "convP" if parts[3] == "0" else "bnP"]
        else:
            kind, number = parts[2][:-1], parts[2][-1]
            parts[2:3] = [f"convBn{number}", kind]
        foreign[".".join(parts)] = value.clone()
    for key in [k for k in foreign if k.endswith("convP.weight")]:
        bias = torch.randn(len(foreign[key]))
        foreign[key.replace("weight", "bias")] = bias
        foreign[key.replace("convP.weight", "bnP.running_mean")] += bias
    again = build_model("resnet50", 10).eval()
    given = extract_weights({"model_state_dict": foreign}, Path("x"))
    load_weights(again, given, Path("x"), num_classes=10, heads=["linear"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-4)


def test_safetensors_files_are_read_if_the_package_is_installed(tmp_path):
    file = tmp_path / "w.safetensors"
    try:
        from safetensors.torch import save_file
    except ImportError:
        file.write_bytes(b"x")
        with pytest.raises(UserError, match="pip install safetensors"):
            read_file(file)
        return
    weights = make_weights()
    save_file(weights, file)
    assert same_tensors(extract_weights(read_file(file), file), dict(weights))


# ---- Messages ----


def test_errors_name_missing_damaged_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="nowhere.pt: no such file"):
        read_file(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match=r"last.pt: no such file"):
        find_checkpoint(str(tmp_path))
    file = tmp_path / "last.pt"
    torch.save({"format": 2, "model": make_weights()}, file)
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"just text"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=rf"last.pt \({len(broken)} bytes\) is damaged"):
            read_file(file)
    (tmp_path / "previous.pt").write_bytes(whole)
    with pytest.raises(UserError, match=r"\n.*--checkpoint .*previous.pt"):
        read_file(file)
    torch.save({"some": 1, "thing": "else"}, file)
    with pytest.raises(UserError, match=r"not a checkpoint that a run can resume from \(found: some, thing\)"):
        read_checkpoint(file)
    with pytest.raises(UserError, match="no weights found.*some, thing"):
        extract_weights(read_file(file), file)


def test_one_flipped_byte_is_detected(tmp_path):
    file = tmp_path / "last.pt"
    torch.save({"format": 2, "model": {"w": torch.zeros(100_000)}}, file)
    content = bytearray(file.read_bytes())
    content[200_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        read_file(file)


def test_errors_name_weights_that_do_not_fit():
    model, shape = build_model("resnet20", 10), {"num_classes": 10, "heads": ["linear"]}
    with pytest.raises(
        UserError, match=r"has 7 classes \(linear.weight is 7 x 64\), but the data has 10\n.*--init_from f"
    ):
        load_weights(model, make_weights(classes=7), Path("f"), **shape)
    other = make_weights("resnet32")
    with pytest.raises(
        UserError, match=r"unexpected: layer1.3.conv1.weight.* more.*\nthe weights fit resnet32: use --model resnet32"
    ):
        load_weights(model, other, Path("f"), matches=find_matching_models(other), **shape)
    with pytest.raises(UserError, match=r"detect.py"):
        extract_weights(
            {"model": {"backbone.body.conv1.weight": torch.zeros(1), "rpn.head.bias": torch.zeros(1)}}, Path("f")
        )
    with pytest.raises(UserError, match="--ema"):
        extract_weights({"model": {"w": torch.zeros(1)}, "ema": None}, Path("f"), averaged=True)


def test_new_head_keeps_the_last_layer_if_the_number_of_classes_differs():
    model, given = build_model("resnet20", 10), make_weights(classes=7)
    head, shape = model.linear.weight.clone(), {"num_classes": 10, "heads": ["linear"]}
    assert load_weights(model, given, Path("f"), new_head=True, **shape) is True
    assert torch.equal(model.linear.weight, head) and torch.equal(model.conv1.weight, given["conv1.weight"])
    assert load_weights(model, make_weights(), Path("f"), new_head=True, **shape) is False


# ---- Writing ----


def test_save_checkpoint_keeps_the_previous_file(tmp_path):
    file = tmp_path / "last.pt"
    for number in range(3):
        save_checkpoint(file, {"format": 2, "number": number}, keep_previous=True)
    assert read_file(file)["number"] == 2 and read_file(tmp_path / "previous.pt")["number"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "f"
    write_atomic(file, lambda side: side.write_text("old"))

    def fail(side):
        side.write_text("half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match="No space left on device\nthe old .* intact; free disk space or write elsewhere$"
    ):
        write_atomic(file, fail)
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["f"]


def test_two_processes_can_write_one_file_at_once(tmp_path):
    """Each needs a side file of its own: one renamed that of the other, which then failed or was cut short."""
    file = tmp_path / (250 * "n")

    def write(side):
        side.write_text("first, ")
        write_atomic(file, lambda other: other.write_text("second"))
        assert file.read_text() == "second"
        with open(side, "a") as half:
            half.write("whole")

    write_atomic(file, write)
    assert file.read_text() == "first, whole" and list(tmp_path.iterdir()) == [file]
    assert f".part-{os.getpid()}-" in make_side_path(file).name and make_side_path(file) != make_side_path(file)


def test_ctrl_c_within_a_write_leaves_no_side_file(tmp_path):
    def stop(side):
        side.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "f", stop)
    assert not list(tmp_path.iterdir())


def save_on_a_full_disk(path: Path) -> None:
    save_checkpoint(path, {"format": 2, "w": torch.zeros(10)})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file may grow beyond: writing fails half-way
    save_checkpoint(path, {"format": 2, "w": torch.zeros(1_000_000)})


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    process = start_script(partial(save_on_a_full_disk, folder / "last.pt"), tmp_path / "errors")
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 1 and "Traceback" not in errors
    assert "the old file is intact; free disk space or write elsewhere, then resume the run with" in errors
    assert len(read_file(folder / "last.pt")["w"]) == 10 and [path.name for path in folder.iterdir()] == ["last.pt"]


def test_ctrl_c_is_delayed_until_a_save_is_done(tmp_path):
    with pytest.raises(KeyboardInterrupt), delay_interrupt():
        signal.raise_signal(signal.SIGINT)
        (tmp_path / "done").touch()
    assert (tmp_path / "done").exists()
