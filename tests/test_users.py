"""User and group look-up in a container's own files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import ContainerkitError, UserNotFound
from containerkit.linux.users import MAX_ID, Account, lookup

PASSWD = b"""\
root:x:0:0:root:/root:/bin/bash
# a comment
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
  spaced:x:7:70:x:/spaced:/bin/sh
app:x:1000:1001:,,,:/home/app:/bin/sh
app:x:2000:2001::/second:/bin/sh
short:x:5:6
broken:x:abc:0::/:/bin/sh
huge:x:4294967296:0::/:/bin/sh
1337:x:9:9::/numeric:/bin/sh
+nis::::::
"""
GROUP = b"""\
root:x:0:
adm:x:4:app,root
staff:x:50:app
app:x:1001:
bad:x:no:app
nomembers:x:60
twice:x:70:
twice:x:71:
"""


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", Account(0, 0, (0, 4), "/root")),
        ("root", Account(0, 0, (0, 4), "/root")),
        ("app", Account(1000, 1001, (4, 50, 1001), "/home/app")),
        ("app:", Account(1000, 1001, (4, 50, 1001), "/home/app")),
        ("1000", Account(1000, 1001, (4, 50, 1001), "/home/app")),
        ("app:staff", Account(1000, 50, (50,), "/home/app")),
        ("app:0", Account(1000, 0, (0,), "/home/app")),
        ("1000:1234", Account(1000, 1234, (1234,), "/home/app")),
        ("4242", Account(4242, 0, (0,), "/")),
        ("4242:4243", Account(4242, 4243, (4243,), "/")),
        ("1337", Account(1337, 0, (0,), "/")),
        ("007", Account(7, 70, (70,), "/spaced")),
        (":adm", Account(0, 4, (4,), "/root")),
        ("spaced", Account(7, 70, (70,), "/spaced")),
        ("short", Account(5, 6, (6,), "/")),
        ("daemon:twice", Account(1, 70, (70,), "/usr/sbin")),
        (f"{MAX_ID}:{MAX_ID}", Account(MAX_ID, MAX_ID, (MAX_ID,), "/")),
    ],
)
def test_lookup(spec: str, expected: Account) -> None:
    assert lookup(spec, PASSWD, GROUP) == expected


@pytest.mark.parametrize(
    "spec",
    [
        *("nobody", "broken", "huge", "+nis", "#", "-1", "1.5", "\N{ARABIC-INDIC DIGIT THREE}", str(MAX_ID + 1)),
        *("app:nogroup", "app:bad", "0:99999999999999999999"),
    ],
)
def test_unknown_names_the_word(spec: str) -> None:
    with pytest.raises(UserNotFound) as caught:
        lookup(spec, PASSWD, GROUP)
    assert spec.rsplit(":", maxsplit=1)[-1] in str(caught.value)
    assert isinstance(caught.value, LookupError)


def test_additional_groups() -> None:
    assert lookup("app:app", PASSWD, GROUP, ("adm", "777")).groups == (4, 777, 1001)
    with pytest.raises(UserNotFound):
        lookup("app", PASSWD, GROUP, ("nosuch",))


def test_no_files_at_all() -> None:
    assert lookup("", b"", b"") == Account(0, 0, (0,), "/")
    assert lookup("12:13", b"", b"") == Account(12, 13, (13,), "/")
    with pytest.raises(UserNotFound):
        lookup("root", b"", b"")


@pytest.mark.property
@given(spec=st.text(max_size=12), passwd=st.binary(max_size=200), group=st.binary(max_size=200))
def test_any_bytes_give_an_account_or_a_typed_error(spec: str, passwd: bytes, group: bytes) -> None:
    try:
        account = lookup(spec, PASSWD + passwd, GROUP + group)
    except ContainerkitError:
        return
    assert 0 <= account.uid <= MAX_ID
    assert account.gid in account.groups
    assert all(0 <= number <= MAX_ID for number in account.groups)


@pytest.mark.kernel
def test_as_the_c_library_sees_the_hosts_own_files() -> None:
    """Every account of this machine, against id(1)."""
    passwd, group = Path("/etc/passwd").read_bytes(), Path("/etc/group").read_bytes()
    for line in passwd.splitlines():
        name = os.fsdecode(line.split(b":", 1)[0])
        account = lookup(name, passwd, group)
        printed = [
            subprocess.run(["id", *option, name], capture_output=True, check=True, text=True).stdout.split()
            for option in (["-u"], ["-g"], ["-G"])
        ]
        assert [str(account.uid)] == printed[0]
        assert [str(account.gid)] == printed[1]
        assert sorted(map(str, account.groups)) == sorted(printed[2])
