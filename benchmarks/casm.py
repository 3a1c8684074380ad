"""Measure the cost and the localization of trained masks: python benchmarks/casm.py --casm casms/l100.chk

Two tables. The first has the time of a step of mask training relative to a plain training step of the same classifier,
by the classifier that scores the masks, next to the minimum set by the number of network passes. The second has, for
every saliency source, the time of a SaliencyMix step relative to a plain step, and how well the point and the map of
the source locate the object, measured on the masks of shapes or the ground-truth boxes of Tiny-ImageNet. All steps are
timed in turns, in one process.
"""

import time

from common import read_options, setup_device, synchronize

from engine.config.option_types import float_in_range, int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.launch import run_main

SOURCES = ["uniform", "fine_grained", "spectral_residual", "gradient", "cam", "casm"]
SCORERS = {  # name -> options of the step, minimum in plain steps: forward, pixel and weight gradients, a third each
    "fixed classifier (F)": ({"fixed_classifier": True, "hp": 0.0}, 3 / 3),
    "the classifier itself (L)": ({"fixed_classifier": False, "hp": 0.0}, 7 / 3),
    "an earlier snapshot": ({"fixed_classifier": False, "hp": 1.0}, 5 / 3),
    "either at random (L100)": ({"fixed_classifier": False, "hp": 0.5}, 6 / 3),
}


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option(
        "--casm", metavar="FILE", help="masks made by python -m saliency.casm train; with their dataset and network"
    )
    parser.option("--data_dir", metavar="DIR", shown="that of the training", help="folder of the dataset")
    parser.option("--batch_size", type=int_at_least(2), default=100, help="images per step")
    parser.option(
        "--steps", type=int_at_least(), default=20, help="timed steps of each kind; 0: measure localization only"
    )
    parser.option(
        "--patch", type=float_in_range(0.05, 1), default=0.375, help="side of the patch as a fraction of the image"
    )
    parser.option("--images", type=int_at_least(1), default=1000, help="number of evaluation images")
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)
    if not options["casm"]:
        parser.error("--casm FILE is missing: give the trained masks to measure")

    from engine.data.datasets import load_data
    from saliency.casm.network import load_casm

    device, precision, device_text = setup_device(options)
    saved = load_casm(options["casm"])
    own = saved.options
    place = {"data_dir": options["data_dir"] or own["data_dir"], "norm": own["norm"]}
    data = load_data(own["dataset"], image_size=saved.image_size, **place)
    print(f"{own['model']}, {own['dataset']}, {data.image_size} pixels, batch {options['batch_size']}, {device_text}")
    result = {}
    if options["steps"]:
        result["training"] = time_training(saved, data, options, device, precision)
        result["sources"] = time_sources(saved, data, options, device, precision)
    result["found"] = measure_localization(saved, data, options, device)
    print(f"\n{'source':18} {'x plain':>9} " + " ".join(f"{title:>11}" for title in COLUMNS.values()))
    for name, row in result["found"].items():
        cost = result.get("sources", {}).get(name, float("nan"))
        print(f"{name:18} {cost:9.3f} " + " ".join(f"{row[key]:11.3f}" for key in COLUMNS))
    return result


def build_train_loader(data, options: dict, device):
    from engine.data.augment import Augmentation
    from engine.data.loader import DeviceLoader

    loader_options = {
        "device": device,
        "mean": data.mean,
        "std": data.std,
        "drop_last": True,
        "workers": options["workers"],
    }
    return DeviceLoader(data.train, options["batch_size"], shuffle=True, augmentation=Augmentation(2), **loader_options)


