"""One file a model family: its names, shapes and hyperparameters on both sides."""
