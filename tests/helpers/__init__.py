"""What several test files share: comparisons, engines, runs, and made data."""
