"""Show where classifiers look: python cam.py --image_path photo.jpg --model_path runs/cifar10/resnet20/my_run"""

import explanation
from engine import runtime
from engine.config.select import select_kwargs
from engine.errors import UserError
from engine.launch import run_main
from explanation.options import build_parser, check_options, check_outputs, is_png


def main(argv: list[str] | None = None) -> list[dict]:
    """Explain pictures by heatmaps; returns for each heatmap what is printed of it."""
    # ---- Options ----
    parser = build_parser()
    options = check_options(parser, parser.read(argv))
    options["device"] = runtime.choose_device(options["device"])
    options["precision"], _ = runtime.choose_precision(options["amp"], options["device"])
    runtime.setup_backends(options["device"], seed=0, deterministic=False)

    # ---- Pictures ----
    if not options["list_layers"]:
        files = explanation.find_images(options["image_path"])
        check_outputs(files, output=options["output"], figure=options["figure"])

    # ---- Classifiers ----
    classifiers = []
    if options["method"] or options["list_layers"]:
        classifiers = explanation.load_classifiers(**select_kwargs(options, explanation.load_classifiers))
    if options["list_layers"]:
        return [explanation.print_layers(one, options["image_size"]) for one in classifiers]

    # ---- Explainers ----
    chosen = select_kwargs(options, explanation.make_cam_explainer)
    explainers = [explanation.make_cam_explainer(one, **chosen) for one in classifiers]
    if options["casm"]:
        explainers.append(explanation.make_casm_explainer(**select_kwargs(options, explanation.make_casm_explainer)))
    count = len(files) * sum(len(one.methods) * len(one.targets) for one in explainers)
    if is_png(options["output"]) and count > 1:
        message = "there are several pictures; name a folder, or --figure FILE.png"
        raise UserError(f"--output {options['output']}: {message}")

    # ---- Explain, draw, save ----
    settings = explanation.OverlaySettings(**select_kwargs(options, explanation.OverlaySettings))
    stems, drawn = dict(zip(files, explanation.unique_stems(files), strict=True)), []
    for group in explanation.chunk(explanation.iter_images(files, options["on_bad_image"])):
        # every classifier is asked before anything is drawn, so that one that fails leaves no files behind
        explained = [explainer.explain([picture for _, picture in group]) for explainer in explainers]
        for (file, picture), *parts in zip(group, *explained, strict=True):
            drawn.append(explanation.save_overlays(file, picture, sum(parts, []), stems[file], settings))
    if not drawn:
        raise UserError(f"none of the {len(files)} pictures can be read")
    rows = [row for picture in drawn for row in picture.rows]

    # ---- Figure and windows ----
    if options["figure"]:
        explanation.draw_figure(options["figure"], drawn)
    if options["show"]:
        explanation.show_images([options["figure"]] if options["figure"] else [row["output"] for row in rows])
    return rows


if __name__ == "__main__":
    run_main(main)
