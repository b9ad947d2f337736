"""Root file systems for tests: a busybox one in milliseconds, a Debian one by debootstrap."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile

from support import facts

BUSYBOX = "/bin/busybox"
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\nalice:x:1000:1000::/home/alice:/bin/sh\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\nalice:x:1000:\nusers:x:100:alice\n",
    "etc/os-release": 'ID=busybox\nPRETTY_NAME="busybox test root"\n',
}
DIRECTORIES = {
    "tmp": 0o1777,
    "root": 0o700,
    "proc": 0o755,
    "sys": 0o755,
    "dev": 0o755,
    "var": 0o755,
    "home/alice": 0o755,
}


def busybox_rootfs(path: str) -> str:
    """Make ``path`` a root file system with every busybox applet, as hard links: symlinks could lead outside."""
    facts.require("busybox")
    for name, mode in DIRECTORIES.items():
        os.makedirs(os.path.join(path, name), exist_ok=True)
        os.chmod(os.path.join(path, name), mode)
    os.chown(os.path.join(path, "home/alice"), 1000, 1000)
    for name, text in FILES.items():
        os.makedirs(os.path.dirname(os.path.join(path, name)), exist_ok=True)
        with open(os.path.join(path, name), "w") as file:
            file.write(text)
    binary = os.path.join(path, "bin/busybox")
    os.makedirs(os.path.dirname(binary), exist_ok=True)
    shutil.copy(BUSYBOX, binary)
    applets = subprocess.run([BUSYBOX, "--list-full"], check=True, capture_output=True, text=True).stdout
    for applet in applets.split():
        link = os.path.join(path, applet)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.exists(link):
            os.link(binary, link)
    return path


def tar(directory: str, path: str) -> str:
    """Pack a root file system into a plain tar of root's files, as ``tar -C directory -c .`` does."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(directory, ".")
    return path


def debian_rootfs(path: str) -> str:
    """Make ``path`` a minimal Debian of the release that the host runs, from the mirror that the host's apt uses."""
    facts.require("debootstrap")
    mirror, suite = apt_mirror()
    environment = {**os.environ, **apt_proxy()}
    command = ["debootstrap", "--variant=minbase", suite, path, mirror]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=600)
    return path


def apt_mirror() -> tuple[str, str]:
    """The address and the release (``bookworm``) of the host's Debian archive, from its apt sources."""
    release = _release()
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Identifier: Packages"],
        check=True,
        capture_output=True,
        text=True,
    )
    for line in listed.stdout.splitlines():
        origin, suite, uri = line.split(" ", 2)
        if (origin, suite) == ("Debian", release):
            return uri.rstrip("/"), release
    facts.skip(f"an apt source of Debian {release}")
    raise AssertionError


def _release() -> str:
    with open("/etc/os-release") as file:
        entries = dict(line.strip().split("=", 1) for line in file if "=" in line)
    return entries.get("VERSION_CODENAME", "stable").strip('"')


def apt_proxy() -> dict[str, str]:
    """Apt's own proxy as the environment variable that debootstrap's downloads obey."""
    shell = subprocess.run(
        ["apt-config", "dump", "--format=%v%n", "Acquire::http::Proxy"], check=True, capture_output=True, text=True
    )
    proxy = shell.stdout.strip()
    return {"http_proxy": proxy} if proxy and proxy != "DIRECT" else {}
