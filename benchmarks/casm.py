"""What trained masks cost and find: python benchmarks/casm.py --casm casms/l100.chk

Two tables. A step of training the masks over a plain step of the same classifier, by who judges, beside the bound that
the network passes alone set; then every source of saliency: what a step of SaliencyMix costs with it, over a plain one,
and how well its point and its map find the object, on the true masks of shapes or the true boxes of Tiny-ImageNet. All
steps are timed in turns, in one process.
"""

import time

from common import read_options, setup_device, wait_for

from engine.config.option_types import float_in_range, int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.launch import run_main

SOURCES = ["uniform", "fine_grained", "spectral_residual", "gradient", "cam", "casm"]
JUDGES = {  # name -> options of the step, and its bound in plain steps: forward, pixels, weights are a third each
    "fixed classifier (F)": ({"fixed_classifier": True, "hp": 0.0}, 3 / 3),
    "the classifier itself (L)": ({"fixed_classifier": False, "hp": 0.0}, 7 / 3),
    "a past classifier": ({"fixed_classifier": False, "hp": 1.0}, 5 / 3),
    "either, by turns (L100)": ({"fixed_classifier": False, "hp": 0.5}, 6 / 3),
}


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("what")
    parser.option("--casm", metavar="FILE", help="made by python -m saliency.casm train; its data and network are used")
    parser.option("--data_dir", help="where its data lie [as it was trained]")
    parser.option("--batch_size", type=int_at_least(2), default=100)
    parser.option("--steps", type=int_at_least(), default=20, help="steps timed of each; 0: only what is found")
    parser.option("--patch", type=float_in_range(0.05, 1), default=0.375, help="side of the patch, of the image's")
    parser.option("--images", type=int_at_least(1), default=1000, help="evaluation images looked at")
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)
    if not options["casm"]:
        parser.error("--casm FILE: which masks?")

    from engine.data.datasets import load_data
    from saliency.casm.network import load_casm

    device, precision, where = setup_device(options)
    saved = load_casm(options["casm"])
    own = saved.options
    place = {"data_dir": options["data_dir"] or own["data_dir"], "norm": own["norm"]}
    data = load_data(own["dataset"], image_size=saved.image_size, **place)
    print(f"{own['model']}, {own['dataset']}, {data.image_size} pixels, batch {options['batch_size']}, {where}")
    result = {}
    if options["steps"]:
        result["training"] = time_training(saved, data, options, device, precision)
        result["sources"] = time_sources(saved, data, options, device, precision)
    result["found"] = what_is_found(saved, data, options, device)
    print(f"\n{'source':18} {'x vanilla':>9} " + " ".join(f"{title:>11}" for title in FOUND.values()))
    for name, row in result["found"].items():
        cost = result.get("sources", {}).get(name, float("nan"))
        print(f"{name:18} {cost:9.3f} " + " ".join(f"{row[key]:11.3f}" for key in FOUND))
    return result


def train_batches(data, options: dict, device):
    from engine.data.augment import Augmentation
    from engine.data.loader import DeviceLoader

    feed = {"device": device, "mean": data.mean, "std": data.std, "drop_last": True, "workers": options["workers"]}
    return DeviceLoader(data.train, options["batch_size"], shuffle=True, augmentation=Augmentation(2), **feed)


def in_turns(steps: dict, batches, count: int, device) -> dict[str, float]:
    """Median over `count` turns of the time of each step over that of the first one, all on the same batch."""

    def clock() -> float:
        wait_for(device)
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


