"""The domains, one file each. A domain's class is its config section and also sets up its flows.

To add a domain, add a file here and a line to `DOMAINS`; see docs/domains.md.
"""

from shodh_moe.solvers.domains.decaying_turbulence import DecayingTurbulence
from shodh_moe.solvers.domains.domain import Domain, PulsedDomain, Trajectories
from shodh_moe.solvers.domains.obstacle_wake import ObstacleWake
from shodh_moe.solvers.domains.open_channel import OpenChannel
from shodh_moe.solvers.domains.porous_bed import PorousBed
from shodh_moe.solvers.domains.porous_media import PorousMedia
from shodh_moe.solvers.domains.scalar import ScalarConfig

# Key under data.domains of a config: the class of its section.
DOMAINS: dict[str, type[Domain]] = {
    "open_channel": OpenChannel,
    "porous_media": PorousMedia,
    "obstacle_wake": ObstacleWake,
    "decaying_turbulence": DecayingTurbulence,
    "porous_bed": PorousBed,
}
# Domains that a dataset has unless its config sets them to null. The others it has only if its config names them.
DEFAULT = ("open_channel", "porous_media")

__all__ = [
    "DEFAULT",
    "DOMAINS",
    "DecayingTurbulence",
    "Domain",
    "ObstacleWake",
    "OpenChannel",
    "PorousBed",
    "PorousMedia",
    "PulsedDomain",
    "ScalarConfig",
    "Trajectories",
]
