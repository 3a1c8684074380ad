"""Data sets: from files to batches on the device."""
