"""Everything besides the engines: options, data, the files of a run, training, reports, studies."""
