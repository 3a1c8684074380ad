"""Several processes: gradients, streams, validation, resume and ends, with gloo on the CPU."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, find_free_port, run_in_two_processes, same_state, shapes_command
from torch import nn

import models
import train
from engine.data.augment import Augmentation
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader, Shard, get_process_shard
from engine.errors import Terminated, UserError
from engine.inference.predict import predict
from engine.runtime import distributed
from engine.runtime.device import seed_rank_generator
from engine.runtime.distributed import all_gather_object, is_main_process, rank, world_size
from engine.runtime.preemption import PreemptionGuard
from engine.training import loop
from engine.training.loop import StepConfig, train_one_epoch
from engine.training.loss import LOSSES
from engine.training.monitor import EpochMonitor
from engine.training.state import TrainingState
from mixing import MIXERS, build_mixer
from models import build_model
from saliency import build_source

CPU = torch.device("cpu")
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
CASES = {  # name -> method, its hyper-parameters, the source where it is not the method's own, pieces of a batch
    **{name: (name, {"mix_prob": 1.0} if name in ("cutmix", "saliencymix") else {}, None, 1) for name in MIXERS},
    "puzzlemix, clean images too": ("puzzlemix", {"clean_lam": 1.0}, None, 1),
    "rmix, clean images too": ("rmix", {"clean_lam": 1.0}, None, 1),
    "puzzlemix by the bank": ("puzzlemix", {}, "bank", 1),
    "sage in two pieces": ("sage", {}, None, 2),
}
REFUSED = {  # options -> message
    ("--batch_size", "7"): r"--batch_size 7: the total .* divisible by 2 processes = 2\nuse 6 or 8",
    ("--batch_size", "6", "--accumulate", "2"): r"divisible by 2 processes x --accumulate 2 = 4\nuse 4 or 8",
    ("--sync_bn",): "batch norm over all processes: torch has it for GPUs alone; on a CPU leave --sync_bn out",
    ("--device", "mps"): "several processes take --device auto, cuda or cpu",
}


class Plain(nn.Module):
    """A network without batch norm: what an image gives does not depend on the others of its batch."""

    stages = ("body", "head")

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, num_classes))

    def forward(self, images):
        return self.head(self.body(images))


def plain(num_classes: int, stride: int = 1) -> Plain:
    return Plain(num_classes)


def noise(count: int = 48, size: int = 32, num_classes: int = 4) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(count) % num_classes, list("abcdefgh")[:num_classes], "noise")


def setting(case: str, model: nn.Module, images: int) -> tuple:
    """The mixer and the source of a case, for `model`."""
    method, options, name, _ = CASES[case]
    mixer = build_mixer(method, **options, **HALF)
    share = {"model": model, "images_count": images, **HALF, "training_loss": LOSSES["ce"], "device": device()}

    def make(one):
        return build_source(name or one.default_source, **{**share, **one.gradient_options})

    return mixer, mixer.build_source(make)


def step_of(case: str, model, batches, network=None, steps: int = 1, lr: float = 0.0):
    """Some steps of a case; what is left in .grad, and the weights."""
    mixer, source = setting(case, model, len(batches.image_set))
    mixer.start_epoch(0, 1, len(batches))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    state = TrainingState(model, optimizer, mixer=mixer, source=source, network=network)
    config, monitor = StepConfig(LOSSES["ce"], len(batches.image_set.classes)), EpochMonitor(device(), log_every=1)
    train_one_epoch(state, batches, config, epoch=0, monitor=monitor, max_steps=steps)
    return [parameter.grad.clone() for parameter in model.parameters()]


def batches_for(case: str, of: int, count: int) -> DeviceLoader:
    shard = Shard(of, count, CASES[case][3])
    return DeviceLoader(noise(), 16, device=device(), shuffle=True, augmentation=Augmentation(2), shard=shard, **HALF)


# --- what the two processes of a test do ------------------------------------------------------------------------------


def device() -> torch.device:
    return torch.device("cuda", rank()) if os.environ.get("TEST_ON") == "cuda" else CPU


def gradients(ports) -> dict:
    """Of every case: how far DDP's gradients are from the mean of the local ones; and what the processes drew."""
    distributed.init_processes(device(), 60)
    found = {}
    for case in CASES:
        torch.manual_seed(0)
        model = build_model("resnet20", 4).to(device())
        network, batches = distributed.wrap_ddp(model), batches_for(case, rank(), world_size())
        before = copy.deepcopy(model.state_dict())
        seed_rank_generator(3, anew=True)
        local = [gradient.cpu() for gradient in step_of(case, model, batches)]
        mean = [sum(values) / world_size() for values in zip(*all_gather_object(local), strict=True)]
        model.load_state_dict(before)
        seed_rank_generator(3, anew=True)
        reduced = [gradient.cpu() for gradient in step_of(case, model, batches, network=network)]
        gaps = [float((a - b).abs().max()) for a, b in zip(reduced, mean, strict=True)]
        spread = [float((a - b).abs().max()) for a, b in zip(local, mean, strict=True)]
        found[case] = {"gap": max(gaps), "spread": max(spread), "size": max(float(one.abs().max()) for one in mean)}
    found["draws"] = all_gather_object(float(torch.rand(())))
    found["labels"] = all_gather_object(next(batches_for("none", rank(), world_size()).epoch(0)).index.tolist())
    distributed.shut_down_processes()
    return found


