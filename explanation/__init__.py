"""Explain the predictions of classifiers on single images by heatmaps."""

from engine import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "explainer": "crop_for_model load_classifiers make_cam_explainer make_casm_explainer print_layers",
        "overlay": "OverlaySettings draw_figure save_overlays show_images",
    },
)
