"""The options of create and run: what cannot be meant is refused with the option's name, before anything is made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from containerkit import errors

if TYPE_CHECKING:
    import containerkit as ck

pytestmark = pytest.mark.kernel

INVALID: list[tuple[str, Any]] = [
    *(("name", value) for value in ("", "-x", "a b", "a/b", "ü", "x" * 129, 3)),
    *(("env", value) for value in ("A=b", ["A"], ["=b"], [3], ["A=\0"], {"A": None}, {"A=B": "c"}, {"": "x"}, 3)),
    *(("workdir", value) for value in ("relative", "./x", "/nu\0l", 3)),
    *(("hostname", value) for value in ("", "a b", "a/b", "x" * 64, "a\nb", 3)),
    *(("entrypoint", value) for value in ([3], "nu\0l", ["nu\0l"], 3)),
    *(("command", value) for value in ([""], [3], "it's", ["nu\0l"], 3)),
    *(("memory", value) for value in ("", "lots", "-1", "5m", -1, 1.5, True)),
    *(("memory_swap", value) for value in ("lots", "64m")),
    *(("cpus", value) for value in ("half", -1, 0.001, (os.cpu_count() or 1) + 1, float("nan"))),
    *(("cpu_shares", value) for value in ("some", -1)),
    *(("cpuset_cpus", value) for value in ("x", "0-", "-1", 3.5)),
    *(("pids_limit", value) for value in ("some", 1.5)),
    *(("network", value) for value in ("nowhere", "", None, 3)),
    *(("labels", value) for value in ("a=b", ["a=b"], 3)),
    *(("cap_add", value) for value in ("NET_ADMIN", ["NOPE"], 3)),
    *(("cap_drop", value) for value in ("ALL", ["NOPE"], [3])),
    *(("group_add", value) for value in ("users", 3)),
    *(("stop_signal", value) for value in ("NOPE", 65, -1, "RTMIN+99")),
    *(("read_only", value) for value in ("yes", 2)),
    *(("seccomp", value) for value in ("off",)),
    *(("no_new_privileges", value) for value in ("yes",)),
    *(("no_such_option", value) for value in (1,)),
]


@pytest.mark.parametrize(("option", "value"), INVALID, ids=[f"{name}={value!r}"[:40] for name, value in INVALID])
def test_what_cannot_be_meant(host: ck.Host, busybox_image: ck.Image, option: str, value: Any) -> None:
    options: dict[str, Any] = {"command": ["true"], option: value}
    for verb in (host.containers.create, host.run):
        with pytest.raises(errors.InvalidOption, match=option):
            verb(busybox_image, **options)
    assert host.containers.list(all=True) == []
    assert os.listdir(host.state.path("containers")) == []


def test_options_of_run_alone(host: ck.Host, busybox_image: ck.Image) -> None:
    with pytest.raises(errors.InvalidOption, match="detach"):
        host.run(busybox_image, ["true"], detach=True)
    with pytest.raises(errors.InvalidOption, match="check"):
        host.containers.create(busybox_image, ["true"], check=True)


@pytest.mark.parametrize("network", ["bridge", "default"])
def test_a_network_that_is_not_there_yet(host: ck.Host, busybox_image: ck.Image, network: str) -> None:
    with pytest.raises(errors.Unsupported, match="'bridge'") as caught:
        host.run(busybox_image, ["true"], network=network)
    assert "none" in caught.value.remedy
    assert host.containers.list(all=True) == []


@pytest.mark.parametrize("cpus", ["99", "0,99", "0-99", "5-3"])
def test_cpus_that_the_host_has_not_got(host: ck.Host, busybox_image: ck.Image, cpus: str) -> None:
    with pytest.raises(errors.Unsupported, match="cpuset_cpus"):
        host.run(busybox_image, ["true"], cpuset_cpus=cpus)
    assert host.containers.list(all=True) == []
    assert os.listdir(host.state.path("containers")) == []


@pytest.mark.parametrize(
    "options",
    [
        {"name": "x" * 128},
        {"hostname": "x" * 63},
        {"memory": 64 << 20, "memory_swap": -1},
        {"memory": "64m", "memory_swap": "64m"},
        {"memory": 0, "pids_limit": -1, "cpus": 0, "cpu_shares": 0, "cpuset_cpus": ""},
        {"cpus": float(os.cpu_count() or 1)},
        {"cpus": 1, "cpu_shares": 2},
        {"labels": {}, "env": {}, "cap_add": (), "cap_drop": [], "group_add": ()},
        {"env": {"NUMBER": 1}, "user": 0, "workdir": "/"},
        {"workdir": "//tmp/../tmp/."},
        {"stop_signal": "SIGRTMAX"},
        {"cap_add": ["all"], "cap_drop": ["cap_chown"]},
    ],
    ids=str,
)
def test_what_can_be_meant(host: ck.Host, busybox_image: ck.Image, options: dict[str, Any]) -> None:
    assert host.run(busybox_image, ["echo", "hi"], check=True, **options).stdout == b"hi\n"
