"""Measure what --compile brings: python benchmarks/compile.py --model resnet20 --method none rmix --steps 10

Prints the time of a training step with the compiled and with the uncompiled network, which take turns, the seconds
that compiling took, and after how many steps these are earned back. Every batch is mixed, and images are random. torch
keeps compiled graphs on disk: set TORCHINDUCTOR_CACHE_DIR to an empty folder to time the compiler itself.
"""

import copy
import time

from common import add_method_options, median_ms, read_options, setup_device, synchronize

from engine.config.option_types import int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.errors import UserError
from engine.launch import run_main
from mixing import build_mixer
from models import build_model
from saliency import build_source

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    add_method_options(parser, model="resnet20", methods=["none", "rmix"])
    parser.option("--batch_size", type=int_at_least(2), default=100, help="images per step")
    parser.option("--image_size", type=int_at_least(8), default=32, help="side of the images in pixels")
    parser.option("--steps", type=int_at_least(1), default=10, help="timed steps of each method and network")
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and return the figures of each method."""
    parser = build_parser()
    options = read_options(parser, argv)

    import torch

    from engine.training.compilation import compile_network

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device, precision, device_text = setup_device(options)
    size = options["image_size"]
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    plain = build_model(options["model"], 10, size).to(device, memory_format=layout)
    compiled = copy.deepcopy(plain)
    clock, note = compile_network(compiled)
    if not clock:
        raise UserError(note)
    print(
        f"{options['model']}, batch {options['batch_size']}, {size} pixels, {device_text}\n"
        f"{'method':12} {'step ms':>9} {'compiled ms':>11} {'ratio':>6} {'compiling s':>11} {'earned back':>11}"
    )
    table = {}
    for name in options["method"]:
        sides = [Side(name, network, options, device, precision) for network in (plain, compiled)]
        clock.take()
        for side in sides:
            side.step(), side.step()
        laps = [[side.step() for side in sides] for _ in range(options["steps"])]
        before, after = (median_ms(column) for column in zip(*laps, strict=True))
        row = {"plain": before, "compiled": after, "seconds": clock.take()}
        row["ratio"] = median_ms([b / a for a, b in laps]) / 1000
        steps = f"{1000 * row['seconds'] / (before - after):,.0f} steps" if after < before else "never"
        print(
            f"{name:12} {before:9.2f} {after:11.2f} {row['ratio']:6.3f} {row['seconds']:11.1f} {steps:>11}", flush=True
        )
        table[name] = row
    return table


class Side:
    """Training steps of a method with one of the two networks."""

    def __init__(self, name: str, network, options: dict, device, precision):
        import torch

        from engine.data.image_set import ImageSet
        from engine.data.loader import DeviceLoader
        from engine.training import LOSSES, StepConfig, TrainingState

        count, size = options["batch_size"], options["image_size"]
        pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
        images = ImageSet(pixels, torch.arange(count) % 10, [str(k) for k in range(10)], "random")
        layout = {"channels_last": options["channels_last"]}
        self.loader = DeviceLoader(images, count, device=device, shuffle=True, **layout, **HALF)
        mixer = build_mixer(name, **HALF, mix_prob=1.0, kernels=options["kernels"])
        share = {"model": network, "num_images": count, "device": device, "precision": precision, **HALF}
        share |= {"training_loss": LOSSES["ce"], "saliency_size": options["saliency_size"]}
        source = mixer.build_source(
            lambda one: build_source(options["saliency"] or one.default_source, **share | one.gradient_options)
        )
        optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9, fused=device.type != "mps")
        self.state = TrainingState(network, optimizer, mixer=mixer, source=source)
        self.config, self.device = StepConfig(LOSSES["ce"], 10, precision), device

    def step(self) -> float:
        """Run a training step and return its seconds."""
        from engine.training import train_one_epoch

        begin = time.perf_counter()
        train_one_epoch(self.state, self.loader, self.config, epoch=0)
        synchronize(self.device)
        return time.perf_counter() - begin


if __name__ == "__main__":
    run_main(main)
