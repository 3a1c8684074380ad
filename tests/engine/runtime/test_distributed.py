"""Several processes: gradients, random numbers, evaluation, resume, and failures, with gloo on the CPU."""

import copy
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support import (
    ROOT,
    find_free_port,
    run_in_two_processes,
    same_state,
    shapes_command,
    start_script,
    train_small_network,
    write_image,
)
from torch import nn

import evaluate
import train
from engine.data.augment import Augmentation
from engine.data.folders import FileList
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader, Shard, get_process_shard
from engine.data.views import CenterCrop
from engine.errors import Terminated, UserError
from engine.inference.predict import predict
from engine.runtime import distributed
from engine.runtime.device import seed_rank_generator
from engine.runtime.distributed import all_gather_object, is_main_process, rank, world_size
from engine.runtime.failure_watch import EXIT_SECONDS, FailureWatch
from engine.runtime.preemption import PreemptionGuard
from engine.training import loop
from engine.training.loop import train_one_epoch
from engine.training.loss import LOSSES
from engine.training.monitor import EpochMonitor
from engine.training.network_step import StepConfig
from engine.training.state import TrainingState
from mixing import MIXERS, build_mixer, mixer_class
from models import build_model
from models.resnet import NarrowResNet
from saliency import build_source

CPU = torch.device("cpu")
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
SELDOM = ("cutmix", "saliencymix", "guidedmixup")  # methods that leave half of the batches unmixed
CASES = {  # name -> method, hyper-parameters, source (None: the default of the method), micro-batches
    **{name: (name, {"mix_prob": 1.0} if name in SELDOM else {}, None, 1) for name in MIXERS},
    **{name: (name, {}, "gradcam", 1) for name in MIXERS if mixer_class(name).default_source == "cam"},  # see SmallNet
    "puzzlemix with clean loss": ("puzzlemix", {"clean_lam": 1.0}, None, 1),
    "rmix with clean loss": ("rmix", {"clean_lam": 1.0}, None, 1),
    "puzzlemix with bank": ("puzzlemix", {}, "bank", 1),
    "sage in two micro-batches": ("sage", {}, None, 2),
    "mixup and the unmixed batch": ("mixup", {"clean_weight": 0.5}, None, 2),
}
ADAMW = "--optimizer adamw --lr 0.001 --min_lr 1e-4 --freeze conv1 bn1 --loss sigmoid_bce".split()
DROP_PATH = "--model timm:vit_tiny_patch16_224 --model_args img_size=16 patch_size=4 depth=2 embed_dim=24 num_heads=3"
DROP_PATH = f"{DROP_PATH} drop_path_rate=0.2".split() if find_spec("timm") else []  # it draws random numbers
REFUSED = {  # options -> message
    ("--batch_size", "7"): r"--batch_size 7: the total .* divisible by 2 processes = 2\nuse 6 or 8",
    ("--batch_size", "6", "--accumulate", "2"): r"divisible by 2 processes x --accumulate 2 = 4\nuse 4 or 8",
    ("--sync_bn",): "synchronised batch norm on GPUs only; on a CPU, leave out --sync_bn",
    ("--device", "mps"): "with several processes, use --device auto, cuda or cpu",
}


class SmallNet(nn.Module):
    """A network without batch norm: the logits of an image do not depend on the rest of its batch."""

    stages = ("body", "head")

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, num_classes))

    def forward(self, images):
        return self.head(self.body(images))


def make_noise(count: int = 48, size: int = 32, num_classes: int = 4) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % num_classes, list("abcdefgh")[:num_classes], "noise")


def build_method(case: str, model: nn.Module, images: int) -> tuple:
    """Return the mixer and the saliency source of a case, for `model`."""
    method, options, name, _ = CASES[case]
    mixer = build_mixer(method, **options, **HALF)
    share = {"model": model, "num_images": images, **HALF, "training_loss": LOSSES["ce"], "device": device()}

    def make(one):
        return build_source(name or one.default_source, **{**share, **one.gradient_options})

    return mixer, mixer.build_source(make)


def make_config(case: str) -> StepConfig:
    return StepConfig(LOSSES["ce"], num_classes=4, clean_weight=CASES[case][1].get("clean_weight"))


