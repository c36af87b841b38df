"""``shodh doctor``: whether a training can run here and on the hosts of a hostfile, and what to do where not.

``probe.py`` and ``there.py`` are scripts of the standard library that look at this host and at others; ``here.py`` and
``hosts.py`` run them; ``software.py``, ``machine.py`` and ``cluster.py`` turn what they found into lines of a table.
"""

from shodh_moe.doctor.diagnose import doctor

__all__ = ["doctor"]
