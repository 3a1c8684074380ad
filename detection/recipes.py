"""Training recipes of detect.py: values for the options that are not given."""

SCALES = list(range(480, 801, 32))  # shorter sides for multi-scale training, in pixels
PAPER = {  # Uddin et al., arXiv 2006.01791; iters and schedule are from memory, not from the text
    "batch_size": 8,
    "lr": 0.004,
    "weight_decay": 5e-4,
    "iters": 41_000,
    "schedule": [33_000],
    "warmup_iters": 1000,
    "neck": "fpn",
    "trainable_layers": 3,
    "norm": "frozen",
    "use_difficult": False,
    "min_size": [600],
    "max_size": 1000,
    "augment": "flip",
    "rois": 512,
    "proposals": [2000, 1000],
}
LARGE_BATCH = {
    "batch_size": 16,
    "lr": 0.02,
    "weight_decay": 1e-4,
    "warmup_iters": 100,
    "use_difficult": True,
    "min_size": SCALES,
    "max_size": 1333,
}
RECIPES = {
    "paper": PAPER,
    "replication": {**PAPER, "iters": 28_966, "schedule": [20_690], "neck": "c5", "use_difficult": True},
    "moco24k": {  # schedule of He et al., "Momentum Contrast", arXiv 1911.05722, Sec. 4.2.1, which uses a C4 neck
        **PAPER,
        **LARGE_BATCH,
        "iters": 24_000,
        "schedule": [18_000, 22_000],
        "trainable_layers": 5,
        "norm": "syncbn",
    },
    "fpn18k": {**PAPER, **LARGE_BATCH, "iters": 18_000, "schedule": [12_000, 16_000]},
    "coco1x": {  # the 1x schedule of Detectron2, configs/Base-RCNN-FPN.yaml and its defaults
        **PAPER,
        **LARGE_BATCH,
        "iters": 90_000,
        "schedule": [60_000, 80_000],
        "warmup_iters": 1000,
        "min_size": list(range(640, 801, 32)),
    },
    "shapes": {  # our own, short enough for a CPU
        **PAPER,
        "lr": 0.02,
        "iters": 500,
        "schedule": [350, 450],
        "warmup_iters": 50,
        "use_difficult": True,
        "eval_every": 1,
        "min_size": [160],
        "max_size": 320,
        "rois": 64,
        "proposals": [200, 100],
        "trainable_layers": 5,
    },
}
