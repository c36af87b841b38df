#!/usr/bin/env bash
# Create or update the virtual environment of this checkout. `make venv` calls this script.
#
#   launch/make_venv.sh [VENV_FOLDER (.venv)] [--dry-run]
#
# Environment:
#   PYTHON  the interpreter to build from (default python3; 3.10 to 3.13)
#   TORCH   system: use the interpreter's own torch; pinned: install the one in constraints.txt;
#           auto (default): system if that is a GPU build of at least MIN_TORCH, otherwise pinned.
#
# --dry-run only prints which Python and which torch would be used.
# The stamp VENV_FOLDER/.installed is written last, so an interrupted installation is repeated.
set -euo pipefail

MIN_TORCH=2.8
VENV=${1:-.venv}
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-auto}
STAMP=$VENV/.installed
cd "$(dirname "$0")/.."

refuse() { # report wrong input in one line and exit with code 2
    echo "make venv: $*" >&2
    exit 2
}

command -v "$PYTHON" >/dev/null || refuse "no interpreter '$PYTHON'; set one with PYTHON=/path/to/python3"
version=$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') ||
    refuse "'$PYTHON' does not run; set another with PYTHON=/path/to/python3"
case $version in
    3.10.* | 3.11.* | 3.12.* | 3.13.*) ;;
    *) refuse "Python 3.10 to 3.13 is needed, '$PYTHON' is $version; set another with PYTHON=/path/to/python3" ;;
esac

# Print one line about the interpreter's own torch: "none", or "<version> <gpu|cpu> <new|old>".
probe_torch() {
    "$PYTHON" - "$MIN_TORCH" <<'PY'
import re, sys
try:
    import torch
    version = str(torch.__version__)
    gpu = bool(torch.version.cuda or getattr(torch.version, "hip", None))
    number = tuple(map(int, re.findall(r"\d+", version)[:2]))
    new = number >= tuple(map(int, sys.argv[1].split(".")))
    print(version, "gpu" if gpu else "cpu", "new" if new else "old")
except Exception:  # absent or broken: both mean that it cannot be used
    print("none")
PY
}

case $TORCH in
    pinned) found=none ;;
    auto | system) found=$(probe_torch 2>/dev/null | tail -n 1) ;;
    *) refuse "TORCH is auto, system or pinned, not '$TORCH'" ;;
esac
read -r found_version found_build found_age _ <<<"$found none none"
if [[ $TORCH == system && $found_version == none ]]; then
    refuse "TORCH=system, but '$PYTHON' has no torch that can be imported"
elif [[ $TORCH == system && $found_age == old ]]; then
    refuse "TORCH=system, but the torch of '$PYTHON' is $found_version; at least $MIN_TORCH is needed"
elif [[ $TORCH == system || "$found_build $found_age" == "gpu new" ]]; then
    choice="the torch $found_version ($found_build build) of $PYTHON"
    venv_options=(--system-site-packages)
else
    choice="the torch pinned in constraints.txt"
    venv_options=()
    [[ $found_age == old ]] && choice+=" (that of $PYTHON is $found_version, older than $MIN_TORCH)"
fi

echo "make venv: Python $version, $choice"
[[ ${2:-} != --dry-run ]] || exit 0

# If two makes run at once (say, tests and pretraining), the second waits for the first.
if command -v flock >/dev/null; then
    exec 9>"$VENV.lock"
    flock 9
fi
wanted="python $version; $choice"
if [[ ! -f $STAMP ]] || [[ $(<"$STAMP") != "$wanted" ]]; then
    rm -rf "$VENV" # absent, incomplete, or made for another Python or torch
fi
rm -f "$STAMP"

if [[ ! -x $VENV/bin/python ]]; then
    "$PYTHON" -m venv "${venv_options[@]}" "$VENV" ||
        refuse "'$PYTHON -m venv' failed (Debian and Ubuntu have it in python3-venv)"
fi
constraints=$VENV/constraints.txt
if [[ ${#venv_options[@]} -gt 0 ]]; then
    # If the interpreter is itself in a virtual environment, packages installed there are not visible here.
    if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        site=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
        echo "$site" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host_torch.pth"
    fi
    # Keep this torch, and the triton version that it requires.
    grep -vE '^(torch|triton)==' constraints.txt >"$constraints"
    echo "torch==$found_version" >>"$constraints"
else
    cp constraints.txt "$constraints"
fi

pip=("$VENV/bin/python" -m pip install --disable-pip-version-check --constraint "$constraints")
[[ -t 1 ]] || pip+=(--quiet)
"${pip[@]}" --editable '.[dev]'

# A CPU torch does not install triton. Continue if there is no wheel for this platform: nothing needs triton to run.
if [[ $(uname -s) == Linux ]] && ! "$VENV/bin/python" -c 'import triton' 2>/dev/null; then
    "${pip[@]}" --editable '.[triton]' || echo "make venv: no triton for this platform; continuing without it"
fi
echo "$wanted" >"$STAMP"
