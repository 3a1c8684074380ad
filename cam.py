"""Draw class activation maps of classifiers: cam.py --image_path photo.jpg --model_path runs/cifar10/resnet20/my_run"""

import explanation
from engine import data, runtime
from engine.config.select import select_kwargs
from engine.errors import UserError
from engine.launch import run_main
from engine.runtime.text import format_count
from explanation.options import build_parser, check_options, check_outputs, is_png


def main(argv: list[str] | None = None) -> list[dict]:
    """Draw and save the maps. Returns a dict per map with its image, classifier, method, classes and file."""
    # ---- Options ----
    parser = build_parser()
    options = check_options(parser, parser.read(argv))
    options["device"] = runtime.choose_device(options["device"])
    options["precision"], _ = runtime.choose_precision(options["amp"], options["device"])
    runtime.setup_backends(options["device"], seed=0, deterministic=False)

    # ---- Images ----
    if not options["list_layers"]:
        files = data.find_images(options["image_path"], "--image_path")
        check_outputs(files, output=options["output"], figure=options["figure"])

    # ---- Classifiers ----
    classifiers = []
    if options["method"] != [] or options["list_layers"]:
        classifiers = explanation.load_classifiers(**select_kwargs(options, explanation.load_classifiers))
    if options["list_layers"]:
        return [explanation.print_layers(classifier, options["image_size"]) for classifier in classifiers]

    # ---- Explainers ----
    settings = select_kwargs(options, explanation.make_cam_explainer)
    explainers = [explanation.make_cam_explainer(classifier, **settings) for classifier in classifiers]
    if options["casm"]:
        explainers.append(explanation.make_casm_explainer(**select_kwargs(options, explanation.make_casm_explainer)))
    count = len(files) * sum(len(explainer.methods) * len(explainer.targets) for explainer in explainers)
    if is_png(options["output"]) and count > 1:
        message = f"{count} maps need a folder\ngive one, or combine all maps with --figure FILE.png"
        raise UserError(f"--output {options['output']}: {message}")

    # ---- Explain, draw, save ----
    overlay = explanation.OverlaySettings(**select_kwargs(options, explanation.OverlaySettings))
    stems, drawn = dict(zip(files, data.unique_stems(files), strict=True)), []
    for group in data.chunk(data.iter_images(files, options["on_bad_image"])):
        # all classifiers run before anything is drawn, so that a failing one leaves no files behind
        explanations = [explainer.explain([image for _, image in group]) for explainer in explainers]
        for (file, image), *by_explainer in zip(group, *explanations, strict=True):
            drawn.append(explanation.save_overlays(file, image, sum(by_explainer, []), stems[file], overlay))
    if not drawn:
        raise UserError(f"--image_path: {format_count(len(files), 'image')} found, but none can be read")
    rows = [row for image in drawn for row in image.rows]

    # ---- Figure and windows ----
    if options["figure"]:
        explanation.draw_figure(options["figure"], drawn, **select_kwargs(options, explanation.draw_figure))
    if options["show"]:
        is_shown = options["figure"] and is_png(options["figure"])  # a window cannot show PDF and SVG
        explanation.show_images([options["figure"]] if is_shown else [row["output"] for row in rows])
    return rows


if __name__ == "__main__":
    run_main(main)
