"""Check this machine, the options and every row of a dataset before training."""