def run_steps(case: str, model, batches, network=None, steps: int = 1, lr: float = 0.0):
    """Run some steps of a case, and return the gradients that are left in .grad."""
    mixer, source = build_method(case, model, len(batches.image_set))
    mixer.start_epoch(0, 1, len(batches))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    state = TrainingState(model, optimizer, mixer=mixer, source=source, network=network)
    monitor = EpochMonitor(device(), log_every=1)
    train_one_epoch(state, batches, make_config(case), epoch=0, monitor=monitor, max_steps=steps)
    return [parameter.grad.clone() for parameter in model.parameters()]


def make_loader(case: str, process: int, count: int) -> DeviceLoader:
    shard = Shard(process, count, CASES[case][3])
    return DeviceLoader(
        make_noise(), 16, device=device(), shuffle=True, augmentation=Augmentation(2), shard=shard, **HALF
    )


# ---- Run in the two processes of a test ----


def device() -> torch.device:
    return torch.device("cuda", rank()) if os.environ.get("TEST_ON") == "cuda" else CPU


def compare_gradients(ports) -> dict:
    """Return for every case the distance of DDP's gradients from the mean of the local ones, and what was drawn."""
    distributed.init_processes(device(), 60)
    found = {}
    for case in CASES:
        torch.manual_seed(0)
        model = NarrowResNet(8, 4).to(device())
        network, batches = distributed.wrap_ddp(model), make_loader(case, rank(), world_size())
        before = copy.deepcopy(model.state_dict())
        seed_rank_generator(3, include_main=True)
        local = [gradient.cpu() for gradient in run_steps(case, model, batches)]
        mean = [sum(values) / world_size() for values in zip(*all_gather_object(local), strict=True)]
        model.load_state_dict(before)
        seed_rank_generator(3, include_main=True)
        reduced = [gradient.cpu() for gradient in run_steps(case, model, batches, network=network)]
        gaps = [float((a - b).abs().max()) for a, b in zip(reduced, mean, strict=True)]
        spread = [float((a - b).abs().max()) for a, b in zip(local, mean, strict=True)]
        found[case] = {"gap": max(gaps), "spread": max(spread), "size": max(float(one.abs().max()) for one in mean)}
    found["draws"] = all_gather_object(float(torch.rand(())))
    found["labels"] = all_gather_object(next(make_loader("none", rank(), world_size()).epoch(0)).index.tolist())
    distributed.shut_down_processes()
    return found


def train_weights(ports) -> dict:
    """Return for every case the weights of a network without batch norm after three steps."""
    distributed.init_processes(CPU, 60)
    found = {}
    for case in CASES:
        torch.manual_seed(0)
        model = SmallNet()
        network = distributed.wrap_ddp(model)
        seed_rank_generator(3)
        run_steps(case, model, make_loader(case, rank(), world_size()), network=network, steps=3, lr=0.1)
        found[case] = model.state_dict()
    image_set = make_noise(37)
    logits, labels = predict(model, DeviceLoader(image_set, 8, device=CPU, shard=get_process_shard(), **HALF))
    found["validation"] = logits, labels, float(distributed.all_reduce_sum(torch.tensor(float(len(labels)))))
    found["unreadable"] = evaluate_with_unreadable_files()
    one = torch.ones(())
    found["sum"] = float(distributed.all_reduce_sum(one)), float(one)
    found["pictures"] = evaluate.main([*predict_command(), "--output", f"{os.environ['PICTURES']}/{rank()}.json"])
    return found


def predict_command() -> list[str]:
    folder = os.environ["PICTURES"]
    words = ["--model_path", f"{folder}/bare.pt", "--predict", folder, "--norm", "half", "--on_bad_image", "skip"]
    return [*words, "--device", "cpu", "--workers", "0", "--batch_size", "4"]


