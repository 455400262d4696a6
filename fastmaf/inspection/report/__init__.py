"""report.html: a model, its threshold and its test results in one self-contained file."""
