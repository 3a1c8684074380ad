"""benchmarks/plans: every row of every plan names options that exist, and a mixer that can be built."""

import importlib

import pytest
from support import ROOT

import mixing
from engine.config.select import select_kwargs

PLANS = sorted((ROOT / "benchmarks" / "plans").glob("*.ini"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_row_of_a_plan_can_be_trained(path, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runs = importlib.import_module("plan").read_plan(path, tmp_path)
    rows = {planned.row.name: planned for planned in runs}
    assert all(planned.row.minutes for planned in runs) and len({planned.folder for planned in runs}) == len(runs)
    for planned in rows.values():
        options = planned.options
        own = select_kwargs(options, mixing.compose_options(options["method"]))
        mixing.compose_mixer(options["method"], mean=(0.5,) * 3, std=(0.25,) * 3, **own)
    assert f"plans/{path.name} " in path.read_text()  # the head of a plan shows how to run it


def test_the_table_of_the_cpu_has_all_methods_and_chooses_nothing_on_test_images(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / "plans" / "cpu_cifar10.ini"
    runs = importlib.import_module("plan").read_plan(path, tmp_path)
    assert {planned.options["method"][0] for planned in runs} == {*mixing.MIXERS}
    assert all(planned.options["eval_every"] == planned.options["epochs"] for planned in runs)  # once, at the end
    same = (
        "recipe",
        "model",
        "epochs",
        "batch_size",
        "max_lr",
        "weight_decay",
        "loss",
        "labels_per_class",
        "crop_padding",
    )
    assert all(len({planned.options[key] for planned in runs}) == 1 for key in same)
    assert [run.row.part for run in runs[:33]] == ["figures"] * 33
    assert [run.seed for run in runs[:33]] == [0] * 11 + [1] * 11 + [2] * 11