def plain_step(network, precision, count: int, mixer=None, source=None):
    """A step of ordinary training, mixed if there is a mixer, as a function of images and labels."""
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
    from saliency.casm.pool import ClassifierPool
    from saliency.casm.training import StepConfig, build_casm_state, train_step

    settings = {"lr": 1e-5, "lr_casme": 1e-5, "momentum": 0.9, "weight_decay": 1e-4, "precision": precision}
    steps, count = {}, len(data.classes)
    steps["plain"] = plain_step(fresh(saved, device).classifier, precision, count)
    for name, (own, _) in JUDGES.items():
        state = build_casm_state(fresh(saved, device), ClassifierPool(30, 100, device), **own, **settings)
        state.network.train()
        state.network.classifier.train(state.train_classifier)
        config, turn = StepConfig(own["hp"], lambda_r=10.0, precision=precision), iter(range(10**9))

        def step(images, labels, state=state, config=config, turn=turn):
            train_step(state, images, labels, config, iteration=next(turn))

        steps[name] = step
    ratios = in_turns(steps, train_batches(data, options, device), options["steps"], device)
    print(f"\n{'judge of the masks':28} {'x plain':>9} {'bound':>6}")
    for name, (_, bound) in JUDGES.items():
        print(f"{name:28} {ratios[name]:9.3f} {bound:6.2f}")
    return ratios


def fresh(saved, device):
    import copy

    import torch

    return copy.deepcopy(saved.network).requires_grad_(True).to(device, memory_format=torch.channels_last)


def source_of(name: str, saved, network, options: dict, device, precision):
    from saliency import build_source

    statistics = {"mean": saved.mean, "std": saved.std}
    given = {"model": network, "casm": options["casm"], "device": device, "precision": precision}
    return build_source(name, **statistics, **given)


def time_sources(saved, data, options: dict, device, precision) -> dict[str, float]:
    """What SaliencyMix costs with each source, every batch mixed, over a plain step."""
    from mixing import build_mixer

    network, count = fresh(saved, device).classifier, len(data.classes)
    steps = {"plain": plain_step(network, precision, count)}
    for name in SOURCES:
        mixer = build_mixer("saliencymix", mix_prob=1.0)
        source = source_of(name, saved, network, options, device, precision)
        steps[name] = plain_step(network, precision, count, mixer, source)
    return in_turns(steps, train_batches(data, options, device), options["steps"], device)


FOUND = {  # key -> title
    "inside": "in the box",
    "distance": "off (px)",
    "covered": "covered",
    "mass": "mass inside",
}


def what_is_found(saved, data, options: dict, device) -> dict[str, dict[str, float]]:
    """Of the evaluation images: whether the point lies in a true box, its distance from the middle of the box, the
    share of the object that a patch around it covers (of the true mask, or of the box), and the share of the map's
    mass inside the box.
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
        source = source_of(name, saved, network, options, device, None)
        torch.manual_seed(0)
        points, maps = [], []
        for batch in DeviceLoader(part, 100, device=device, mean=saved.mean, std=saved.std).epoch():
            predicted = F.one_hot(network(batch.images).argmax(1), len(data.classes)).float()
            saliency = source(batch.images, predicted).detach().float()
            if name == "uniform":
                where = [torch.randint(data.image_size, (len(saliency),)) for _ in range(2)]
            else:
                where = source.points(saliency) or find_peaks(saliency)
            points.append(torch.stack([one.cpu() for one in where], 1))
            maps.append(saliency.cpu())
        points, maps = torch.cat(points), torch.cat(maps)
        lam = torch.tensor(1 - options["patch"] ** 2, dtype=torch.float64)
        patches = box_mask(center_boxes(*points.unbind(1), lam, data.image_size, data.image_size), *maps.shape[1:])[
            :, 0
        ]
        middle = (boxes[:, [0, 2]] + boxes[:, [1, 3]] - 1) / 2
        rows, columns = points.unbind(1)
        hit = inside_box[torch.arange(len(points)), rows, columns]
        total = maps.sum((1, 2)).clamp_min(1e-12)
        found[name] = {
            "inside": float(hit.float().mean()),
            "distance": float((points - middle).norm(dim=1).mean()),
            "covered": float(((patches & objects).sum((1, 2)) / objects.sum((1, 2))).mean()),
            "mass": float(((maps * inside_box).sum((1, 2)) / total).mean()),
        }
    return found


if __name__ == "__main__":
    run_main(main)
