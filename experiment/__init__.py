"""What an engine does not have: options, data, the files of a run, training, reports, studies."""
