"""Local learning of image classifiers: early blocks learn the classes, each through a classifier of its own."""
