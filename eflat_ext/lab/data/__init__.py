"""Read labelled text: corpora of packages, files, hub data sets."""
