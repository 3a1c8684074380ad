"""Images a second from folders to the device: python benchmarks/input.py --data_dir DIR --workers 2 --crop_size 128

Reading, random resized crop, flip and normalisation of training images, with torchvision's usual pipeline beside it:
the same files, batch, crop and number of workers, the two taking turns. DIR holds a folder for each class, or train/
with these; the first epoch of each, in which workers start and files come into memory, is not counted.
"""

import time
from pathlib import Path

from common import read_options, wait_for

from engine.config.option_types import boolean, float_in_range, int_at_least
from engine.config.options import add_device_options
from engine.config.parser import Parser
from engine.launch import run_main

JITTER, LIGHTING = 0.4, 0.1


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("what")
    parser.option("--data_dir", default="data", metavar="DIR")
    parser.option("--batch_size", type=int_at_least(1), default=128)
    parser.option("--crop_size", type=int_at_least(8), default=128)
    parser.option("--min_scale", type=float_in_range(0, 1), default=0.08)
    parser.option(
        "--images", type=int_at_least(1), default=1000, help="images of an epoch; files are repeated if too few"
    )
    parser.option("--epochs", type=int_at_least(1), default=3, help="epochs timed, of each pipeline")
    parser.option("--colour", type=boolean, default=False, help="with colour jitter 0.4 and PCA lighting 0.1")
    add_device_options(parser)
    parser.defaults["workers"] = 2
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)

    import torch

    from engine.data.folders import label_files, list_class_folders
    from engine.runtime.device import choose_device, setup_backends

    device = choose_device(options["device"])
    setup_backends(device, seed=0, deterministic=False)
    place = Path(options["data_dir"])
    found = label_files(list_class_folders(place / "train" if (place / "train").is_dir() else place), place)
    index = torch.arange(options["images"]) % len(found.labels)
    found = found._replace(files=found.files[index], labels=found.labels[index])
    print(
        f"{len(index):,} images below {place}, crop {options['crop_size']}, batch {options['batch_size']}, "
        f"{options['workers']} workers, {device}, torch {torch.__version__}"
    )
    pipelines = {"ours": our_batches(found, options, device), "torchvision": usual_batches(found, options, device)}
    seconds = {name: [] for name in pipelines}
    for epoch in range(options["epochs"] + 1):
        for name, epoch_of in pipelines.items():
            begin = time.perf_counter()
            count = sum(len(images) for images in epoch_of(epoch))
            wait_for(device)
            if epoch:
                seconds[name].append((time.perf_counter() - begin) / count)
    rates = {name: 1 / sorted(values)[len(values) // 2] for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<12} {rate:8.0f} images/s   (epochs: {' '.join(f'{1 / value:.0f}' for value in seconds[name])})")
    print(f"ratio {rates['ours'] / rates['torchvision']:.2f}")
    return rates


def our_batches(found, options: dict, device):
    """A function that gives the normalised images of an epoch, batch by batch on the device."""
    from engine.data.augment import Augmentation
    from engine.data.image_files import ImageFiles
    from engine.data.image_set import STATISTICS, ImageSet
    from engine.data.loader import DeviceLoader
    from engine.data.views import RandomCrop

    mean, std = STATISTICS["imagenet"]
    view = RandomCrop(options["crop_size"], options["min_scale"])
    colours = {"color_jitter": JITTER, "lighting": LIGHTING} if options["colour"] else {}
    batches = DeviceLoader(
        ImageSet(ImageFiles(found.files, view), found.labels, found.classes, str(found.root)),
        options["batch_size"],
        device=device,
        mean=mean,
        std=std,
        shuffle=True,
        augmentation=Augmentation(view=view, **colours),
        workers=options["workers"],
    )
    return lambda epoch: (batch.images for batch in batches.epoch(epoch))


def usual_batches(found, options: dict, device):
    """The same by torchvision's transforms, image by image in a DataLoader."""
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
        steps += [transforms.ColorJitter(JITTER, JITTER, JITTER), transforms.Lambda(lit)]
    transform = transforms.Compose([*steps, transforms.Normalize(*STATISTICS["imagenet"])])

    class Usual(Dataset):  # ImageFolder, on the very same list
        def __len__(self):
            return len(found.labels)

        def __getitem__(self, index):
            return transform(default_loader(found.files[index])), int(found.labels[index])

    loader = DataLoader(
        Usual(),
        options["batch_size"],
        shuffle=True,
        num_workers=options["workers"],
        persistent_workers=options["workers"] > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=lambda worker: torch.set_num_threads(1),
    )
    return lambda epoch: (images.to(device, non_blocking=True) for images, _ in loader)


def lit(image):
    """PCA lighting of one image (3, H, W), as the published code has it."""
    import torch

    from engine.data.augment import EIGENVALUES, EIGENVECTORS

    strength = torch.randn(3) * LIGHTING
    shift = torch.tensor(EIGENVECTORS) @ (strength * torch.tensor(EIGENVALUES))
    return image + shift.view(3, 1, 1)


if __name__ == "__main__":
    run_main(main)
