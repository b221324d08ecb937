"""dytrun: what happens to a vision model when its normalization layers become Dynamic Tanh."""

__version__ = "0.1.0"
