"""Several upstreams behind one `Policy`: which of them answers, who waits, what happens when one fails."""

from .config import read_upstreams
from .pool import Pool
from .upstream import Upstream

__all__ = ["Pool", "Upstream", "read_upstreams"]
