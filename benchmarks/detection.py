"""Measure the speed of detector training: python benchmarks/detection.py --data_dir data --train_sets 2007_trainval

Compares our training loop with the one in torchvision's detection reference, in turns in one process: the same images
in the same batches, the same weights, sizes, optimizer and number of workers. Theirs reads images through VOCDetection
and transforms.v2 and trains fasterrcnn_resnet50_fpn (or another depth) as torchvision builds it.
"""

import copy
import statistics
import time
from pathlib import Path

from common import read_options, setup_device, synchronize

from engine.config.option_types import choice, int_at_least
from engine.config.options import add_single_device_options
from engine.config.parser import Parser
from engine.launch import run_main

MOMENTUM, DECAY = 0.9, 5e-4


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option("--data_dir", default="data", metavar="DIR", help="folder that contains VOCdevkit")
    parser.option(
        "--train_sets", nargs="+", default=["2007_trainval"], metavar="YEAR_LIST", help="image list; only one"
    )
    parser.option(
        "--model", type=choice([f"resnet{n}" for n in (18, 34, 50, 101, 152)]), default="resnet50", help="backbone"
    )
    parser.option("--batch_size", "-b", type=int_at_least(1), default=8, help="images per step")
    parser.option("--min_size", type=int_at_least(8), default=600, help="shorter side in pixels")
    parser.option("--max_size", type=int_at_least(8), default=1000, help="maximum of the longer side in pixels")
    parser.option("--steps", type=int_at_least(1), default=4, help="training steps per turn")
    parser.option("--turns", type=int_at_least(1), default=3, help="turns of each loop; the median is printed")
    add_single_device_options(parser, amp="auto")
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FasterRCNN

    from detection.faster_rcnn import DetectorConfig, build_detector, load_detector, set_trainable_layers
    from detection.load import load_image_sets
    from detection.loader import DetectionLoader
    from engine.data.image_set import STATISTICS
    from engine.runtime.progress import progress_bar

    device, precision, device_text = setup_device(options)
    sets = {"data_dir": options["data_dir"], "train_sets": options["train_sets"], "test_set": options["train_sets"][0]}
    part, _ = load_image_sets(dataset="voc", progress=progress_bar, **sets)
    backbone = resnet_fpn_backbone(backbone_name=options["model"], weights=None, trainable_layers=3)
    theirs = FasterRCNN(backbone, len(part.classes) + 1, options["min_size"], options["max_size"])
    mean, std = STATISTICS["imagenet"]
    config = DetectorConfig(mean, std, min_size=[options["min_size"]], max_size=options["max_size"])
    ours = build_detector(options["model"], len(part.classes), config)
    load_detector(ours, theirs.state_dict(), "theirs")
    set_trainable_layers(ours, trainable_layers=3)
    ours, theirs = ours.to(device, memory_format=torch.channels_last), theirs.to(device)
    common = {"device": device, "workers": options["workers"]}
    loader = DetectionLoader(part, options["batch_size"], shuffle=True, augment="flip", **common)
    steps = min(options["steps"], len(loader))
    loops = {
        "torchvision's loop": lambda turn: time_reference_loop(theirs, loader, part, turn, steps, options, None),
        "ours, float32": lambda turn: time_our_loop(ours, loader, turn, steps, None),
    }
    if precision:
        again, mine = copy.deepcopy(theirs), copy.deepcopy(ours)
        loops[f"torchvision's loop, {str(precision)[6:]}"] = lambda turn: time_reference_loop(
            again, loader, part, turn, steps, options, precision
        )
        loops[f"ours, {str(precision)[6:]}"] = lambda turn: time_our_loop(mine, loader, turn, steps, precision)
    print(
        f"{options['model']}, fpn, batch {options['batch_size']}, shorter side {options['min_size']}, {len(part)} "
        f"images, {options['workers']} workers, {device_text}",
        flush=True,
    )
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for turn in range(options["turns"] + 1):
        for name, loop in loops.items():
            rate, waiting = loop(turn)
            if turn:  # the first turn is a warm-up
                results[name].append((rate, waiting))
    loader.close()
    table = {}
    first = statistics.median(rate for rate, _ in results["torchvision's loop"])
    for name, pairs in results.items():
        rate, waiting = (statistics.median(column) for column in zip(*pairs, strict=True))
        table[name] = {"images_per_second": rate, "ratio": rate / first, "waiting": waiting}
        absolute = f"{rate:8.2f} images/s" if device.type == "cuda" else ""
        print(f"{name:50} {absolute} {rate / first:6.2f} x  {100 * waiting:.1f} % of the step waiting for data")
    return table


def time_our_loop(detector, loader, turn: int, steps: int, precision) -> tuple[float, float]:
    """Return images per second of detection.loop, and the share of the time spent waiting for data."""
    import torch

    from detection.loop import train_one_epoch
    from engine.training import EpochMonitor, TrainingState

    optimizer = torch.optim.SGD(
        get_trainable_parameters(detector), 1e-4, momentum=MOMENTUM, weight_decay=DECAY, fused=True
    )
    monitor, begin = EpochMonitor(loader.device), time.perf_counter()
    state = TrainingState(detector, optimizer)
    numbers = train_one_epoch(state, loader, epoch=turn, steps=steps, precision=precision, monitor=monitor)
    synchronize(loader.device)
    seconds = time.perf_counter() - begin
    return numbers["images"] / seconds, monitor.watch.seconds()["data"] / seconds


def time_reference_loop(detector, loader, part, turn: int, steps: int, options: dict, precision) -> tuple[float, float]:
    """Return the same for the loop of torchvision's reference, with its VOC dataset and its transforms."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    from detection.voc_folders import find_devkits

    device = loader.device
    year, image_set = options["train_sets"][0].split("_")
    transforms = [
        v2.RandomHorizontalFlip(0.5),
        v2.PILToTensor(),
        v2.ToDtype(torch.float, scale=True),
        v2.ToPureTensor(),
    ]
    root = find_devkits(Path(options["data_dir"]))[0].parent
    dataset = VOCDetection(root, year=year, image_set=image_set, transforms=v2.Compose(transforms))
    dataset = wrap_dataset_for_transforms_v2(dataset, target_keys=["boxes", "labels"])
    batches = loader.order(turn).split(loader.batch_size)[:steps]
    workers = {"num_workers": options["workers"], "pin_memory": device.type == "cuda"}
    begin = time.perf_counter()
    reference_loader = DataLoader(
        dataset, batch_sampler=[batch.tolist() for batch in batches], collate_fn=collate, **workers
    )
    optimizer = torch.optim.SGD(get_trainable_parameters(detector), 1e-4, momentum=MOMENTUM, weight_decay=DECAY)
    detector.train()
    stream, waited, seen = iter(reference_loader), 0.0, 0
    for _ in batches:
        begin_wait = time.perf_counter()
        images, targets = next(stream)
        waited += time.perf_counter() - begin_wait
        images = [image.to(device) for image in images]
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with torch.autocast(device.type, precision, bool(precision)):
            losses = detector(images, targets)
            loss = sum(losses.values())
        if not torch.isfinite(loss.detach()).item():
            raise ValueError("the loss is NaN or infinite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(images)
    synchronize(device)
    seconds = time.perf_counter() - begin
    return seen / seconds, waited / seconds


def collate(samples: list) -> tuple:
    """Collate pairs to a tuple of images and a tuple of targets."""
    return tuple(zip(*samples, strict=True))


def get_trainable_parameters(detector) -> list:
    return [parameter for parameter in detector.parameters() if parameter.requires_grad]


if __name__ == "__main__":
    run_main(main)
