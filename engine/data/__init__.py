"""Load data sets, from image files to normalised batches on the device."""

from engine import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "datasets": "load_data load_evaluation",
        "image_set": "Data ImageSet STATISTICS check_same_images",
        "augment": "Augmentation build_augmentation",
        "loader": "Batch DeviceLoader Shard check_batch_size get_process_shard",
        "pictures": "chunk find_images iter_images make_picture_set unique_stems",
        "resize_copies": "find_copies resize_copies resize_data_set",
        "views": "CenterCrop RandomCrop SquashedView",
    },
)
