"""--pretrained: the weights of torchvision and timm, and how images are prepared for them."""

from pathlib import Path
from types import ModuleType

import torch

from engine.config.parser import Parser
from engine.config.resolve import resolve_options
from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from engine.runtime.distributed import main_process_first
from engine.runtime.foreign_weights import load_weights
from engine.runtime.text import format_count


def split_pretrained(value: bool | str) -> tuple[str | None, str | None]:
    """Return the name of the weights and the file that a value of --pretrained holds; None where it holds none."""
    if value is True:
        return None, None
    return (None, value) if Path(value).is_file() else (value, None)


def resolve_pretrained(parser: Parser, typed: dict, config: dict, models: ModuleType) -> dict:
    """Return resolve_options(); with --pretrained, the options of the images are those of its weights.

    They replace defaults and those of recipes, but neither typed ones nor those of `config`, the file of --config.
    models: the package `models`.
    """
    options = resolve_options(parser, typed, config)
    if not options["pretrained"]:
        return options
    with parser.usage_errors(f"--pretrained {options['model']}"):
        weights, _ = split_pretrained(options["pretrained"])
        inputs = models.get_input_settings(*models.find_pretrained(options["model"], weights))
        images = {"norm": find_norm(inputs.mean, inputs.std)} if "norm" not in typed else {}
    images |= {"image_size": inputs.size, "interpolation": inputs.interpolation}
    if "crop_size" in options:
        images["eval_resize"] = inputs.resize
    return resolve_options(parser, typed, images | config)


def find_norm(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Return the value of --norm for this mean and std. Raises ValueError if there is none."""
    for name, known in STATISTICS.items():
        if torch.allclose(torch.tensor(known), torch.tensor([mean, std]), atol=5e-4):
            return name
    raise ValueError(f"no --norm has its mean {mean} and std {std}; choose one")


def load_pretrained_weights(network: torch.nn.Module, options: dict, num_classes: int, models: ModuleType) -> str:
    """Load the weights of --pretrained into the network, and return a note about them.

    The last layer keeps its random weights if the number of classes differs. options: of the run. models: the package
    `models`. Raises UserError if the weights cannot be had or do not fit.
    """
    weights, file = split_pretrained(options["pretrained"])
    state = SavedClassifier(file).weights if file else None
    shape = {"image_size": options["image_size"], "model_args": options["model_args"]}
    try:
        name = models.find_pretrained(options["model"], weights)
        state, url = main_process_first(lambda: models.fetch_weights(*name, state=state, **shape))
    except ValueError as error:
        raise UserError(f"--pretrained {options['model']}: {error}, or give a copy as --pretrained FILE") from error
    layers = {"num_classes": num_classes, "heads": models.find_heads(network)}
    new = load_weights(network, state, Path(file or url), new_head=True, name=options["model"], **layers)
    head = f", the last layer is new for {format_count(num_classes, 'class')}" if new else ""
    images = f"images of {options['image_size']} pixels, {options['interpolation']}, --norm {options['norm']}"
    return f"--pretrained: weights of {file or url}{head}; {images}"
