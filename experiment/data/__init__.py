"""Data sets: reading, decoding, augmentation, splits and batches."""
