"""How fast is detector training? python benchmarks/detection.py --data_dir data --train_sets 2007_trainval

Our step against the loop that torchvision's detection reference describes, by turns in one process: the same images in
the same batches, the same weights, sizes, optimizer and number of workers. Theirs reads through VOCDetection and
transforms.v2 and trains fasterrcnn_resnet50_fpn (or another depth) as torchvision builds it.
"""

import copy
import statistics
import time
from pathlib import Path

from common import read_options, setup_device, wait_for

from engine.config.option_types import choice, int_at_least
from engine.config.options import add_single_device_options
from engine.config.parser import Parser
from engine.launch import run_main

MOMENTUM, DECAY = 0.9, 5e-4


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("what")
    parser.option("--data_dir", default="data", help="the folder that holds VOCdevkit")
    parser.option("--train_sets", nargs="+", default=["2007_trainval"], metavar="YEAR_LIST", help="one")
    parser.option("--model", type=choice([f"resnet{n}" for n in (18, 34, 50, 101, 152)]), default="resnet50")
    parser.option("--batch_size", "-b", type=int_at_least(1), default=8)
    parser.option("--min_size", type=int_at_least(8), default=600)
    parser.option("--max_size", type=int_at_least(8), default=1000)
    parser.option("--steps", type=int_at_least(1), default=4, help="of a turn")
    parser.option("--turns", type=int_at_least(1), default=3, help="of each loop; the median counts")
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

    device, precision, where = setup_device(options)
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
    feed = DetectionLoader(part, options["batch_size"], shuffle=True, augment="flip", **common)
    steps = min(options["steps"], len(feed))
    loops = {
        "torchvision's loop": lambda turn: reference(theirs, feed, part, turn, steps, options, None),
        "ours, float32": lambda turn: own(ours, feed, turn, steps, None),
    }
    if precision:
        again, mine = copy.deepcopy(theirs), copy.deepcopy(ours)
        loops[f"torchvision's loop, {str(precision)[6:]}"] = lambda turn: reference(
            again, feed, part, turn, steps, options, precision
        )
        loops[f"ours, {str(precision)[6:]}"] = lambda turn: own(mine, feed, turn, steps, precision)
    print(
        f"{options['model']}, fpn, batch {options['batch_size']}, shorter side {options['min_size']}, {len(part)} "
        f"images, {options['workers']} workers, {where}",
        flush=True,
    )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for turn in range(options["turns"] + 1):
        for name, loop in loops.items():
            rate, waiting = loop(turn)
            if turn:  # the first one warms up
                found[name].append((rate, waiting))
    feed.close()
    table = {}
    first = statistics.median(rate for rate, _ in found["torchvision's loop"])
    for name, pairs in found.items():
        rate, waiting = (statistics.median(column) for column in zip(*pairs, strict=True))
        table[name] = {"images_per_second": rate, "ratio": rate / first, "waiting": waiting}
        absolute = f"{rate:8.2f} images/s" if device.type == "cuda" else ""
        print(f"{name:50} {absolute} {rate / first:6.2f} x  waiting for data {100 * waiting:.1f} % of the step")
    return table


def own(detector, feed, turn: int, steps: int, precision) -> tuple[float, float]:
    """Images a second, and the share of the time spent waiting for them, of detection.loop."""
    import torch

    from detection.loop import train_one_epoch
    from engine.training import EpochMonitor, TrainingState

    optimizer = torch.optim.SGD(learning(detector), 1e-4, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
    monitor, begin = EpochMonitor(feed.device), time.perf_counter()
    state = TrainingState(detector, optimizer)
    numbers = train_one_epoch(state, feed, epoch=turn, steps=steps, precision=precision, monitor=monitor)
    wait_for(feed.device)
    seconds = time.perf_counter() - begin
    return numbers["images"] / seconds, monitor.watch.seconds()["data"] / seconds


def reference(detector, feed, part, turn: int, steps: int, options: dict, precision) -> tuple[float, float]:
    """The same of the loop that torchvision's reference describes, fed by its data set of VOC and its transforms."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import VOCDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    from detection.voc import find_devkit

    device = feed.device
    year, which = options["train_sets"][0].split("_")
    steps_of = [v2.RandomHorizontalFlip(0.5), v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.ToPureTensor()]
    root = find_devkit(Path(options["data_dir"])).parent
    images = VOCDetection(root, year=year, image_set=which, transforms=v2.Compose(steps_of))
    images = wrap_dataset_for_transforms_v2(images, target_keys=["boxes", "labels"])
    batches = feed.order(turn).split(feed.batch_size)[:steps]
    workers = {"num_workers": options["workers"], "pin_memory": device.type == "cuda"}
    begin = time.perf_counter()
    loader = DataLoader(images, batch_sampler=[batch.tolist() for batch in batches], collate_fn=columns, **workers)
    optimizer = torch.optim.SGD(learning(detector), 1e-4, momentum=MOMENTUM, weight_decay=DECAY)
    detector.train()
    stream, waited, seen = iter(loader), 0.0, 0
    for _ in batches:
        asked = time.perf_counter()
        pictures, targets = next(stream)
        waited += time.perf_counter() - asked
        pictures = [picture.to(device) for picture in pictures]
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with torch.autocast(device.type, precision, bool(precision)):
            losses = detector(pictures, targets)
            loss = sum(losses.values())
        if not torch.isfinite(loss.detach()).item():
            raise ValueError("the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(pictures)
    wait_for(device)
    seconds = time.perf_counter() - begin
    return seen / seconds, waited / seconds


def columns(samples: list) -> tuple:
    return tuple(zip(*samples, strict=True))


def learning(detector) -> list:
    return [parameter for parameter in detector.parameters() if parameter.requires_grad]


if __name__ == "__main__":
    run_main(main)
