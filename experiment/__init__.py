"""What the engines share and neither owns: configuration, data, metrics, history, checkpoints, reports."""
