"""Files that are whole or absent: saving beside the training, resuming, locks, signals."""
