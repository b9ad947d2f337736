"""Docker's instructions as changes: what Docker 20.10 made of each line, recorded, is what is made of it here."""

from __future__ import annotations

from typing import Any

import pytest

from containerkit.errors import InvalidOption
from containerkit.image.instructions import apply_changes, change_container

#: The config of the container that was committed; the imports had none.
CONTAINER = {
    "Cmd": ["base"],
    "Entrypoint": ["/e"],
    "Env": ["A=one", "P=81", "S=INT", "PATH=/bin"],
    "ExposedPorts": {"1/tcp": {}},
    "Volumes": {"/v": {}},
    "WorkingDir": "/srv",
    "User": "bu",
    "Labels": {"l": "m"},
}
#: Lines; the config after ``docker import -c``; what of CONTAINER's was another after ``docker commit -c``, None for
#: what was gone. None instead of either is Docker's refusal.
RECORDED: list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]] = [
    ("CMD []", {"Cmd": []}, {"Cmd": []}),
    ('CMD ["a", "b c"]', {"Cmd": ["a", "b c"]}, {"Cmd": ["a", "b c"]}),
    ('CMD ["a", 1]', None, None),
    ("CMD a b  c", {"Cmd": ["/bin/sh", "-c", "a b  c"]}, {"Cmd": ["/bin/sh", "-c", "a b  c"]}),
    ('CMD ["a"', {"Cmd": ["/bin/sh", "-c", '["a"']}, {"Cmd": ["/bin/sh", "-c", '["a"']}),
    ('CMD ["a",]', {"Cmd": ["/bin/sh", "-c", '["a",]']}, {"Cmd": ["/bin/sh", "-c", '["a",]']}),
    ("CMD ['a']", {"Cmd": ["/bin/sh", "-c", "['a']"]}, {"Cmd": ["/bin/sh", "-c", "['a']"]}),
    ("CMD $A", {"Cmd": ["/bin/sh", "-c", "$A"]}, {"Cmd": ["/bin/sh", "-c", "$A"]}),
    ('CMD ["$A"]', {"Cmd": ["$A"]}, {"Cmd": ["$A"]}),
    ("CMD", {"Cmd": ["/bin/sh", "-c"]}, {"Cmd": ["/bin/sh", "-c"]}),
    ("ENTRYPOINT []", {}, {}),
    ('ENTRYPOINT ["/x"]', {"Entrypoint": ["/x"]}, {"Entrypoint": ["/x"], "Cmd": None}),
    (
        "ENTRYPOINT /x y",
        {"Entrypoint": ["/bin/sh", "-c", "/x y"]},
        {"Entrypoint": ["/bin/sh", "-c", "/x y"], "Cmd": None},
    ),
    ("ENTRYPOINT", {}, {}),
    (
        'ENV K=v L="a b" M=a\\ b',
        {"Env": ["K=v", "L=a b", "M=a b"]},
        {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K=v", "L=a b", "M=a b"]},
    ),
    ("ENV K v w", {"Env": ["K=v w"]}, {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K=v w"]}),
    ("ENV K=$A ${A}x ", None, None),
    (
        "ENV K=${A:-d} L=${Q:-d} M=${A:+p} N=${Q:+p}",
        {"Env": ["K=d", "L=d", "M=", "N="]},
        {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K=one", "L=d", "M=p", "N="]},
    ),
    ("ENV K=", {"Env": ["K="]}, {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K="]}),
    ("ENV =v", None, None),
    ("ENV K='$A'", {"Env": ["K=$A"]}, {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K=$A"]}),
    ('ENV K="$A"', {"Env": ["K="]}, {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K=one"]}),
    ("ENV K=a\\$A", {"Env": ["K=a$A"]}, {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K=a$A"]}),
    ("ENV A=two B=$A", {"Env": ["A=two", "B="]}, {"Env": ["A=two", "P=81", "S=INT", "PATH=/bin", "B=one"]}),
    ('ENV K=a"b c"d', {"Env": ["K=ab cd"]}, {"Env": ["A=one", "P=81", "S=INT", "PATH=/bin", "K=ab cd"]}),
    ('ENV K="unclosed', None, None),
    ("EXPOSE 80/udp", {"ExposedPorts": {"80/udp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/udp": {}}}),
    ("EXPOSE 0", {"ExposedPorts": {"0/tcp": {}}}, {"ExposedPorts": {"0/tcp": {}, "1/tcp": {}}}),
    ("EXPOSE 8080:80", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    (
        "EXPOSE 80-82",
        {"ExposedPorts": {"80/tcp": {}, "81/tcp": {}, "82/tcp": {}}},
        {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}, "81/tcp": {}, "82/tcp": {}}},
    ),
    ("EXPOSE 82-80", None, None),
    ("EXPOSE 80/foo", None, None),
    ("EXPOSE 80/TCP", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    ("EXPOSE 65536", None, None),
    (
        "EXPOSE 80 90/udp",
        {"ExposedPorts": {"80/tcp": {}, "90/udp": {}}},
        {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}, "90/udp": {}}},
    ),
    ("EXPOSE abc", None, None),
    ("EXPOSE 127.0.0.1:80:90", {"ExposedPorts": {"90/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "90/tcp": {}}}),
    (
        "EXPOSE 1-3:5-7",
        {"ExposedPorts": {"5/tcp": {}, "6/tcp": {}, "7/tcp": {}}},
        {"ExposedPorts": {"1/tcp": {}, "5/tcp": {}, "6/tcp": {}, "7/tcp": {}}},
    ),
    ("EXPOSE $P", {}, {"ExposedPorts": {"1/tcp": {}, "81/tcp": {}}}),
    ("EXPOSE 80/", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    ("EXPOSE :80", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    ("EXPOSE 80:", None, None),
    ("EXPOSE ::1:80", None, None),
    ("EXPOSE 8080-8081:80", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    ("EXPOSE 80:80-81", None, None),
    ("EXPOSE 080", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    ("EXPOSE -1", None, None),
    ("EXPOSE [::1]:80:80", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    ("EXPOSE 80-80-80", {"ExposedPorts": {"80/tcp": {}}}, {"ExposedPorts": {"1/tcp": {}, "80/tcp": {}}}),
    ("EXPOSE 1:2:3", None, None),
    ("EXPOSE 80-", None, None),
    ("VOLUME []", None, None),
    ("VOLUME /a", {"Volumes": {"/a": {}}}, {"Volumes": {"/a": {}, "/v": {}}}),
    ("VOLUME /a /b", {"Volumes": {"/a": {}, "/b": {}}}, {"Volumes": {"/a": {}, "/b": {}, "/v": {}}}),
    ('VOLUME ["/a", "/b c"]', {"Volumes": {"/a": {}, "/b c": {}}}, {"Volumes": {"/a": {}, "/b c": {}, "/v": {}}}),
    ('VOLUME ["/a", 1]', None, None),
    ('VOLUME [""]', None, None),
    ('VOLUME ""', None, None),
    ("VOLUME $A", None, {"Volumes": {"/v": {}, "one": {}}}),
    ('VOLUME ["$A"]', None, {"Volumes": {"/v": {}, "one": {}}}),
    ('VOLUME " /sp "', None, None),
    ("WORKDIR /w", {"WorkingDir": "/w"}, {"WorkingDir": "/w"}),
    ("WORKDIR w", {"WorkingDir": "/w"}, {"WorkingDir": "/srv/w"}),
    ('WORKDIR ""', None, None),
    ("WORKDIR ..", {"WorkingDir": "/"}, {"WorkingDir": "/"}),
    ("WORKDIR /a/../b/", {"WorkingDir": "/a/../b/"}, {"WorkingDir": "/a/../b/"}),
    ('WORKDIR "/a b"', {"WorkingDir": "/a b"}, {"WorkingDir": "/a b"}),
    ("WORKDIR /a b", {"WorkingDir": "/a b"}, {"WorkingDir": "/a b"}),
    ("WORKDIR $A", None, {"WorkingDir": "/srv/one"}),
    ("WORKDIR //x", {"WorkingDir": "//x"}, {"WorkingDir": "//x"}),
    ('WORKDIR ["/x"]', {"WorkingDir": "/[/x]"}, {"WorkingDir": "/srv/[/x]"}),
    ("USER u", {"User": "u"}, {"User": "u"}),
    ("USER u:g", {"User": "u:g"}, {"User": "u:g"}),
    ('USER ""', {}, {}),
    ("USER $A", {}, {"User": "one"}),
    ("USER a b", {"User": "a b"}, {"User": "a b"}),
    ("LABEL a=b", {"Labels": {"a": "b"}}, {"Labels": {"a": "b", "l": "m"}}),
    ('LABEL "a b"=c', {"Labels": {"a b": "c"}}, {"Labels": {"a b": "c", "l": "m"}}),
    ("LABEL a=$A", {"Labels": {"a": ""}}, {"Labels": {"a": "one", "l": "m"}}),
    ("LABEL a", None, None),
    ("LABEL a=", {"Labels": {"a": ""}}, {"Labels": {"a": "", "l": "m"}}),
    ("LABEL a='$A'", {"Labels": {"a": "$A"}}, {"Labels": {"a": "$A", "l": "m"}}),
    ('LABEL "a"="b c" d=e', {"Labels": {"a": "b c", "d": "e"}}, {"Labels": {"a": "b c", "d": "e", "l": "m"}}),
    ('LABEL a="multi\\\nline"', {"Labels": {"a": "multiline"}}, {"Labels": {"a": "multiline", "l": "m"}}),
    ("LABEL =x", None, None),
    ("ONBUILD RUN x", {"OnBuild": ["RUN x"]}, {"OnBuild": ["RUN x"]}),
    ("ONBUILD ONBUILD RUN x", None, None),
    ("ONBUILD FROM x", None, None),
    ("ONBUILD nonsense", {"OnBuild": ["nonsense"]}, {"OnBuild": ["nonsense"]}),
    ("ONBUILD run  x", {"OnBuild": ["run  x"]}, {"OnBuild": ["run  x"]}),
    ('ONBUILD CMD ["x"]', {"OnBuild": ['CMD ["x"]']}, {"OnBuild": ['CMD ["x"]']}),
    ("HEALTHCHECK NONE", {"Healthcheck": {"Test": ["NONE"]}}, {"Healthcheck": {"Test": ["NONE"]}}),
    (
        "HEALTHCHECK CMD x y",
        {"Healthcheck": {"Test": ["CMD-SHELL", "x y"]}},
        {"Healthcheck": {"Test": ["CMD-SHELL", "x y"]}},
    ),
    (
        'HEALTHCHECK CMD ["x","y"]',
        {"Healthcheck": {"Test": ["CMD", "x", "y"]}},
        {"Healthcheck": {"Test": ["CMD", "x", "y"]}},
    ),
    (
        "HEALTHCHECK --interval=5s --timeout=1m30s --start-period=1s --retries=3 CMD x",
        {
            "Healthcheck": {
                "Test": ["CMD-SHELL", "x"],
                "Interval": 5000000000,
                "Timeout": 90000000000,
                "StartPeriod": 1000000000,
                "Retries": 3,
            }
        },
        {
            "Healthcheck": {
                "Test": ["CMD-SHELL", "x"],
                "Interval": 5000000000,
                "Timeout": 90000000000,
                "StartPeriod": 1000000000,
                "Retries": 3,
            }
        },
    ),
    ("HEALTHCHECK --retries=0 CMD x", None, None),
    ("HEALTHCHECK --retries=-1 CMD x", None, None),
    ("HEALTHCHECK --interval=0 CMD x", None, None),
    ("HEALTHCHECK --interval=1us CMD x", None, None),
    (
        "HEALTHCHECK --interval=1ms CMD x",
        {"Healthcheck": {"Test": ["CMD-SHELL", "x"], "Interval": 1000000}},
        {"Healthcheck": {"Test": ["CMD-SHELL", "x"], "Interval": 1000000}},
    ),
    ("HEALTHCHECK --nope=1 CMD x", None, None),
    ("HEALTHCHECK CMD []", None, None),
    ("HEALTHCHECK CMD", None, None),
    ("HEALTHCHECK NONE x", None, None),
    ("HEALTHCHECK x", None, None),
    ("HEALTHCHECK none", {"Healthcheck": {"Test": ["NONE"]}}, {"Healthcheck": {"Test": ["NONE"]}}),
    ("HEALTHCHECK cmd x", {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}}, {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}}),
    ("HEALTHCHECK --interval=-5s CMD x", None, None),
    ("HEALTHCHECK --interval=5 CMD x", None, None),
    (
        "HEALTHCHECK --interval= CMD x",
        {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}},
        {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}},
    ),
    (
        "HEALTHCHECK --retries= CMD x",
        {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}},
        {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}},
    ),
    ("HEALTHCHECK --interval=1s --interval=2s CMD x", None, None),
    ("FROM x", None, None),
    ('SHELL ["/bin/x"]', None, None),
    ("nonsense", None, None),
    ("", None, None),
    ("# comment", None, None),
    (
        'CMD x\nENTRYPOINT ["/y"]',
        {"Cmd": ["/bin/sh", "-c", "x"], "Entrypoint": ["/y"]},
        {"Cmd": ["/bin/sh", "-c", "x"], "Entrypoint": ["/y"]},
    ),
    (
        'ENTRYPOINT ["/y"]\nCMD x',
        {"Cmd": ["/bin/sh", "-c", "x"], "Entrypoint": ["/y"]},
        {"Cmd": ["/bin/sh", "-c", "x"], "Entrypoint": ["/y"]},
    ),
    ('ENTRYPOINT ["/y"]\nENTRYPOINT []', {}, {}),
    ("CMD a\nCMD []", {"Cmd": []}, {"Cmd": []}),
    ("CMD []\nENTRYPOINT []", {}, {}),
    ("WORKDIR a\nWORKDIR b", {"WorkingDir": "/a/b"}, {"WorkingDir": "/srv/a/b"}),
    ('CMD ["x"]\nENTRYPOINT []', {"Cmd": ["x"]}, {"Cmd": ["x"]}),
]
#: What ``docker build`` takes; its commit knows no STOPSIGNAL in 20.10.
SIGNALS = ["KILL", "SIGKILL", "sigkill", "9", "09", "64", "RTMIN", "SIGRTMIN+3", "RTMIN+15", "RTMAX-1", "SIGRTMAX-14",
           "SIGIOT", "CLD", "POLL", "STKFLT"]  # fmt: skip
NO_SIGNALS = ["0", "nonsense", "TERM INT", "RTMIN+16", "SIGRTMAX-15", "SIG", '""', "SIGUNUSED", "LOST", "-1", "65"]


def lines(text: str) -> list[str]:
    return [text] if "\\\n" in text else text.split("\n")


def told(config: dict[str, Any]) -> dict[str, Any]:
    """What Docker shows of a config; an empty command is one."""
    return {key: value for key, value in config.items() if value or (key == "Cmd" and value is not None)}


@pytest.mark.parametrize(("text", "imported"), [row[:2] for row in RECORDED])
def test_an_import_is_changed_as_by_docker(text: str, imported: dict[str, Any] | None) -> None:
    if imported is None:
        with pytest.raises(InvalidOption, match="changes"):
            apply_changes({}, lines(text))
    else:
        assert told(apply_changes({}, lines(text))) == imported


@pytest.mark.parametrize(("text", "committed"), [row[::2] for row in RECORDED])
def test_a_commit_is_changed_as_by_docker(text: str, committed: dict[str, Any] | None) -> None:
    if committed is None:
        with pytest.raises(InvalidOption, match="changes"):
            change_container(CONTAINER, lines(text))
    else:
        assert told(change_container(CONTAINER, lines(text))) == told(CONTAINER | committed)


@pytest.mark.parametrize("name", SIGNALS)
def test_signals(name: str) -> None:
    assert apply_changes({}, [f"STOPSIGNAL {name}"]) == {"StopSignal": name}


@pytest.mark.parametrize("name", NO_SIGNALS)
def test_what_is_no_signal(name: str) -> None:
    with pytest.raises(InvalidOption, match="STOPSIGNAL"):
        apply_changes({}, [f"STOPSIGNAL {name}"])


def test_a_newer_dockers_option_of_healthcheck() -> None:
    changed = apply_changes({}, ["HEALTHCHECK --start-interval=5s CMD x"])
    assert changed == {"Healthcheck": {"Test": ["CMD-SHELL", "x"], "StartInterval": 5 * 10**9}}
