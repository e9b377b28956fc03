"""The small image classifiers that are made from random weights, by name."""

__all__ = ["ARCHITECTURES"]

ARCHITECTURES = {"vit": 32, "resnet20": 64}  # with the side of their images, which ResNet's stem halves twice
