"""What the inspection commands do, one module per command.

Arguments that several of them share are described here:

- ``model``: model file or a run's folder;
- ``device``: where the model computes;
- ``skip_bad``: leave out files that cannot be read, instead of raising a DataError;
- ``progress``: show progress bars;
- ``say``: receives messages, such as notes on images that were converted.
"""
