"""Write a method as one file that imports torch alone: python -m mixing.export puzzlemix > puzzlemix.py"""

import argparse
import difflib
import os
import sys
from importlib import import_module
from pathlib import Path

from .. import ALIASES, MIXERS, hyper_parameters, mixer_class
from .bundle import Bundle
from .modules import read_module
from .text import order_modules, write_body

PREFIX = __package__.removesuffix("mixing.export")  # of the package that pip installs; empty in the repository
saliency = import_module(f"{PREFIX}saliency")
METHODS = [name for name in MIXERS if name != "none"]
SOURCES = ("gradient", "fine_grained", "spectral_residual", "spectral_residual_full", "float_bytes", "uniform")
OBSTACLES = {  # why the others cannot be written
    "bank": "it learns in every training step, from more than a call; install this package to use it",
    "casm": "it needs a trained mask network of python -m saliency.casm",
}
CAM_OBSTACLE = "it looks for a layer in any network, which takes many more functions; install this package to use it"
FIRST_LINE = "# SPDX-License-Identifier: MIT"  # of each file that is written; MARK is in its head
MARK = "\nWritten by `python -m mixing.export "


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        text = list_methods() if options.list else choose_file(options.name, options.source, options.output)
        if options.output and not options.list:
            save(Path(options.output), text)
    except ValueError as error:
        parser.error(str(error))
    if options.list or not options.output:
        print_text(text)


def choose_file(method: str | None, source: str | None, output: str | None) -> str:
    """Return the file for these options. Raises ValueError for what cannot be written."""
    if method is None:
        raise ValueError("name a method, or --list them")
    method = find_name(method, METHODS, ALIASES, "method")
    if output and Path(output).is_dir():
        raise ValueError(f"--output {output}: this is a folder; name a file in it")
    stem = Path(output).stem if output else method
    if not stem.isidentifier():
        raise ValueError(f"--output {output}: Python cannot import {stem!r}; use letters, digits and _ only")
    return write_file(method, choose_source(method, source), stem)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__.split(":")[0] + ".")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"method: {', '.join(METHODS)}")
    parser.add_argument(
        "--source", metavar="NAME", help=f"saliency source: {', '.join(SOURCES)} (default: that of the method's paper)"
    )
    parser.add_argument("--output", "-o", metavar="FILE", help="file to write (default: the standard output)")
    parser.add_argument("--list", action="store_true", help="list the methods, their sources and what they do")
    return parser


def find_name(name: str, names: list[str] | tuple[str, ...], aliases: dict[str, str], kind: str) -> str:
    """Return the name that `name` stands for. Raises ValueError with the closest one for an unknown name."""
    if (found := aliases.get(name, name)) in names:
        return found
    closest = difflib.get_close_matches(name.lower(), [*names, *aliases], 1)
    hint = f"did you mean {closest[0]}?" if closest else f"choose from {', '.join(names)}"
    raise ValueError(f"unknown {kind} {name!r}: {hint}")


def choose_source(method: str, name: str | None) -> str | None:
    """Return the source to write with a method, or None. Raises ValueError if it cannot be written."""
    default = mixer_class(method).default_source
    if default is None:
        if name:
            raise ValueError(f"--source {name}: {method} needs no saliency; leave the option out")
        return None
    wanted = name or default
    if wanted in saliency.SOURCES and wanted not in SOURCES:
        subject = f"--source {name}" if name else f"{default}, the source of {method},"
        why, remedy = OBSTACLES.get(wanted, CAM_OBSTACLE), f"choose --source from {', '.join(SOURCES)}"
        raise ValueError(f"{subject} cannot be written as one file: {why}; {remedy}")
    return find_name(wanted, SOURCES, saliency.ALIASES, "source")


def list_methods() -> str:
    """Return a table of the methods: name, source of saliency, what it does."""
    lines = [f"{'method':12} {'source':22} what it does"]
    for name in METHODS:
        cls = mixer_class(name)
        title = read_module(get_parts(cls)).list_paragraphs()[0].partition(": ")[2].removesuffix(".")
        lines.append(f"{name:12} {cls.default_source or '-':22} {title}")
    return "\n".join(lines) + "\n"


def get_parts(cls: type) -> tuple[str, ...]:
    return tuple(cls.__module__.removeprefix(PREFIX).split("."))


