"""Measure the cost of class activation maps: python benchmarks/maps.py --model resnet50

Prints the time of maps computed in batches, of the same maps computed one image at a time, and of the forward pass
alone, all in turns in one process; and the memory of Score-CAM, which runs its masked images through the network in
chunks. Weights are random, because they do not change the cost.
"""

import time

from common import read_options, setup_device

from engine.config.option_types import choices, int_at_least
from engine.config.options import add_single_device_options
from engine.config.parser import Parser
from engine.launch import run_main
from saliency import CAM_METHODS

FAST = [name for name in CAM_METHODS if name != "scorecam"]


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option("--model", default="mobilenet_v2", metavar="NAME", help="network architecture of torchvision")
    parser.option("--method", type=choices(FAST), nargs="+", default=FAST, metavar="NAME", help=", ".join(FAST))
    parser.option("--images", type=int_at_least(1), default=64, help="number of images")
    parser.option("--batch_size", "-b", type=int_at_least(1), default=16, help="maps per batch")
    parser.option("--image_size", type=int_at_least(32), default=224, help="side of the images in pixels")
    parser.option("--repeats", type=int_at_least(1), default=3, help="number of turns; the median is printed")
    parser.option(
        "--scorecam", type=int_at_least(), default=1, metavar="N", help="images for Score-CAM; 0: leave it out"
    )
    add_single_device_options(parser, amp="off", workers=False)
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch
    from torchvision.models import get_model

    from saliency.cam.maps import ActivationMaps

    device, precision, device_text = setup_device(options)
    network = get_model(options["model"], weights=None).to(device).eval().requires_grad_(False)
    side, count = options["image_size"], options["images"]
    images = torch.randn(count, 3, side, side, device=device)
    targets = torch.randint(0, 1000, (count,), device=device)
    print(f"{options['model']}, {count} images of {side} pixels, {device_text}")

    def forward(some, classes):
        with torch.no_grad(), torch.autocast(device.type, precision, bool(precision)):
            return network(some)

    functions = {"forward pass": forward}
    functions |= {name: ActivationMaps(network, name, precision=precision) for name in options["method"]}
    times = {(name, size): [] for name in functions for size in (options["batch_size"], 1)}
    for one in functions.values():
        one(images[:2], targets[:2])
    for _ in range(options["repeats"]):
        for name, size in times:
            times[name, size].append(time_images(functions[name], images, targets, size, device))
    medians = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    print(
        f"{'':14} {'batches of ' + str(options['batch_size']):>16} {'one at a time':>14} {'ratio':>7}  (ms per image)"
    )
    result = {}
    for name in functions:
        batched, single = (1000 * medians[name, size] / count for size in (options["batch_size"], 1))
        result[name] = single / batched
        print(f"{name:14} {batched:16.2f} {single:14.2f} {result[name]:7.2f}")
    if options["scorecam"]:
        result["scorecam"] = measure_score_cam(network, images[: options["scorecam"]], targets, device, precision)
    return result


def time_images(function, images, targets, size: int, device) -> float:
    """Return the seconds for all images, `size` images at a time."""
    begin = time.perf_counter()
    for some, classes in zip(images.split(size), targets.split(size), strict=True):
        function(some, classes)
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure_score_cam(network, images, targets, device, precision) -> dict:
    """Return the seconds per image and, on CUDA, the peak memory in MiB, by the number of masked images at a time."""
    import torch

    from saliency.cam.maps import ActivationMaps

    result = {}
    for chunk in (8, 32, 128):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        maps = ActivationMaps(network, "scorecam", batch_size=chunk, precision=precision)
        seconds = time_images(maps, images, targets[: len(images)], len(images), device) / len(images)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        result[chunk] = {"seconds": seconds, "MB": peak}
        memory = f", {peak:.0f} MiB" if peak else ""
        print(f"scorecam, {chunk:3} masked images at a time: {seconds:.2f} s per image{memory}")
    return result


if __name__ == "__main__":
    run_main(main)
