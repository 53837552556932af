"""Is this machine fit to train, and every row of a dataset to be trained on?"""
