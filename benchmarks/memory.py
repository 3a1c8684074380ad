"""What memory each method takes: python benchmarks/memory.py --model imagenet_resnet50 --image_size 224 --batch_size 8

A table of the highest number of bytes in tensors during a training step of every method, over that of the plain step,
and during each part of it: the saliency pass (where a method has one), mixing, and the network's own passes. Weights,
optimizer state and gradients are in all of them; the data set is not. On CUDA the numbers are the allocator's, which
include its kernels' workspaces; on a CPU they are summed up from the profiler's record of every allocation. Every batch
is mixed, with the settings of the ImageNet recipe and, where a method can, a clean term.
"""

import gc
import os

from common import read_options, setup_device

from engine.config.option_types import choice, int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.config.recipes import get_recipe_options
from engine.errors import UserError
from engine.launch import run_main
from mixing import ALIASES, MIXERS, build_mixer
from models import ALIASES as MODEL_ALIASES
from models import MODELS, build_model
from saliency import ALIASES as SOURCE_ALIASES
from saliency import SOURCES, build_source

PARTS = ("saliency", "mixing", "network")
LAP = "end of "  # in the profiler's record


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("what")
    parser.option("--model", type=choice(MODELS, MODEL_ALIASES), default="imagenet_resnet50", metavar="NAME")
    parser.option("--methods", "--method", type=choice(MIXERS, ALIASES), nargs="+", default=list(MIXERS))
    parser.option("--saliency", type=choice(SOURCES, SOURCE_ALIASES), metavar="SOURCE", help="in place of each own")
    parser.option("--saliency_size", type=int_at_least(8), metavar="PIXELS", help="of the gradient's pass")
    parser.option("--batch_size", type=int_at_least(2), default=8)
    parser.option("--image_size", type=int_at_least(8), default=224, help="in pixels")
    parser.option("--num_classes", type=int_at_least(2), default=1000)
    parser.option("--steps", type=int_at_least(1), default=4, help="steps looked at, after one to warm up")
    parser.option("--threads", type=int_at_least(1), help="of the processor [all]")
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure; returns bytes by method and part."""
    parser = build_parser()
    options = read_options(parser, argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

    import torch

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device, precision, where = setup_device(options)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: memory is measured on cpu and cuda only")
    print(
        f"{options['model']}, batch {options['batch_size']}, {options['image_size']} pixels, {where}\n{'method':12} "
        f"{'peak MiB':>9} {'x vanilla':>9} {'saliency':>9} {'mixing':>9} {'network':>9}  highest in"
    )
    batches = random_batches(options, device)
    result = {}
    for name in dict.fromkeys(["none", *options["methods"]]):
        result[name] = measure(name, options, batches, device, precision)
        print(row_of(name, result[name], peak(result["none"])), flush=True)
    return result


def random_batches(options: dict, device):
    """Batches of noise: what a step takes does not depend on what the images show."""
    import torch

    from engine.data.image_set import STATISTICS, ImageSet
    from engine.data.loader import DeviceLoader

    count, side, classes = options["steps"] * options["batch_size"], options["image_size"], options["num_classes"]
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    part = ImageSet(pixels, torch.randint(classes, (count,)), [str(number) for number in range(classes)], "nowhere")
    mean, std = STATISTICS["imagenet"]
    feed = {"device": device, "mean": mean, "std": std, "channels_last": options["channels_last"]}
    return DeviceLoader(part, options["batch_size"], shuffle=True, **feed)


def published(name: str, model: str) -> dict:
    """The hyper-parameters of the method in the first phase of the ImageNet recipe."""
    recipe = get_recipe_options("fast100", dataset="imagenet", model=model)
    return {**recipe["method_options"].get(name, {}), **recipe["phase_options"][0].get(name, {})}


def measure(name: str, options: dict, batches, device, precision) -> dict[str, float]:
    """The highest number of bytes in use, by part of the step; a part that the method does not have is missing."""
    import torch

    from engine.data.image_set import STATISTICS
    from engine.training import EpochMonitor, StepConfig, TrainingState, train_one_epoch
    from engine.training.loss import LOSSES, get_cross_entropy_scale

    gc.collect()  # what the method before has left would be freed under the eyes of the meter
    torch.manual_seed(0)
    classes, loss_fn = options["num_classes"], LOSSES["ce"]
    with (CudaMeter if device.type == "cuda" else HostMeter)() as meter:
        layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
        model = build_model(options["model"], classes, options["image_size"]).to(device, memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True, fused=True)
        share = dict(zip(("mean", "std"), STATISTICS["imagenet"], strict=True))
        mixer = build_mixer(name, **{**published(name, options["model"]), **share, "mix_prob": 1.0})
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
        if name == "rlmix":  # let its agent learn now, and not in the thousandth step only
            mixer.agent.rollout.filled = mixer.agent.rollout.steps - 1
        train_one_epoch(state, batches, config, epoch=1, monitor=EpochMonitor(device, watch=meter))
    found = meter.highest()
    return {part: found[part] for part in PARTS if part in found}


class CudaMeter:
    """Peaks by part of the step, with the calls of a Stopwatch: what came since the last lap belongs to its name."""

    def __enter__(self):
        self.found: dict[str, float] = {}
        return self

    def __exit__(self, *error):
        pass

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def lap(self, name: str) -> None:
        import torch

        self.found[name] = max(self.found.get(name, 0), torch.cuda.max_memory_allocated())
        self.start()

    def highest(self) -> dict[str, float]:
        return self.found


class HostMeter:
    """As CudaMeter. A processor's allocator counts nothing by itself, but reports to the profiler."""

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

    def highest(self) -> dict[str, float]:
        events = self.profiler.profiler.kineto_results.events()
        found, alive, top = {}, 0, 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                alive += event.nbytes()
                top = max(top, alive)
            elif event.name().startswith(LAP):
                part = event.name().removeprefix(LAP)
                found[part], top = max(found.get(part, 0), top), alive
        return found


def peak(bytes_by_part: dict[str, float]) -> float:
    return max(bytes_by_part.values())


def row_of(name: str, found: dict[str, float], vanilla: float) -> str:
    columns = "".join(f" {found[part] / 2**20:9.1f}" if part in found else f" {'':9}" for part in PARTS)
    where = max(found, key=found.get)
    return f"{name:12} {peak(found) / 2**20:9.1f} {peak(found) / vanilla:9.3f}{columns}  {where}"


if __name__ == "__main__":
    run_main(main)
