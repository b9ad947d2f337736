#!/usr/bin/env bash
# The main job on a fresh machine, as root: finds or installs a Python 3.11 or later, needs nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
for python in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
  if command -v "$python" >/dev/null && "$python" -c 'import sys, sqlite3, ctypes; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    exec "$python" -m containerkit.quickstart
  fi
done
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends python3 >/dev/null
exec /usr/bin/python3 -m containerkit.quickstart
