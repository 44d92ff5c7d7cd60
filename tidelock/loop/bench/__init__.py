"""Load on a model server and what it felt like: arrivals, agent conversations, clients for three kinds of server."""

from .clients import client
from .load import agents, poisson
from .measure import drive, figures

__all__ = ["agents", "client", "drive", "figures", "poisson"]
