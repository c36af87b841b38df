"""The domains: a file each, with a class that is both its section of a config and what sets its flows up.

A new one is a file here and a line in `DOMAINS`; docs/domains.md shows it.
"""

from shodh_moe.solvers.domains.decaying_turbulence import DecayingTurbulence
from shodh_moe.solvers.domains.domain import Domain, PulsedDomain, Trajectories
from shodh_moe.solvers.domains.obstacle_wake import ObstacleWake
from shodh_moe.solvers.domains.open_channel import OpenChannel
from shodh_moe.solvers.domains.porous_media import PorousMedia
from shodh_moe.solvers.domains.scalar import ScalarConfig

# The key under data.domains of a config, and what it configures.
DOMAINS: dict[str, type[Domain]] = {
    "open_channel": OpenChannel,
    "porous_media": PorousMedia,
    "obstacle_wake": ObstacleWake,
    "decaying_turbulence": DecayingTurbulence,
}
# Those that a dataset has unless its config sets them to null; the others it has to name.
DEFAULT = ("open_channel", "porous_media")

__all__ = [
    "DEFAULT",
    "DOMAINS",
    "DecayingTurbulence",
    "Domain",
    "ObstacleWake",
    "OpenChannel",
    "PorousMedia",
    "PulsedDomain",
    "ScalarConfig",
    "Trajectories",
]
