"""Python as an ordinary user of the host, with the library and what it needs where that user may read it."""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import shutil
import subprocess
import sys

from support import facts

NOBODY = 65534
NEEDED = ("containerkit", "attr", "attrs", "requests", "urllib3", "idna", "certifi", "charset_normalizer", "isal",
          "zstandard")  # fmt: skip


def copy_library(directory: str) -> str:
    """A copy of the library and of its dependencies, readable for all."""
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue  # isal has no wheel everywhere
        source = os.path.dirname(spec.origin)
        shutil.copytree(source, os.path.join(directory, name), ignore=shutil.ignore_patterns("__pycache__"))
        for extension in glob.glob(os.path.join(os.path.dirname(source), "*mypyc*.so")):
            shutil.copy(extension, directory)
    subprocess.run(["chmod", "-R", "a+rX", directory], check=True)
    return directory


@functools.cache
def _interpreter() -> str:
    """One of this version that any user may execute; a tester's own may lie in his home."""
    own = os.path.realpath(sys.executable)
    names = (f"python{sys.version_info.major}.{sys.version_info.minor}",)
    for path in (own, *(f"{place}/{name}" for place in ("/usr/bin", "/usr/local/bin") for name in names)):
        try:
            subprocess.run([path, "-c", ""], user=NOBODY, group=NOBODY, extra_groups=[], check=True, cwd="/")
        except (FileNotFoundError, PermissionError):
            continue
        return path
    facts.skip("a Python of this version that an ordinary user may execute")
    raise AssertionError


def run(library: str, script: str, *arguments: str) -> str:
    """Run a script as nobody, without any capability: its standard output."""
    done = subprocess.run(
        [_interpreter(), "-W", "error", "-c", script, *arguments],
        env={"PYTHONPATH": library, "PATH": os.environ["PATH"], "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"},
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