def write_file(method: str, source: str | None, stem: str) -> str:
    """Return the file of a method and its source of saliency, if any. stem: name of the file, for the usage."""
    classes = [mixer_class(method)] + ([saliency.source_class(source)] if source else [])
    usage = write_usage(method, source, classes)
    bundle = Bundle([(get_parts(cls), cls.__name__) for cls in classes], usage)
    order = []
    for cls in classes:
        order_modules(get_parts(cls), order)
    own = get_parts(classes[0])
    order = [parts for parts in order if parts != own] + [own]
    return write_head(method, source, classes, stem, usage) + write_body(bundle, order, own)


def write_head(method: str, source: str | None, classes: list[type], stem: str, usage: str) -> str:
    """Return the head of a file: the licence, and as its docstring the paper, the command and the usage."""
    command = f"python -m mixing.export {method}"
    if source != classes[0].default_source:
        command += f" --source {source}"
    text = "\n\n".join(read_module(get_parts(classes[0])).list_paragraphs())
    names = ", ".join(sorted(cls.__name__ for cls in classes))
    lines = [
        FIRST_LINE,
        "# Copyright (c) 2026 the authors of saliency-mixing. Please cite the paper if you use the method.",
        f'"""{text}',
        "",
        f"Written by `{command}` of saliency-mixing {find_version()}.",
        "This file needs torch alone.",
        "",
        "Usage:",
        "",
        *(f"    {line}".rstrip() for line in ["import torch.nn.functional as F", f"from {stem} import {names}", ""]),
        *(f"    {line}".rstrip() for line in usage.splitlines()),
        '"""',
    ]
    return "\n".join(lines) + "\n\n"


def find_version() -> str:
    return import_module(PREFIX.removesuffix(".") or "package.saliency_mixing").__version__


def write_usage(method: str, source: str | None, classes: list[type]) -> str:
    """Return a training loop with the method."""
    mixer, has_stages = classes[0], classes[0].mixes_hidden
    normalisation = "mean=mean, std=std" if "mean" in hyper_parameters(method) else ""
    arguments = {"gradient": "model, **mixer.gradient_options", "uniform": ""}.get(source, "mean, std")
    note = "  # the normalisation of the images, one number per channel"
    lines = [f"mixer = {mixer.__name__}({normalisation}){note if normalisation else ''}"]
    if source:
        lines += [f"source = {classes[1].__name__}({arguments}){note if arguments == 'mean, std' else ''}"]
    if has_stages:
        lines += ['model.stages = ("layer1", "layer2")  # the first stages of the network, here a ResNet']
    step = [
        "for images, labels in loader:  # normalised floats (B, C, H, W) and class indices (B,)",
        "    optimizer.zero_grad()" + ("  # before the mixer, which may add to .grad" if source == "gradient" else ""),
        f"    mixed, targets = mixer(images, F.one_hot(labels, num_classes).float(){', source' if source else ''})",
    ]
    forward = ["    loss = mixer.mixed_weight * F.cross_entropy(model(mixed), targets)", "    loss.backward()"]
    if has_stages:
        forward = ["    with mixer.during(model):", *(f"    {line}" for line in forward)]
    after = ["    optimizer.step()"]
    if mixer.wants_mixed_grad:
        step += ["    mixed.requires_grad_()"]
        after += ["    mixer.after_backward(mixed.grad)"]
    step += [*forward, *after]
    if "start_epoch" in vars(mixer):
        step = [
            "for epoch in range(epochs):",
            "    mixer.start_epoch(epoch, epochs, len(loader))",
            *(f"    {line}" for line in step),
        ]
    return "\n".join([*lines, *step])


def save(path: Path, text: str) -> None:
    """Write a file. Raises ValueError if that is impossible, or if there is one that this command did not write."""
    try:
        if path.exists():
            head = path.read_text(encoding="utf-8", errors="replace").partition("\nUsage:\n")[0]
            if not head.startswith(FIRST_LINE) or MARK not in head:
                raise ValueError(
                    f"--output {path}: this file exists and was not written by this command; choose another name"
                )
        path.write_text(text, encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"--output {path}: there is no folder {path.parent}; make it first") from None
    except OSError as error:
        raise ValueError(f"--output {path}: {error.strerror}; choose another place") from None


def print_text(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has exited, as in `| head`; Python would report it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
