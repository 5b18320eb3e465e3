"""Measurements anyone can repeat: ratios taken in one run, interleaved, medians."""
