"""A study: optimizers x seeds from one TOML file, tuned alike, and what they show with intervals."""
