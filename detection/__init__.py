"""Transfer to object detection: Faster R-CNN on PASCAL VOC with a backbone trained here."""
