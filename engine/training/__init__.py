"""Training: the step, the run from epoch to epoch, its folder and its log."""