def evaluate_with_unreadable_files() -> tuple[list[int], list[int]]:
    """Return the labels of the images that were evaluated, and what each process counts as unreadable."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(5):
            write_image(Path(folder, f"{number}.png"), 50 * number, size=(8, 8))
        for number in (0, 1, 4):  # all that the main process reads in the first batch, and the last batch
            Path(folder, f"{number}.png").write_bytes(b"no picture")
        files = ImageFiles(FileList(folder, [f"{number}.png" for number in range(5)]), CenterCrop(8, 8), "skip")
        image_set = ImageSet(files, torch.arange(5), list("abcde"), "there")
        loader = DeviceLoader(image_set, 4, device=CPU, shard=get_process_shard(), **HALF)
        _, labels = predict(torch.nn.Flatten(), loader)
        return labels.tolist(), all_gather_object(loader.count_unreadable())


def run_all(ports) -> dict:
    """Run train.py uninterrupted, in two parts, and stopped within an epoch by SIGTERM to one process."""
    folder = Path(os.environ["RUNS_OF_THIS_TEST"])
    ports, found = iter(ports), {}

    def run_train(name: str, method: str, *words: str, epochs: int = 3):
        os.environ["MASTER_PORT"] = str(next(ports))
        if distributed._groups:  # left open by SIGTERM, which would end a real program
            distributed.shut_down_processes()
        train_small_network(shapes_command(folder, *words, name=name, method=method, epochs=epochs))
        if not is_main_process():
            return {}
        (run,) = (folder / "shapes").glob(f"*/{name}")  # below the name of the network
        return torch.load(run / "last.pt", weights_only=True)

    def send_sigterm_after(steps: int):
        """Send SIGTERM to the second process during this optimizer step."""
        update, done = loop.optimizer_step, []

        def update_and_signal(*args, **kwargs):
            update(*args, **kwargs)
            done.append(1)
            if len(done) == steps and rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        loop.optimizer_step = update_and_signal
        return update

    ramp = ["--mix_schedule", "scheduled", "--mix_scheduled_epoch", "2"]  # a schedule whose state is not saved
    for method, *words in (
        ("puzzlemix", *ramp, *DROP_PATH),
        ("rlmix", "--agent_trajectory_size", "3"),
        ("none", *ADAMW),
    ):
        words = [*words, "--ema", "0.9", "--scheduler", "multistep", "--schedule", "2"]
        found[method] = {"whole": run_train("whole" + method, method, *words)}
        run_train("parts" + method, method, *words, epochs=1)
        found[method]["parts"] = run_train("parts" + method, method, *words, "--checkpoint", "auto")
        original = send_sigterm_after(4)
        try:
            run_train("stopped" + method, method, *words)
            found[method]["message"] = "never stopped"
        except Terminated as stopped:
            found[method]["message"] = str(stopped)
        loop.optimizer_step = original
        found[method]["stopped"] = run_train("stopped" + method, method, *words, "--checkpoint", "auto")
    found["refused"] = {}
    for words in REFUSED:
        try:
            run_train("refused", "none", *words)
        except UserError as error:
            found["refused"][words] = str(error)
    return found


@pytest.fixture(scope="module")
def gradient_results(tmp_path_factory):
    return run_in_two_processes(compare_gradients, tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def weight_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    os.environ["PICTURES"] = str(folder)
    torch.save(build_model("resnet20", 3).state_dict(), folder / "bare.pt")
    for number in range(7):
        write_image(folder / f"{number}.png", 40 * number)
    (folder / "5.png").write_bytes(b"no picture")
    return run_in_two_processes(train_weights, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def run_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    os.environ["RUNS_OF_THIS_TEST"] = str(folder)
    return run_in_two_processes(run_all, folder, num_ports=15 + len(REFUSED))


# ---- Tests ----


@pytest.mark.parametrize("case", CASES)
def test_ddp_gradients_are_the_mean_of_the_local_gradients(gradient_results, case):
    found = gradient_results[case]
    assert found["gap"] <= 1e-6 * max(1, found["size"]) and found["size"] > 1e-3
    assert found["spread"] > 100 * found["gap"], (
        "the processes computed the same gradients, so the test cannot see the averaging"
    )


@pytest.mark.gpu
def test_ddp_gradients_are_the_mean_of_the_local_gradients_on_two_gpus(tmp_path, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    monkeypatch.setenv("TEST_ON", "cuda")
    found = run_in_two_processes(compare_gradients, tmp_path)
    for case in CASES:
        assert found[case]["gap"] <= 1e-5 * max(1, found[case]["size"]) and found[case]["size"] > 1e-3, case


def test_gradient_accumulation_equals_the_gradient_of_the_whole_batch():
    """Without batch norm and with micro-batches of equal size, --accumulate changes memory use only."""
    gradients = []
    for count in (1, 2, 4):
        torch.manual_seed(0)
        batches = DeviceLoader(make_noise(), 16, device=CPU, shuffle=True, shard=Shard(micro_batches=count), **HALF)
        gradients.append(run_steps("none", SmallNet(), batches))
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_processes_draw_different_numbers_and_read_different_images(gradient_results):
    assert len(set(gradient_results["draws"])) == 2
    first, second = gradient_results["labels"]
    assert len(first) == len(second) == 8 and not set(first) & set(second)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one_that_mixes_the_same_shards(weight_results, case):
    """Without batch norm, only the mixing makes images of a batch depend on each other."""
    torch.manual_seed(0)
    model = SmallNet()
    if CASES[case][2] == "bank":
        pytest.skip("processes share their maps only at the end of an epoch; the gradient test covers the bank")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    copies, settings, states, streams = [], [], [], []
    for process in range(2):
        copies.append(copy.deepcopy(model))
        settings.append(build_method(case, copies[process], 48))
        settings[process][0].start_epoch(0, 1, 3)
        states.append(get_rank_rng(process))
        streams.append(make_loader(case, process, 2))
    for step in range(3):
        optimizer.zero_grad()
        for process in range(2):
            copies[process].load_state_dict(model.state_dict())
            torch.set_rng_state(states[process])
            run_one_step(copies[process], *settings[process], streams[process], step, make_config(case))
            states[process] = torch.get_rng_state()
        for own, first, second in zip(model.parameters(), *(one.parameters() for one in copies), strict=True):
            own.grad = (first.grad + second.grad) / 2
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weight_results[case][key], value, rtol=1e-5, atol=1e-6)


def test_two_processes_share_the_pictures_and_one_writes_the_predictions(weight_results):
    [found], [expected] = weight_results["pictures"], evaluate.main(predict_command())
    assert [one["file"] for one in found["predictions"]] == [one["file"] for one in expected["predictions"]]
    assert len(found["predictions"]) == 6 and found["unreadable"] == expected["unreadable"]
    for one, other in zip(found["predictions"], expected["predictions"], strict=True):
        chances = [[cls["probability"] for cls in picture["top"]] for picture in (one, other)]
        assert chances[0] == pytest.approx(chances[1], rel=1e-4)
    assert [path.name for path in sorted(Path(os.environ["PICTURES"]).glob("*.[jc]*"))] == ["0.csv", "0.json"]


def get_rank_rng(process: int) -> torch.Tensor:
    """Return the generator state of a process that has initialised its network and called seed_rank_generator()."""
    torch.manual_seed(0)
    SmallNet()
    environment = dict(os.environ)
    os.environ |= {"RANK": str(process), "WORLD_SIZE": "2"}
    seed_rank_generator(3)
    os.environ.clear()
    os.environ |= environment
    return torch.get_rng_state()


def run_one_step(model, mixer, source, batches: DeviceLoader, step: int, config: StepConfig) -> None:
    """Run this step of the epoch with a learning rate of 0, so that only .grad changes."""

    class OneStepLoader:
        image_set, micro_batches, device = batches.image_set, batches.micro_batches, batches.device

        def __len__(self):
            return 1

        def epoch(self, epoch, start=0):
            return batches.epoch(epoch, start=step)

    state = TrainingState(model, torch.optim.SGD(model.parameters(), 0.0), mixer=mixer, source=source)
    train_one_epoch(state, OneStepLoader(), config, epoch=0)


def test_evaluation_counts_every_image_once(weight_results):
    logits, labels, count = weight_results["validation"]
    image_set, model = make_noise(37), SmallNet()
    model.load_state_dict(weight_results[list(CASES)[-1]])  # the last network that was trained
    alone, expected = predict(model, DeviceLoader(image_set, 8, device=CPU, **HALF))
    assert count == len(image_set) and torch.equal(labels, expected)
    assert weight_results["sum"] == (2, 1), "all_reduce_sum must not change its argument"
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-6)


def test_processes_count_their_unreadable_files_together(weight_results):
    assert weight_results["unreadable"] == ([2, 3], [3, 3])


METHODS = ["puzzlemix", "rlmix", "none"]


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact_in_two_processes(run_results, method):
    one, other = run_results[method]["whole"], run_results[method]["parts"]
    for key in ("model", "optimizer", "ema", "method", "rng", "step"):
        assert same_state(one[key], other[key]), key
    assert len(one["rng"]) == 2 and not same_state(one["rng"][0], one["rng"][1])


@pytest.mark.parametrize("method", METHODS)
def test_sigterm_to_one_process_stops_both_within_an_epoch_and_resume_is_exact(run_results, method):
    assert "2 steps into the epoch" in run_results[method]["message"]
    one, other = run_results[method]["whole"], run_results[method]["stopped"]
    for key in ("model", "optimizer", "ema", "method", "rng", "step", "scheduler"):
        assert same_state(one[key], other[key]), key
    numbers = ("epoch", "lr", "train_loss", "train_acc", "test_top1")
    rows = [[{key: row[key] for key in numbers} for row in run["history"]] for run in (one, other)]
    assert rows[0] == rows[1]


def test_a_single_process_saves_at_sigterm_and_resumes_within_the_epoch(shapes_run, tmp_path, monkeypatch, capsys):
    """The run resumes within the epoch. With another number of processes, a note says that it is not exact."""
    whole = torch.load(shapes_run(name="whole", method="sage") / "last.pt", weights_only=True)
    update, done = loop.optimizer_step, []

    def update_and_signal(*args, **kwargs):
        update(*args, **kwargs)
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "optimizer_step", update_and_signal)
    with pytest.raises(Terminated, match="1 step into the epoch; resume with --checkpoint"):
        shapes_run(name="stopped", method="sage")
    monkeypatch.undo()
    run = tmp_path / "shapes" / "resnet20" / "stopped"
    saved = torch.load(run / "last.pt", weights_only=True)
    assert saved["epoch"] == 1 and saved["step"] == 4
    two_process_copy = torch.load(run / "last.pt", weights_only=True)
    shapes_run("--checkpoint", "auto", name="stopped", method="sage")
    again = torch.load(run / "last.pt", weights_only=True)
    assert same_state(whole["model"], again["model"]) and same_state(whole["rng"], again["rng"])
    assert "resumes after 1 of its 3 steps" in capsys.readouterr().out

    for key in ("rng", "method", "inside"):  # as if two processes had saved it
        two_process_copy[key] = two_process_copy[key] * 2
    torch.save(two_process_copy, run / "last.pt")
    shapes_run("--checkpoint", "auto", name="stopped", method="sage")
    assert "saved by 2 processes, resumed by 1" in capsys.readouterr().out


def train_as_rank(rank: int, port: int, command: list[str]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in environment.items()}
    train_small_network(command)


def test_a_nan_loss_in_all_processes_is_reported_once_and_saved(tmp_path):
    """All processes raise the error. The main process writes the evidence, and the others wait for it."""
    words = ["--scheduler", "multistep", "--schedule", "1", "--gammas", "1e30"]
    command, port = shapes_command(tmp_path, *words, epochs=3), find_free_port()
    files = [tmp_path / f"errors{rank}" for rank in range(2)]
    jobs = [partial(train_as_rank, rank, port, command) for rank in range(2)]
    processes = list(map(start_script, jobs, files))
    for process in processes:
        process.join(60)
    errors, other_errors = (file.read_text() for file in files)
    run = tmp_path / "shapes" / "resnet20" / "run"
    assert errors.count("the loss became NaN or infinite at step") == 1 and "(process 1 of 2)" not in errors
    assert f"resume with --checkpoint {run / 'last.pt'}" in errors and other_errors == ""
    assert [process.exitcode for process in processes] == [1, 1]
    evidence = torch.load(run / "nonfinite.pt", weights_only=True)
    assert len(evidence["index"]) in (8, 20), "the images of both processes"


def test_the_main_process_waits_until_the_others_know_that_the_error_is_printed(capsys):
    """Otherwise the store could end with the main process, and the others would print the error once more."""
    store = torch.distributed.HashStore()
    main, other = (FailureWatch(store, store, rank=rank, world_size=2) for rank in range(2))
    printing = threading.Thread(target=main.report, args=["the disk is full"])
    printing.start()
    printing.join(0.3)
    assert printing.is_alive()
    other.report("the disk is full")
    printing.join(EXIT_SECONDS / 2)
    assert not printing.is_alive() and capsys.readouterr().err == "the disk is full\n"


def run_torchrun(driver: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a script in two processes, which torchrun starts again once if one of them fails."""
    flags = ["--nproc_per_node", "2", f"--master_port={find_free_port()}", "--max_restarts", "1"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags, str(driver), *words],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


