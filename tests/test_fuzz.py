"""Every fuzz target for two seconds: that it runs, and that it would see a finding. ``tests/fuzz`` runs them longer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FUZZ = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fuzz")
FEWEST = 200


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, cwd=FUZZ)


@pytest.mark.kernel
@pytest.mark.property
@pytest.mark.parametrize("target", ["tar", "manifest", "reference"])
def test_two_seconds_find_nothing(target: str) -> None:
    done = fuzz(f"{FUZZ}/{target}.py", "2")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > FEWEST, done.stdout


@pytest.mark.property
@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("raise ValueError(7)", "ValueError: 7"),
        ("bytearray(2 << 30)", "MemoryError"),
        ("exec('while True: pass')", "engine.Slow"),
    ],
)
def test_the_engine_sees_what_breaks(body: str, found: str) -> None:
    code = f"""
import sys, engine
engine.PATIENCE = 1
def target(data):
    if data != b"right":
        {body}
sys.argv[1:] = ["20", "1"]
sys.exit(engine.main(target, [b"right"], [b"word"]))
"""
    done = fuzz("-c", code)
    assert done.returncode == 1
    assert found in done.stderr
    assert "seed 1, execution" in done.stderr
