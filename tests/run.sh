#!/usr/bin/env bash
# Everything that a change must pass, from nothing: Debian packages, a virtual environment, lint, types, tests.
#
#   bash tests/run.sh [PYTEST-ARGUMENT...]
#
# For Debian 12 and its like, as root. Packages already there are not touched; the environment is .venv of this clone.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  apache2-utils attr btrfs-progs busybox-static crun debootstrap docker-registry docker.io e2fsprogs fuse-overlayfs iproute2 kmod
  libarchive-tools openssl podman procps python3 python3-venv
  runc skopeo uidmap umoci user-mode-linux util-linux xattr xfsprogs zstd
)

retry() {
  local attempt
  for attempt in 1 2 3; do
    "$@" && return
    echo "failed, attempt $attempt of 3: $*" >&2
    sleep $((attempt * 5))
  done
  return 1
}

install_packages() {
  local missing=() package
  for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
  done
  if [ ${#missing[@]} = 0 ]; then
    return
  fi
  echo "== apt-get install ${missing[*]}"
  # Peers are started by the tests themselves: no service of theirs may run beside them.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
  fi
  export DEBIAN_FRONTEND=noninteractive
  retry apt-get update -qq
  retry apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null
}

# The PATH's python3, unless it is too old or cannot make environments: then Debian's.
make_environment() {
  if [ ! -x .venv/bin/python ]; then
    local python=python3
    python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || python=/usr/bin/python3
    "$python" -m venv .venv
  fi
  echo "== pip install -e .[test,lint]"
  retry .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[test,lint]'
}

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  install_packages
fi
make_environment

export PATH="$PWD/.venv/bin:$PATH"
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
python -m pytest "$@"
