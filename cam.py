"""Show where classifiers look: python cam.py --image_path photo.jpg --model_path runs/cifar10/resnet20/my_run"""

from engine.config.select import select_kwargs
from engine.errors import UserError
from engine.launch import run_main
from explanation.options import build_parser, check_options, check_outputs, is_png


def main(argv: list[str] | None = None) -> list[dict]:
    """Explain pictures by heatmaps; returns for each heatmap what is printed of it."""
    # ---- Options ----
    parser = build_parser()
    options = check_options(parser, parser.read(argv))

    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from explanation.explainer import load_classifiers, make_cam_explainer, make_casm_explainer, print_layers
    from explanation.images import chunk, find_images, iter_images, unique_stems
    from explanation.overlay import OverlaySettings, draw_figure, save_overlays, show_images

    options["device"] = choose_device(options["device"])
    options["precision"], _ = choose_precision(options["amp"], options["device"])
    setup_backends(options["device"], seed=0, deterministic=False)

    # ---- Pictures ----
    if not options["list_layers"]:
        files = find_images(options["image_path"])
        check_outputs(files, output=options["output"], figure=options["figure"])

    # ---- Classifiers ----
    classifiers = []
    if options["method"] or options["list_layers"]:
        classifiers = load_classifiers(**select_kwargs(options, load_classifiers))
    if options["list_layers"]:
        return [print_layers(one, options["image_size"]) for one in classifiers]

    # ---- Explainers ----
    explainers = [make_cam_explainer(one, **select_kwargs(options, make_cam_explainer)) for one in classifiers]
    if options["casm"]:
        explainers.append(make_casm_explainer(**select_kwargs(options, make_casm_explainer)))
    count = len(files) * sum(len(one.methods) * len(one.targets) for one in explainers)
    if is_png(options["output"]) and count > 1:
        message = "there are several pictures; name a folder, or --figure FILE.png"
        raise UserError(f"--output {options['output']}: {message}")

    # ---- Explain, draw, save ----
    settings = OverlaySettings(**select_kwargs(options, OverlaySettings))
    stems, drawn = dict(zip(files, unique_stems(files), strict=True)), []
    for group in chunk(iter_images(files, options["on_bad_image"])):
        # every classifier is asked before anything is drawn, so that one that fails leaves no files behind
        explained = [explainer.explain([picture for _, picture in group]) for explainer in explainers]
        for (file, picture), *parts in zip(group, *explained, strict=True):
            drawn.append(save_overlays(file, picture, sum(parts, []), stems[file], settings))
    if not drawn:
        raise UserError(f"none of the {len(files)} pictures can be read")
    rows = [row for picture in drawn for row in picture.rows]

    # ---- Figure and windows ----
    if options["figure"]:
        draw_figure(options["figure"], drawn)
    if options["show"]:
        show_images([options["figure"]] if options["figure"] else [row["output"] for row in rows])
    return rows


if __name__ == "__main__":
    run_main(main)
