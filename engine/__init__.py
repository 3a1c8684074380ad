"""What several scripts share: options, data, the loop, checkpoints, logs, pictures."""
