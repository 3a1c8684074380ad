import json

import pytest
import torch
from support import same_state, shapes_command

import train
from engine import training
from engine.errors import UserError

pytestmark = pytest.mark.usefixtures("small_network")


def train_seeds(root, *words: str, seeds: str = "3 5", name: str = "runs") -> dict:
    return train.main([*shapes_command(root, *words, name=name, method="cutmix"), "--seeds", *seeds.split()])


def read_model(folder) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shapes" / "resnet20" / "runs"


def test_each_seed_is_the_run_that_seed_alone_would_be(tmp_path, folder, capsys):
    result = train_seeds(tmp_path)
    last_lines = capsys.readouterr().out.splitlines()[-5:]
    single = train.main(shapes_command(tmp_path, "--seed", "5", name="single", method="cutmix"))
    assert same_state(read_model(folder / "seed_5"), read_model(folder.with_name("single")))
    assert result["seeds"]["5"]["last_top1"] == single["last_top1"]
    assert json.loads((folder / "seeds.json").read_text()) == result
    assert json.loads((folder / "seed_5" / "config.json").read_text())["options"]["seed"] == 5
    a, b = (result["seeds"][seed]["last_top1"] for seed in ("3", "5"))
    mean, deviation = (a + b) / 2, abs(a - b) / 2**0.5
    assert result["summary"]["last_top1"] == pytest.approx({"mean": mean, "std": deviation, "n": 2})
    assert f"last epoch: {mean:.2f} +- {deviation:.2f} % (n = 2)" in last_lines[1]


def test_seeds_stopped_inside_the_second_are_resumed_as_a_whole(tmp_path, folder, monkeypatch, capsys):
    train_seeds(tmp_path, name="whole")
    train_one_epoch, calls = training.train_one_epoch, []

    def stop_in_the_fourth_epoch(*args, **kwargs):
        calls.append(kwargs["epoch"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **kwargs)

    monkeypatch.setattr("engine.training.train_one_epoch", stop_in_the_fourth_epoch)
    with pytest.raises(KeyboardInterrupt):
        train_seeds(tmp_path)
    assert "--checkpoint auto --name runs" in capsys.readouterr().err
    finished = (folder / "seed_3" / "last.pt").stat().st_mtime_ns
    result = train_seeds(tmp_path, "--checkpoint", "auto")
    assert calls == [0, 1, 0, 1, 1]  # seed 3 is left as it is, and seed 5 continues after its first epoch
    assert (folder / "seed_3" / "last.pt").stat().st_mtime_ns == finished
    assert same_state(read_model(folder / "seed_5"), read_model(folder.with_name("whole") / "seed_5"))
    assert result["summary"]["last_top1"]["n"] == 2


def test_seeds_do_not_replace_earlier_runs(tmp_path, folder):
    train_seeds(tmp_path, seeds="1")
    with pytest.raises(UserError, match="already holds seed_1\nresume with --checkpoint auto --name runs"):
        train_seeds(tmp_path, seeds="1 2")
    with pytest.raises(UserError, match="lr"):  # a finished run of other options is no part of these
        train_seeds(tmp_path, "--checkpoint", "auto", "--lr", "0.01", seeds="1")
    train_seeds(tmp_path, "--overwrite", seeds="1")
    train.main(shapes_command(tmp_path, name="single"))
    for words in ([], ["--overwrite"], ["--checkpoint", "auto"]):
        with pytest.raises(UserError, match="already holds a run without --seeds\nchoose another --name"):
            train_seeds(tmp_path, *words, name="single")
    for words in ([], ["--checkpoint", "auto"]):  # nor does a single run start among them
        with pytest.raises(UserError, match="already holds seed_1, runs of --seeds"):
            train.main(shapes_command(tmp_path, *words, name="runs"))


def test_a_damaged_result_is_written_again_and_other_seeds_are_named(tmp_path, folder, capsys):
    train_seeds(tmp_path, seeds="1 2")
    expected = (folder / "seed_1" / "result.json").read_text()
    for damaged in ("", "[]", "{}"):
        (folder / "seed_1" / "result.json").write_text(damaged)
        capsys.readouterr()
        train_seeds(tmp_path, "--checkpoint", "auto", seeds="1")
        assert (folder / "seed_1" / "result.json").read_text() == expected
        assert "also holds seed_2; name all seeds in --seeds to include them" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seeds", "1", "1"], "--seeds: 1 is given more than once"),
        (["--seeds", "1", "2", "--seed", "3"], "--seed and --seeds both set the seed"),
        (["--seeds", "1", "2", "--profile", "3"], "--profile times a single run"),
        (
            ["--seeds", "1", "2", "--checkpoint", "run/last.pt"],
            "--seeds resumes all of its runs with --checkpoint auto",
        ),
        (["--seeds", "x"], "expected an integer"),
    ],
)
def test_options_that_contradict_seeds(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        train.main([*shapes_command(tmp_path), *words])
    assert message in capsys.readouterr().err


def test_a_single_seed_has_no_deviation(tmp_path, capsys):
    assert train_seeds(tmp_path, seeds="1")["summary"]["last_top1"]["std"] is None
    assert "+-" not in capsys.readouterr().out


def test_auto_without_a_name_resumes_the_newest_single_run(tmp_path, capsys):
    train.main([*shapes_command(tmp_path, method="cutmix", epochs=1), "--name", "cutmix_20250101-000000"])
    train_seeds(tmp_path, name="cutmix_20250102-000000", seeds="1")
    capsys.readouterr()
    words = shapes_command(tmp_path, method="cutmix", epochs=1)
    position = words.index("--name")
    train.main([*words[:position], *words[position + 2 :], "--checkpoint", "auto"])
    assert "this run is already finished" in capsys.readouterr().out
