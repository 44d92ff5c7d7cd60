"""Tidelock: the open system in which a model and the agent product on top of it are one thing."""

__version__ = "0.1.0"