def weights(ports) -> dict:
    """Of every case: the weights of a network without batch norm after three steps."""
    distributed.init_processes(CPU, 60)
    found = {}
    for case in CASES:
        torch.manual_seed(0)
        model = Plain()
        network = distributed.wrap_ddp(model)
        seed_rank_generator(3)
        step_of(case, model, batches_for(case, rank(), world_size()), network=network, steps=3, lr=0.1)
        found[case] = model.state_dict()
    part = noise(37)
    logits, labels = predict(model, DeviceLoader(part, 8, device=CPU, shard=get_process_shard(), **HALF))
    found["validation"] = logits, labels, float(distributed.all_reduce_sum(torch.tensor(float(len(labels)))))
    one = torch.ones(())
    found["sum"] = float(distributed.all_reduce_sum(one)), float(one)
    distributed.shut_down_processes()
    return found


def runs(ports) -> dict:
    """train.py whole, in pieces, and stopped in the middle of an epoch by SIGTERM to one of the two."""
    folder = Path(os.environ["RUNS_OF_THIS_TEST"])
    models.MODELS["plain"] = ("test_distributed", "plain")
    ports, found = iter(ports), {}

    def go(name: str, method: str, *words: str, epochs: int = 3):
        os.environ["MASTER_PORT"] = str(next(ports))
        if distributed._group:  # after SIGTERM, where the program would have ended
            distributed.shut_down_processes()
        train.main(shapes_command(folder, *words, name=name, method=method, epochs=epochs))
        return (
            torch.load(folder / "shapes" / "resnet20" / name / "last.pt", weights_only=True)
            if is_main_process()
            else {}
        )

    def stop_after(steps: int):
        """SIGTERM to the second process within the update of this step."""
        update, done = loop.optimizer_step, []

        def counted(*args, **kwargs):
            update(*args, **kwargs)
            done.append(1)
            if len(done) == steps and rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        loop.optimizer_step = counted
        return update

    ramp = ["--mix_schedule", "scheduled", "--mix_scheduled_epoch", "2"]  # of which no state is saved
    for method, *words in (("puzzlemix", *ramp), ("rlmix", "--agent_trajectory_size", "3"), ("none",)):
        words = [*words, "--ema", "0.9", "--scheduler", "multistep", "--schedule", "2"]
        found[method] = {"whole": go("whole" + method, method, *words)}
        go("parts" + method, method, *words, epochs=1)
        found[method]["parts"] = go("parts" + method, method, *words, "--checkpoint", "auto")
        kept = stop_after(4)
        try:
            go("stopped" + method, method, *words)
            found[method]["message"] = "never stopped"
        except Terminated as stopped:
            found[method]["message"] = str(stopped)
        loop.optimizer_step = kept
        found[method]["stopped"] = go("stopped" + method, method, *words, "--checkpoint", "auto")
    found["refused"] = {}
    for words in REFUSED:
        try:
            go("refused", "none", *words)
        except UserError as error:
            found["refused"][words] = str(error)
    return found


