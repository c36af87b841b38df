"""``shodh doctor``: check whether training can run on this host and the hosts of a hostfile, and suggest remedies.

``gather_local.py`` and ``gather_remote.py`` gather facts with the standalone scripts ``local_script.py`` and
``remote_script.py``. ``software.py``, ``machine.py`` and ``cluster.py`` turn the facts into lines of a table
(``table.py``), and ``diagnose.py`` is the command.
"""

from shodh_moe.doctor.diagnose import doctor

__all__ = ["doctor"]
