"""Measure the speed of the input pipeline: python benchmarks/input.py --data_dir DIR --workers 2 --crop_size 128

Prints the images per second from image files to normalised batches on the device, with random resized crops and flips,
and the same for torchvision's transforms in a DataLoader: same files, batch size, crop size and number of workers, in
turns. DIR contains one folder per class, or train/ with these. The first epoch of each is not counted, because workers
start and files are cached in it. --auto_augment and --random_erasing add these to both, and a third pipeline without
them. --tensor SIDE reads random images of SIDE pixels from a tensor, as CIFAR is read, without torchvision's pipeline.
"""

import time
from pathlib import Path

from common import read_options, synchronize

from engine.config.option_types import boolean, choice, float_in_range, int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.launch import run_main

JITTER, LIGHTING = 0.4, 0.1


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option("--data_dir", default="data", metavar="DIR", help="folder of the images")
    parser.option("--batch_size", type=int_at_least(1), default=128, help="images per batch")
    parser.option("--crop_size", type=int_at_least(8), default=128, help="side of the crops in pixels")
    parser.option(
        "--min_scale", type=float_in_range(0, 1), default=0.08, help="minimum area of a crop as a fraction of the image"
    )
    parser.option(
        "--images", type=int_at_least(1), default=1000, help="images per epoch; files are repeated if there are fewer"
    )
    parser.option("--epochs", type=int_at_least(1), default=3, help="timed epochs of each pipeline")
    parser.option("--auto_augment", type=choice(["none", "rand", "trivial"]), default="none", help="policy")
    parser.option("--random_erasing", type=float_in_range(0, 1), default=0.0, help="probability of erasing")
    parser.option("--tensor", type=int_at_least(8), metavar="SIDE", help="read images of SIDE pixels from a tensor")
    parser.option("--colour", type=boolean, default=False, help="add colour jitter 0.4 and PCA lighting 0.1")
    add_device_options(parser)
    parser.defaults["workers"] = 2
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch

    from engine.data.folders import find_class_folders
    from engine.data.image_set import ImageSet, spread_over_classes
    from engine.runtime.device import choose_device, setup_backends

    device = choose_device(options["device"])
    setup_backends(device, seed=0, deterministic=False)
    pipelines, changed = {}, {**options, "auto_augment": "none", "random_erasing": 0.0} != options
    if side := options["tensor"]:
        place, index = f"a tensor, {side} pixels", torch.arange(options["images"])
        pixels = torch.randint(0, 256, (len(index), side, side, 3), dtype=torch.uint8)
        data_files = ImageSet(pixels, index % 10, list("abcdefghij"), "noise")
    else:
        place = Path(options["data_dir"])
        data_files = find_class_folders(place / "train" if (place / "train").is_dir() else place)
        index = spread_over_classes(data_files.labels, options["images"])
        index = index[torch.arange(options["images"]) % len(index)]
        data_files = data_files._replace(files=data_files.files[index], labels=data_files.labels[index])
        pipelines["torchvision"] = build_torchvision_pipeline(data_files, options, device)
    print(
        f"{len(index):,} images in {place}, crop {options['crop_size']}, batch {options['batch_size']}, "
        f"{options['workers']} workers, {device}, torch {torch.__version__}"
    )
    pipelines = {"ours": build_our_pipeline(data_files, options, device), **pipelines}
    if changed:
        plain = {**options, "auto_augment": "none", "random_erasing": 0.0}
        pipelines["plain"] = build_our_pipeline(data_files, plain, device)
    seconds = {name: [] for name in pipelines}
    for epoch in range(options["epochs"] + 1):
        for name, start_epoch in pipelines.items():
            begin = time.perf_counter()
            count = sum(len(images) for images in start_epoch(epoch))
            synchronize(device)
            if epoch:
                seconds[name].append((time.perf_counter() - begin) / count)
    rates = {name: 1 / sorted(values)[len(values) // 2] for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<12} {rate:8.0f} images/s   (epochs: {' '.join(f'{1 / value:.0f}' for value in seconds[name])})")
    for name in rates.keys() - {"ours"}:
        print(f"ours / {name}: {rates['ours'] / rates[name]:.2f}")
    return rates


def build_our_pipeline(data_files, options: dict, device):
    """Return a function of the epoch that yields its normalised batches on the device."""
    from engine.data.augment import Augmentation, AutoAugment
    from engine.data.image_files import ImageFiles
    from engine.data.image_set import STATISTICS, ImageSet
    from engine.data.loader import DeviceLoader
    from engine.data.views import RandomCrop

    mean, std = STATISTICS["imagenet"]
    view = RandomCrop(options["crop_size"], options["min_scale"])
    colours = {"color_jitter": JITTER, "lighting": LIGHTING} if options["colour"] else {}
    auto = AutoAugment(options["auto_augment"], std=0.5) if options["auto_augment"] != "none" else None
    changes = {**colours, "auto": auto, "erasing": options["random_erasing"]}
    image_set = data_files
    if not options["tensor"]:
        files = ImageFiles(data_files.files, view)
        image_set = ImageSet(files, data_files.labels, data_files.classes, str(data_files.root))
    batches = DeviceLoader(
        image_set,
        options["batch_size"],
        device=device,
        mean=mean,
        std=std,
        shuffle=True,
        augmentation=Augmentation(view=view, **changes),
        workers=options["workers"],
    )
    return lambda epoch: (batch.images for batch in batches.epoch(epoch))


def build_torchvision_pipeline(data_files, options: dict, device):
    """Return the same for torchvision's transforms in a DataLoader."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    from engine.data.image_set import STATISTICS

    steps = [
        transforms.RandomResizedCrop(options["crop_size"], (options["min_scale"], 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    if options["colour"]:
        steps += [transforms.ColorJitter(JITTER, JITTER, JITTER), transforms.Lambda(add_lighting)]
    if options["auto_augment"] != "none":
        policies = {"rand": transforms.RandAugment(2, 27), "trivial": transforms.TrivialAugmentWide()}
        steps.insert(2, policies[options["auto_augment"]])
    steps += [transforms.Normalize(*STATISTICS["imagenet"])]
    transform = transforms.Compose([*steps, transforms.RandomErasing(options["random_erasing"], value="random")])

    class TransformDataset(Dataset):  # an ImageFolder of the same list of files
        def __len__(self):
            return len(data_files.labels)

        def __getitem__(self, index):
            return transform(default_loader(data_files.files[index])), int(data_files.labels[index])

    loader = DataLoader(
        TransformDataset(),
        options["batch_size"],
        shuffle=True,
        num_workers=options["workers"],
        persistent_workers=options["workers"] > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=lambda worker: torch.set_num_threads(1),
    )
    return lambda epoch: (images.to(device, non_blocking=True) for images, _ in loader)


def add_lighting(image):
    """Add PCA lighting to an image (3, H, W), as in the published ImageNet code."""
    import torch

    from engine.data.augment import EIGENVALUES, EIGENVECTORS

    strength = torch.randn(3) * LIGHTING
    shift = torch.tensor(EIGENVECTORS) @ (strength * torch.tensor(EIGENVALUES))
    return image + shift.view(3, 1, 1)


if __name__ == "__main__":
    run_main(main)