@pytest.fixture(scope="module")
def of_gradients(tmp_path_factory):
    return run_in_two_processes(gradients, tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def of_weights(tmp_path_factory):
    return run_in_two_processes(weights, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def of_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    os.environ["RUNS_OF_THIS_TEST"] = str(folder)
    return run_in_two_processes(runs, folder, num_ports=15 + len(REFUSED))


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_mean_of_the_local_ones(of_gradients, case):
    found = of_gradients[case]
    assert found["gap"] <= 1e-6 * max(1, found["size"]) and found["size"] > 1e-3
    assert found["spread"] > 100 * found["gap"], "the processes did the same, so that nothing was averaged"


@pytest.mark.gpu
def test_gradients_are_the_mean_of_the_local_ones_on_two_gpus(tmp_path, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    monkeypatch.setenv("TEST_ON", "cuda")
    found = run_in_two_processes(gradients, tmp_path)
    for case in CASES:
        assert found[case]["gap"] <= 1e-5 * max(1, found[case]["size"]) and found[case]["size"] > 1e-3, case


def test_a_batch_in_pieces_has_the_gradient_of_the_whole():
    """Without batch norm, and of equal pieces: --accumulate changes nothing but the memory."""
    gradients = []
    for count in (1, 2, 4):
        torch.manual_seed(0)
        batches = DeviceLoader(noise(), 16, device=CPU, shuffle=True, shard=Shard(micro_batches=count), **HALF)
        gradients.append(step_of("none", Plain(), batches))
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_processes_draw_different_numbers_and_see_different_images(of_gradients):
    assert len(set(of_gradients["draws"])) == 2
    first, second = of_gradients["labels"]
    assert len(first) == len(second) == 8 and not set(first) & set(second)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does_that_mixes_the_same_parts(of_weights, case):
    """Without batch norm nothing but the mixing joins the images of a batch."""
    torch.manual_seed(0)
    model = Plain()
    if CASES[case][2] == "bank":
        pytest.skip("each process keeps maps of its own until the epoch ends: the gradient test covers it")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    copies, settings, states, streams = [], [], [], []
    for of in range(2):
        copies.append(copy.deepcopy(model))
        settings.append(setting(case, copies[of], 48))
        settings[of][0].start_epoch(0, 1, 3)
        states.append(stream_of(of))
        streams.append(batches_for(case, of, 2))
    for step in range(3):
        optimizer.zero_grad()
        for of in range(2):
            copies[of].load_state_dict(model.state_dict())
            torch.set_rng_state(states[of])
            one_step(copies[of], *settings[of], streams[of], step)
            states[of] = torch.get_rng_state()
        for own, first, second in zip(model.parameters(), *(one.parameters() for one in copies), strict=True):
            own.grad = (first.grad + second.grad) / 2
        optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(of_weights[case][key], value, rtol=1e-5, atol=1e-6)


def stream_of(of: int) -> torch.Tensor:
    """The state of the generator that seed_rank_generator() gives a process, which has drawn its network before."""
    torch.manual_seed(0)
    Plain()
    environment = dict(os.environ)
    os.environ |= {"RANK": str(of), "WORLD_SIZE": "2"}
    seed_rank_generator(3)
    os.environ.clear()
    os.environ |= environment
    return torch.get_rng_state()


def one_step(model, mixer, source, batches: DeviceLoader, step: int) -> None:
    """The step number `step` of the epoch, without an update; gradients are left in .grad."""

    class Later:
        part, micro_batches, device = batches.image_set, batches.micro_batches, batches.device

        def __len__(self):
            return 1

        def epoch(self, epoch, start=0):
            return batches.epoch(epoch, start=step)

    state = TrainingState(model, torch.optim.SGD(model.parameters(), 0.0), mixer=mixer, source=source)
    train_one_epoch(state, Later(), StepConfig(LOSSES["ce"], 4), epoch=0)


def test_validation_counts_every_image_once(of_weights):
    logits, labels, counted = of_weights["validation"]
    part, model = noise(37), Plain()
    model.load_state_dict(of_weights["sage in two pieces"])
    alone, expected = predict(model, DeviceLoader(part, 8, device=CPU, **HALF))
    assert counted == len(part) and torch.equal(labels, expected)
    assert of_weights["sum"] == (2, 1), "a sum over the processes leaves what it was asked about as it is"
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-6)


METHODS = ["puzzlemix", "rlmix", "none"]


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact_in_two_processes(of_runs, method):
    one, other = of_runs[method]["whole"], of_runs[method]["parts"]
    for key in ("model", "optimizer", "ema", "method", "rng", "step"):
        assert same_state(one[key], other[key]), key
    assert len(one["rng"]) == 2 and not same_state(one["rng"][0], one["rng"][1])


@pytest.mark.parametrize("method", METHODS)
def test_sigterm_to_one_process_stops_both_inside_an_epoch_and_loses_nothing(of_runs, method):
    assert "2 steps into the epoch" in of_runs[method]["message"]
    one, other = of_runs[method]["whole"], of_runs[method]["stopped"]
    for key in ("model", "optimizer", "ema", "method", "rng", "step", "scheduler"):
        assert same_state(one[key], other[key]), key
    numbers = ("epoch", "lr", "train_loss", "train_acc", "test_top1")
    rows = [[{key: row[key] for key in numbers} for row in run["history"]] for run in (one, other)]
    assert rows[0] == rows[1]


def test_a_plain_run_stops_well_at_sigterm_and_goes_on_elsewhere(shapes_run, tmp_path, monkeypatch, capsys):
    """The same epoch goes on in the middle; with another number of processes the loss of exactness is stated."""
    whole = torch.load(shapes_run(name="whole", method="sage") / "last.pt", weights_only=True)
    update, done = loop.optimizer_step, []

    def counted(*args, **kwargs):
        update(*args, **kwargs)
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "optimizer_step", counted)
    with pytest.raises(Terminated, match="1 steps into the epoch; continue with --checkpoint"):
        shapes_run(name="stopped", method="sage")
    monkeypatch.undo()
    run = tmp_path / "shapes" / "resnet20" / "stopped"
    saved = torch.load(run / "last.pt", weights_only=True)
    assert saved["epoch"] == 1 and saved["step"] == 4
    copy_of = torch.load(run / "last.pt", weights_only=True)
    shapes_run("--checkpoint", "auto", name="stopped", method="sage")
    again = torch.load(run / "last.pt", weights_only=True)
    assert same_state(whole["model"], again["model"]) and same_state(whole["rng"], again["rng"])
    assert "goes on after 1 of its steps" in capsys.readouterr().out

    for key in ("rng", "method", "inside"):  # as if two processes had saved it
        copy_of[key] = copy_of[key] * 2
    torch.save(copy_of, run / "last.pt")
    shapes_run("--checkpoint", "auto", name="stopped", method="sage")
    assert "2 processes saved this run and 1 continue it" in capsys.readouterr().out


def torchrun(driver: Path, *words: str, flags: tuple = (), timeout: float = 120, env: dict | None = None):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        f"--master_port={find_free_port()}",
    ]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, *flags, str(driver), *words],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": timeout},
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
    )
    return done, time.monotonic() - begin