DRIVER = """
import os, signal
from engine.training import loop
from engine.errors import UserError
from engine.launch import run_main
import train

update, step = loop.optimizer_step, 0

def update_and_fail(*args, **kwargs):
    global step
    update(*args, **kwargs)
    step += 1
    if step == 4 and os.environ["RANK"] == "1":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError("the second process is out of sorts")

loop.optimizer_step = update_and_fail
if __name__ == "__main__":
    run_main(train.main)
"""


def train_whole(ports) -> None:
    """Run train.py without an interruption."""
    train.main(shapes_command(Path(os.environ["RUNS_OF_THIS_TEST"]), "--save_every", "1", name="whole", epochs=3))


@pytest.fixture(scope="module")
def torchrun_results(tmp_path_factory):
    """Return the folder of the runs, and the output of a run whose second process fails in its fourth step: first it is
    killed, and after the restart, which resumes after the first epoch, it raises an error.
    """
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "driver.py").write_text(DRIVER)
    words = shapes_command(folder, epochs=3)
    words = words[: words.index("--name")]  # the run must be found again even without a name
    return folder, run_torchrun(folder / "driver.py", *words)


def test_a_failing_process_ends_all_with_one_error_line(torchrun_results):
    """Without an end, the first process would wait for the second one."""
    _, done = torchrun_results
    lines = [line for line in done.stderr.splitlines() if "out of sorts" in line]
    assert done.returncode != 0 and len(lines) == 1 and lines[0].startswith("driver.py: ")
    assert "(process 1 of 2)" in done.stderr and done.stderr.count("Traceback") == 1, "only torchrun's own"


