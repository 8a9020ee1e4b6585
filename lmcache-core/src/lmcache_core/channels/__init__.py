"""Transfer channels: how they are found, and the built-in ``tcp://``."""
