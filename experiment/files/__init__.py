"""The files of a run: config.json, checkpoints, metrics, predictions, weights."""
