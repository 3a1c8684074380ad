"""Measure the memory of each method: python benchmarks/memory.py --model imagenet_resnet50 --batch_size 8

Prints the peak memory of tensors during a training step of every method, also relative to a plain step, and the peak
in each part of the step: the saliency pass (if the method has one), mixing, and the passes of the network. Weights,
optimizer state and gradients are included; the dataset is not. On CUDA the numbers come from the allocator and include
the workspaces of kernels. On a CPU they are summed from the allocations that the profiler records. Every batch is
mixed, with the settings of the ImageNet recipe and, if a method has one, a loss on the clean images.
"""

import gc
import os

from common import add_method_options, read_options, setup_device

from engine.config.option_types import int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.config.recipes import get_recipe_options
from engine.errors import UserError
from engine.launch import run_main
from mixing import MIXERS, build_mixer
from models import build_model
from saliency import build_source

PARTS = ("saliency", "mixing", "network")
LAP = "end of "  # prefix of our markers in the record of the profiler


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    add_method_options(parser, model="imagenet_resnet50", methods=list(MIXERS))
    parser.option("--batch_size", type=int_at_least(2), default=8, help="images per step")
    parser.option("--image_size", type=int_at_least(8), default=224, help="side of the images in pixels")
    parser.option("--num_classes", type=int_at_least(2), default=1000, help="number of classes")
    parser.option("--steps", type=int_at_least(1), default=4, help="measured steps, after one warm-up step")
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and return the peak bytes by method and part of the step."""
    parser = build_parser()
    options = read_options(parser, argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the messages of the profiler

    import torch

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device, precision, device_text = setup_device(options)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: memory can be measured on cpu and cuda only")
    print(
        f"{options['model']}, batch {options['batch_size']}, {options['image_size']} pixels, {device_text}\n"
        f"{'method':12} {'peak MiB':>9} {'x plain':>9} {'saliency':>9} {'mixing':>9} {'network':>9}  peak in"
    )
    batches = random_batches(options, device)
    result = {}
    for name in dict.fromkeys(["none", *options["method"]]):
        result[name] = measure_method(name, options, batches, device, precision)
        print(format_row(name, result[name], get_peak(result["none"])), flush=True)
    return result


def random_batches(options: dict, device):
    """Return a loader of noise images; the memory of a step does not depend on their content."""
    import torch

    from engine.data.image_set import STATISTICS, ImageSet
    from engine.data.loader import DeviceLoader

    count, side, classes = options["steps"] * options["batch_size"], options["image_size"], options["num_classes"]
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    part = ImageSet(pixels, torch.randint(classes, (count,)), [str(number) for number in range(classes)], "nowhere")
    mean, std = STATISTICS["imagenet"]
    loader_options = {"device": device, "mean": mean, "std": std, "channels_last": options["channels_last"]}
    return DeviceLoader(part, options["batch_size"], shuffle=True, **loader_options)


def get_published_options(name: str, model: str) -> dict:
    """Return the hyper-parameters of the method in the first phase of the recipe fast100."""
    recipe = get_recipe_options("fast100", dataset="imagenet", model=model)
    return {**recipe["method_options"].get(name, {}), **recipe["phase_options"][0].get(name, {})}


def measure_method(name: str, options: dict, batches, device, precision) -> dict[str, float]:
    """Return the peak bytes by part of the step, without the parts that the method does not have."""
    import torch

    from engine.data.image_set import STATISTICS
    from engine.training import EpochMonitor, StepConfig, TrainingState, train_one_epoch
    from engine.training.loss import LOSSES, get_cross_entropy_scale

    gc.collect()  # or garbage of the previous method would be freed during the measurement
    torch.manual_seed(0)
    classes, loss_fn = options["num_classes"], LOSSES["ce"]
    with (CudaMeter if device.type == "cuda" else HostMeter)() as meter:
        layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
        model = build_model(options["model"], classes, options["image_size"]).to(device, memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True, fused=True)
        share = dict(zip(("mean", "std"), STATISTICS["imagenet"], strict=True))
        mixer = build_mixer(name, **{**get_published_options(name, options["model"]), **share, "mix_prob": 1.0})
        mixer.check_size(options["image_size"], options["image_size"])
        share |= {"model": model, "num_images": len(batches.image_set), "device": device, "training_loss": loss_fn}
        share |= {"precision": precision, "saliency_size": options["saliency_size"]}
        share |= {"cross_entropy_scale": get_cross_entropy_scale("ce", classes)}
        source = mixer.build_source(
            lambda one: build_source(options["saliency"] or one.default_source, **share | one.gradient_options)
        )
        state = TrainingState(model, optimizer, mixer=mixer, source=source)
        config = StepConfig(loss_fn, classes, precision)
        train_one_epoch(state, batches, config, epoch=0, max_steps=1)
        if name == "rlmix":  # let its agent learn in a measured step, and not only in the thousandth
            mixer.agent.rollout.filled = mixer.agent.rollout.steps - 1
        train_one_epoch(state, batches, config, epoch=1, monitor=EpochMonitor(device, watch=meter))
    peaks = meter.peaks()
    return {part: peaks[part] for part in PARTS if part in peaks}


class CudaMeter:
    """A Stopwatch that measures peak memory: lap(name) assigns the peak since the last lap to the part `name`."""

    def __enter__(self):
        self.peaks: dict[str, float] = {}
        return self

    def __exit__(self, *error):
        pass

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def lap(self, name: str) -> None:
        import torch

        self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())
        self.start()

    def peaks(self) -> dict[str, float]:
        return self.peaks


class HostMeter:
    """Like CudaMeter, from the record of the profiler, because the CPU allocator keeps no statistics."""

    def __enter__(self):
        from torch.profiler import ProfilerActivity, profile

        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()
        return self

    def __exit__(self, *error):
        self.profiler.__exit__(*error)

    def start(self) -> None:
        self.lap("")

    def lap(self, name: str) -> None:
        from torch.profiler import record_function

        with record_function(LAP + name):
            pass

    def peaks(self) -> dict[str, float]:
        events = self.profiler.profiler.kineto_results.events()
        peaks, alive, top = {}, 0, 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                alive += event.nbytes()
                top = max(top, alive)
            elif event.name().startswith(LAP):
                part = event.name().removeprefix(LAP)
                peaks[part], top = max(peaks.get(part, 0), top), alive
        return peaks


def get_peak(bytes_by_part: dict[str, float]) -> float:
    return max(bytes_by_part.values())


def format_row(name: str, peaks: dict[str, float], plain: float) -> str:
    columns = "".join(f" {peaks[part] / 2**20:9.1f}" if part in peaks else f" {'':9}" for part in PARTS)
    peak_part = max(peaks, key=peaks.get)
    return f"{name:12} {get_peak(peaks) / 2**20:9.1f} {get_peak(peaks) / plain:9.3f}{columns}  {peak_part}"


if __name__ == "__main__":
    run_main(main)