def time_in_turns(steps: dict, batches, count: int, device) -> dict[str, float]:
    """Return the median over `count` turns of the time of each step relative to the first one, on the same batches."""

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    times, stream = {name: [] for name in steps}, (batch for epoch in range(1000) for batch in batches.epoch(epoch))
    for turn in range(-2, count):
        batch = next(stream)
        for name, step in steps.items():
            begin = clock()
            step(batch.images, batch.labels)
            if turn >= 0:
                times[name].append(clock() - begin)
    plain = next(iter(times.values()))
    ratios = {name: sorted(a / b for a, b in zip(own, plain, strict=True)) for name, own in times.items()}
    print(f"a plain step: {1000 * sorted(plain)[count // 2]:.1f} ms")
    return {name: own[count // 2] for name, own in ratios.items()}


def build_plain_step(network, precision, count: int, mixer=None, source=None):
    """Return an ordinary training step, mixed if there is a mixer, as a function of images and labels."""
    import torch
    from torch.nn import functional as F

    from engine.runtime.device import autocast

    network.train()
    fused = next(network.parameters()).device.type != "mps"
    optimizer = torch.optim.SGD(network.parameters(), 1e-5, momentum=0.9, fused=fused)

    def step(images, labels):
        targets = F.one_hot(labels, count).float()
        optimizer.zero_grad(set_to_none=True)
        if mixer:
            images, targets = mixer(images, targets, source)
        with autocast(images.device, precision):
            logits = network(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def time_training(saved, data, options: dict, device, precision) -> dict[str, float]:
    """Print and return the time of a step of mask training relative to a plain step, for each of SCORERS."""
    from saliency.casm.pool import ClassifierPool
    from saliency.casm.training import StepConfig, build_casm_state, train_step

    settings = {"lr": 1e-5, "lr_casme": 1e-5, "momentum": 0.9, "weight_decay": 1e-4, "precision": precision}
    steps, count = {}, len(data.classes)
    steps["plain"] = build_plain_step(copy_network(saved, device).classifier, precision, count)
    for name, (own, _) in SCORERS.items():
        state = build_casm_state(copy_network(saved, device), ClassifierPool(30, 100, device), **own, **settings)
        state.network.train()
        state.network.classifier.train(state.train_classifier)
        config, turn = StepConfig(own["hp"], lambda_r=10.0, precision=precision), iter(range(10**9))

        def step(images, labels, state=state, config=config, turn=turn):
            train_step(state, images, labels, config, iteration=next(turn))

        steps[name] = step
    ratios = time_in_turns(steps, build_train_loader(data, options, device), options["steps"], device)
    print(f"\n{'masks scored by':28} {'x plain':>9} {'minimum':>7}")
    for name, (_, minimum) in SCORERS.items():
        print(f"{name:28} {ratios[name]:9.3f} {minimum:7.2f}")
    return ratios


def copy_network(saved, device):
    """Return a trainable copy of the network in channels_last format on the device."""
    import copy

    import torch

    return copy.deepcopy(saved.network).requires_grad_(True).to(device, memory_format=torch.channels_last)


def build_named_source(name: str, saved, network, options: dict, device, precision):
    from saliency import build_source

    statistics = {"mean": saved.mean, "std": saved.std}
    given = {"model": network, "casm": options["casm"], "device": device, "precision": precision}
    return build_source(name, **statistics, **given)


def time_sources(saved, data, options: dict, device, precision) -> dict[str, float]:
    """Return the time of a SaliencyMix step with each source relative to a plain step. Every batch is mixed."""
    from mixing import build_mixer

    network, count = copy_network(saved, device).classifier, len(data.classes)
    steps = {"plain": build_plain_step(network, precision, count)}
    for name in SOURCES:
        mixer = build_mixer("saliencymix", mix_prob=1.0)
        source = build_named_source(name, saved, network, options, device, precision)
        steps[name] = build_plain_step(network, precision, count, mixer, source)
    return time_in_turns(steps, build_train_loader(data, options, device), options["steps"], device)


COLUMNS = {  # key -> title
    "inside": "in the box",
    "distance": "off (px)",
    "covered": "covered",
    "mass": "mass inside",
}


def measure_localization(saved, data, options: dict, device) -> dict[str, dict[str, float]]:
    """Return, for each source, the means of four numbers over the evaluation images.

    inside: whether the point lies in the ground-truth box. distance: from the point to the centre of the box in pixels.
    covered: share of the object (its mask, or its box) inside a patch around the point. mass: share of the map inside
    the box.
    """
    import torch
    from torch.nn import functional as F

    from engine.data.annotations import find_boxes
    from engine.data.loader import DeviceLoader
    from mixing.ops import box_mask, center_boxes
    from mixing.saliencymix import find_peaks

    part = data.test.subsample(options["images"])
    truths = find_boxes(part, saved.options["dataset"])
    usable = torch.tensor([index for index, truth in enumerate(truths.per_image) if truth])
    part = part.take(usable)
    boxes = torch.tensor([truths.per_image[index].boxes[0] for index in usable.tolist()])[
        :, [1, 3, 0, 2]
    ]  # y1, y2, x1, x2
    inside_box = box_mask(boxes, data.image_size, data.image_size)[:, 0]
    objects = truths.masks[usable] if truths.masks is not None else inside_box
    network = saved.network.classifier.to(device)
    found = {}
    for name in SOURCES:
        source = build_named_source(name, saved, network, options, device, None)
        torch.manual_seed(0)
        points, maps = [], []
        for batch in DeviceLoader(part, 100, device=device, mean=saved.mean, std=saved.std).epoch():
            predicted = F.one_hot(network(batch.images).argmax(1), len(data.classes)).float()
            saliency = source(batch.images, predicted).detach().float()
            if name == "uniform":
                coordinates = [torch.randint(data.image_size, (len(saliency),)) for _ in range(2)]
            else:
                coordinates = source.points(saliency) or find_peaks(saliency)
            points.append(torch.stack([one.cpu() for one in coordinates], 1))
            maps.append(saliency.cpu())
        points, maps = torch.cat(points), torch.cat(maps)
        lam = torch.tensor(1 - options["patch"] ** 2, dtype=torch.float64)
        patches = box_mask(center_boxes(*points.unbind(1), lam, data.image_size, data.image_size), *maps.shape[1:])[
            :, 0
        ]
        center = (boxes[:, [0, 2]] + boxes[:, [1, 3]] - 1) / 2
        rows, columns = points.unbind(1)
        hit = inside_box[torch.arange(len(points)), rows, columns]
        total = maps.sum((1, 2)).clamp_min(1e-12)
        found[name] = {
            "inside": float(hit.float().mean()),
            "distance": float((points - center).norm(dim=1).mean()),
            "covered": float(((patches & objects).sum((1, 2)) / objects.sum((1, 2))).mean()),
            "mass": float(((maps * inside_box).sum((1, 2)) / total).mean()),
        }
    return found


if __name__ == "__main__":
    run_main(main)