def driver(folder: Path, trouble: str) -> Path:
    """train.py, with `trouble` after the update of every step; `step`, `rank` and `attempt` are known to it."""
    path = folder / "driver.py"
    path.write_text(
        "import os, signal, sys\n"
        "from engine.training import loop\n"
        "from engine.errors import UserError\n"
        "from engine.launch import run_main\n"
        "import train\n"
        "update, step = loop.optimizer_step, 0\n"
        "def troubled(*args, **kwargs):\n"
        "    global step\n"
        "    update(*args, **kwargs)\n"
        "    step, rank, attempt = step + 1, int(os.environ['RANK']), os.environ.get('TORCHELASTIC_RESTART_COUNT')\n"
        f"    {trouble}\n"
        "loop.optimizer_step = troubled\n"
        "if __name__ == '__main__':\n"
        "    run_main(train.main)\n"
    )
    return path


def test_one_process_that_fails_ends_all_with_one_line_from_the_first(tmp_path):
    trouble = "if step == 4 and rank == 1: raise UserError('the second process is out of sorts')"
    done, seconds = torchrun(driver(tmp_path, trouble), *shapes_command(tmp_path))
    lines = [line for line in done.stderr.splitlines() if "out of sorts" in line]
    assert done.returncode != 0 and len(lines) == 1 and lines[0].startswith("driver.py: ")
    assert "(process 1 of 2)" in done.stderr and done.stderr.count("Traceback") == 1, "torchrun's own, and no other"
    assert seconds < 60, "it waited for the process that had failed"


