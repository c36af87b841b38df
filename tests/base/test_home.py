"""Users without a home folder: real processes of a user that is in no passwd file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import shodh_moe, os
from pathlib import Path
from triton import knobs
from torch.utils.cpp_extension import _get_build_directory
print(Path.home(), Path(knobs.cache.dir).parents[1], Path(_get_build_directory("x", False)).parents[3], sep="\\n")
"""


def _homes(folder: Path, code: str, *command: str, **variables: str) -> list[str]:
    """Return what ``code`` prints in a bare environment, in ``folder``."""
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(folder / "tmp"), **variables}
    (folder / "tmp").mkdir(exist_ok=True)
    whole = [*command, sys.executable, "-c", code]
    done = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_user_in_no_passwd_file_has_a_private_home(tmp_path: Path) -> None:
    stranger = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    try:
        subprocess.run([*stranger, sys.executable, "-c", "import torch"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs user namespaces: {error}")
    home = tmp_path / "tmp/shodh_home_54321"
    assert _homes(tmp_path, CODE, *stranger) == [str(home)] * 3
    assert home.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tmp"], "no folder named ~"


def test_a_home_that_does_not_exist_is_replaced_and_another_is_kept(tmp_path: Path) -> None:
    code = "import shodh_moe, os; print(os.environ['HOME'])"
    expected = str(tmp_path / f"tmp/shodh_home_{os.getuid()}")
    assert _homes(tmp_path, code, HOME="/nonexistent") == [expected]
    assert _homes(tmp_path, code, HOME=str(tmp_path)) == [str(tmp_path)]


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    taken = tmp_path / f"tmp/shodh_home_{os.getuid()}"
    taken.mkdir(mode=0o777)
    taken.chmod(0o777)
    (found,) = _homes(tmp_path, "import shodh_moe, os; print(os.environ['HOME'])", HOME="/nonexistent")
    assert found != str(taken)
    assert Path(found).stat().st_mode & 0o777 == 0o700
    assert Path(found).parent == tmp_path / "tmp"
