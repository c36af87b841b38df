"""``shodh doctor``: checks whether a training can run on this host and the hosts of a hostfile, and names remedies.

``local_script.py`` and ``remote_script.py`` are standalone scripts that inspect this host and other hosts.
``gather_local.py`` and ``gather_remote.py`` run them. ``software.py``, ``machine.py`` and ``cluster.py`` turn the
results into lines of a table, and ``diagnose.py`` is the command.
"""

from shodh_moe.doctor.diagnose import doctor

__all__ = ["doctor"]