def test_a_loss_that_is_no_number_in_all_of_them_is_told_once_and_kept(tmp_path):
    """All processes meet the error; the first one has the evidence, and the others wait until it is written."""
    words = ["--scheduler", "multistep", "--schedule", "1", "--gammas", "1e30"]
    done, _ = torchrun(driver(tmp_path, "pass"), *shapes_command(tmp_path, *words, epochs=3))
    run = tmp_path / "shapes" / "resnet20" / "run"
    assert done.stderr.count("the loss is not finite at step") == 1 and "(process 1 of 2)" not in done.stderr
    assert f"continue with --checkpoint {run / 'last.pt'}" in done.stderr and "exitcode  : 1 " in done.stderr
    assert "exitcode  : -6" not in done.stderr, "an abort"  # -15 is torchrun, which ends the slower of the two
    evidence = torch.load(run / "nonfinite.pt", weights_only=True)
    assert len(evidence["index"]) in (8, 20), "the images of both processes"


def test_a_lost_process_is_replaced_and_the_run_ends_as_if_nothing_had_been(tmp_path):
    trouble = "if step == 4 and rank == 1 and attempt == '0': os.kill(os.getpid(), signal.SIGKILL)"
    words = shapes_command(tmp_path)
    words = words[: words.index("--name")]  # not even a name is needed to find it again
    done, _ = torchrun(driver(tmp_path, trouble), *words, flags=("--max_restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert "continuing after epoch 1" in done.stdout
    done, _ = torchrun(driver(tmp_path, "pass"), *shapes_command(tmp_path, name="whole"))
    (found,) = (tmp_path / "shapes" / "resnet20").glob("none_*")
    lost, whole = (torch.load(folder / "last.pt", weights_only=True) for folder in (found, found.with_name("whole")))
    assert same_state(lost["model"], whole["model"]) and same_state(lost["rng"], whole["rng"])
    once = [line for line in done.stdout.splitlines() if line.startswith("epoch 2/2  ")]
    assert len(once) == 1, "only the first process prints"


@pytest.mark.parametrize("words", REFUSED)
def test_what_several_processes_cannot_do_is_said_before_they_start(of_runs, words):
    assert re.search(REFUSED[words], of_runs["refused"][words])


def test_processes_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Exception, match="MASTER_ADDR and MASTER_PORT and RANK not set.*\nstart them with torchrun"):
        distributed.init_processes(CPU, 1)
    for name, value in (("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(find_free_port()))):
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with pytest.raises(Exception, match=r"process 1 of 2 did not meet the others at 127\.0\.0\.1:\d+ within 1 s"):
        distributed.init_processes(CPU, 1)
    assert time.monotonic() - begin < 30 and distributed._group is None
    monkeypatch.setattr(distributed, "_alone", False)


def test_differing_data_and_options_are_named():
    one, other = {"training images": "10", "classes": "a, b"}, {"training images": "9", "classes": "a, b"}
    with pytest.raises(UserError, match="data of process 0 and process 1 differ: training images 10 against 9\nmend"):
        distributed.check_equal("data", [one, other], "mend it")
    distributed.check_equal("data", [one, dict(one)], "mend it")


def test_the_stop_sign_is_plain_alone():
    sign = PreemptionGuard()
    assert not sign.requested()
    sign.request(signal.SIGTERM, None)
    assert sign.requested()


def test_a_first_process_alone_prints_the_usage(monkeypatch, capsys):
    for of in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", of)
        with pytest.raises(SystemExit) as ended:
            train.main(["--epochs", "none"])
        assert ended.value.code == 2
    assert len(re.findall("expected an integer", capsys.readouterr().err)) == 1
