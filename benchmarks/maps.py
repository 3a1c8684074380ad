"""What class activation maps cost: python benchmarks/maps.py --model resnet50

A batch of maps against the same maps one image at a time, in turns in one process, beside the forward pass alone; and
the memory that Score-CAM takes, whose masked images go through the network in chunks. Weights are random: they do not
change the cost.
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
    parser.group("what")
    parser.option("--model", default="mobilenet_v2", metavar="NAME", help="of torchvision's")
    parser.option("--method", type=choices(FAST), nargs="+", default=FAST, metavar="NAME", help=", ".join(FAST))
    parser.option("--images", type=int_at_least(1), default=64)
    parser.option("--batch_size", "-b", type=int_at_least(1), default=16, help="maps at a time")
    parser.option("--image_size", type=int_at_least(32), default=224)
    parser.option("--repeats", type=int_at_least(1), default=3, help="turns; the median counts")
    parser.option(
        "--scorecam", type=int_at_least(), default=1, metavar="N", help="images of which Score-CAM is timed; 0: none"
    )
    add_single_device_options(parser, amp="off", workers=False)
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch
    from torchvision.models import get_model

    from saliency.cam.maps import ActivationMaps

    device, precision, where = setup_device(options)
    network = get_model(options["model"], weights=None).to(device).eval().requires_grad_(False)
    side, count = options["image_size"], options["images"]
    images = torch.randn(count, 3, side, side, device=device)
    targets = torch.randint(0, 1000, (count,), device=device)
    print(f"{options['model']}, {count} images of {side} pixels, {where}")

    def forward(some, classes):
        with torch.no_grad(), torch.autocast(device.type, precision, bool(precision)):
            return network(some)

    subjects = {"forward pass": forward}
    subjects |= {name: ActivationMaps(network, name, precision=precision) for name in options["method"]}
    times = {(name, size): [] for name in subjects for size in (options["batch_size"], 1)}
    for one in subjects.values():
        one(images[:2], targets[:2])
    for _ in range(options["repeats"]):
        for name, size in times:
            times[name, size].append(seconds(subjects[name], images, targets, size, device))
    middle = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    print(f"{'':14} {'batches of ' + str(options['batch_size']):>16} {'one at a time':>14} {'ratio':>7}  ms an image")
    result = {}
    for name in subjects:
        batched, single = (1000 * middle[name, size] / count for size in (options["batch_size"], 1))
        result[name] = single / batched
        print(f"{name:14} {batched:16.2f} {single:14.2f} {result[name]:7.2f}")
    if options["scorecam"]:
        result["scorecam"] = score_cam(network, images[: options["scorecam"]], targets, device, precision)
    return result


def seconds(subject, images, targets, size: int, device) -> float:
    """Of all images, so many at a time."""
    begin = time.perf_counter()
    for some, classes in zip(images.split(size), targets.split(size), strict=True):
        subject(some, classes)
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def score_cam(network, images, targets, device, precision) -> dict:
    """Seconds an image and, on CUDA, the peak memory in MB, by the number of masked images at a time."""
    import torch

    from saliency.cam.maps import ActivationMaps

    result = {}
    for chunk in (8, 32, 128):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        maps = ActivationMaps(network, "scorecam", batch_size=chunk, precision=precision)
        took = seconds(maps, images, targets[: len(images)], len(images), device) / len(images)
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        result[chunk] = {"seconds": took, "MB": peak}
        memory = f", {peak:.0f} MB" if peak else ""
        print(f"scorecam, {chunk:3} masked images at a time: {took:.2f} s an image{memory}")
    return result


if __name__ == "__main__":
    run_main(main)