def test_torchrun_restarts_a_killed_process_and_the_run_resumes_exactly(torchrun_results, tmp_path, monkeypatch):
    folder, done = torchrun_results
    assert "resuming after epoch 1" in done.stdout, done.stderr
    once = [line for line in done.stdout.splitlines() if line.startswith("epoch 2/3  ")]
    assert len(once) == 1, "only the main process prints"
    monkeypatch.setenv("RUNS_OF_THIS_TEST", str(tmp_path))
    run_in_two_processes(train_whole, tmp_path)
    (lost,) = (folder / "shapes" / "resnet20").glob("none_*/last.pt")
    whole = tmp_path / "shapes" / "resnet20" / "whole" / "epoch_002.pt"
    lost, whole = (torch.load(file, weights_only=True) for file in (lost, whole))
    assert lost["epoch"] == 2 and same_state(lost["model"], whole["model"]) and same_state(lost["rng"], whole["rng"])


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_options_of_several_processes_are_refused(run_results, words):
    assert re.search(REFUSED[words], run_results["refused"][words])


def test_errors_name_processes_that_do_not_connect(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Exception, match="MASTER_ADDR and MASTER_PORT and RANK not set.*\nstart them with torchrun"):
        distributed.init_processes(CPU, 1)
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(find_free_port()))):
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with pytest.raises(
        Exception, match=r"process 1 of 2 could not connect to the others at 127\.0\.0\.1:\d+ within 1 s"
    ):
        distributed.init_processes(CPU, 1)
    assert time.monotonic() - begin < 30 and distributed._groups is None
    monkeypatch.setattr(distributed, "_alone", False)


def test_errors_name_data_that_differs_between_processes():
    one, other = {"training images": "10", "classes": "a, b"}, {"training images": "9", "classes": "a, b"}
    with pytest.raises(UserError, match="data of processes 0 and 1 differ: training images is 10 and 9\nmend"):
        distributed.check_equal("data", [one, other], "mend it")
    distributed.check_equal("data", [one, dict(one)], "mend it")


def test_preemption_guard_of_a_single_process_reports_the_request():
    sign = PreemptionGuard()
    assert not sign.requested()
    sign.request(signal.SIGTERM, None)
    assert sign.requested()


def test_only_the_first_process_prints_a_usage_error(monkeypatch, capsys):
    for local_rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as ended:
            train.main(["--epochs", "none"])
        assert ended.value.code == 2
    assert len(re.findall("expected an integer", capsys.readouterr().err)) == 1
