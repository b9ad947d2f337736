from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import InvalidDigest, InvalidReference
from containerkit.image.digest import Digest
from containerkit.image.reference import Reference

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "canonical", "familiar"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("library/debian:12", "docker.io/library/debian:12", "debian:12"),
        ("user/app", "docker.io/user/app:latest", "user/app:latest"),
        ("index.docker.io/user/app", "docker.io/user/app:latest", "user/app:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/app:1", "localhost:5000/app:1", "localhost:5000/app:1"),
        ("127.0.0.1:5000/a/b/c:1", "127.0.0.1:5000/a/b/c:1", "127.0.0.1:5000/a/b/c:1"),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000/app:latest"),
        ("UPPER/app", "UPPER/app:latest", "UPPER/app:latest"),
        ("quay.io/app", "quay.io/app:latest", "quay.io/app:latest"),
        ("host:5000", "docker.io/library/host:5000", "host:5000"),
        (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}", f"debian@{DIGEST}"),
        (f"debian:12@{DIGEST}", f"docker.io/library/debian:12@{DIGEST}", f"debian:12@{DIGEST}"),
        ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
        (f"docker.io/library/{HEX}", f"docker.io/library/{HEX}:latest", f"library/{HEX}:latest"),
        ("a__b/c.d-e--f", "docker.io/a__b/c.d-e--f:latest", "a__b/c.d-e--f:latest"),
    ],
)
def test_familiar_names(text: str, canonical: str, familiar: str) -> None:
    reference = Reference.parse(text)
    assert (str(reference), reference.familiar) == (canonical, familiar)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "/",
        "debian:",
        "Debian",
        "user/App",
        "debian:" + "t" * 129,
        "debian:-x",
        "debian@sha256:abc",
        "debian@",
        "-a",
        "a..b",
        "a___b",
        "a/",
        "/a",
        "a//b",
        "a b",
        "deb\nian",
        "debian\n",
        "quay.io/",
        "quay.io:port/a",
        "x/" + "a" * 255,
        HEX,
        "ä",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidReference, match=r"image reference|longer"):
        Reference.parse(text)


def test_the_longest_path() -> None:
    assert Reference.parse("quay.io/" + "a" * 255).repository == "a" * 255


component = st.from_regex(r"[a-z0-9]{1,6}((\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}", fullmatch=True)
registry = st.one_of(
    st.sampled_from(["docker.io", "localhost", "localhost:5000", "[::1]:80", "EXAMPLE"]),
    st.from_regex(r"[a-z0-9]{1,8}\.[a-z]{2,5}(:[0-9]{1,5})?", fullmatch=True),
)
tag = st.one_of(st.just(""), st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True))


@pytest.mark.property
@given(registry, st.lists(component, min_size=1, max_size=4), tag, st.sampled_from([None, Digest(DIGEST)]))
def test_both_forms_parse_to_the_same_reference(host: str, path: list[str], name: str, digest: Digest | None) -> None:
    text = f"{host}/{'/'.join(path)}" + (f":{name}" if name else "") + (f"@{digest}" if digest else "")
    reference = Reference.parse(text)
    assert Reference.parse(str(reference)) == reference
    assert Reference.parse(reference.familiar) == reference
    assert len(reference.familiar) <= len(str(reference))


@pytest.mark.property
@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidReference:
        return
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "A" * 64, "sha256:" + "a" * 63, "md5:" + "a" * 32, "a" * 64, DIGEST + "\n"]
)
def test_digests_refused(text: str) -> None:
    with pytest.raises(InvalidDigest):
        Digest(text)


def test_digest() -> None:
    empty = Digest.of(b"")
    assert empty == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (empty.algorithm, empty.short) == ("sha256", "e3b0c44298fc")
    assert Digest.from_hash(Digest("sha512:" + "0" * 128).hasher()).algorithm == "sha512"


HEAVY = {"attr", "attrs", "hashlib", "requests", "zstandard", "isal", "pathlib", "dataclasses", "logging", "tempfile"}


def test_the_start_path_loads_nothing_heavy() -> None:
    code = (
        f"import sys; before = set(sys.modules); sys.path[:0] = {sys.path!r}\n"
        "import containerkit.image.images, containerkit.image.overlay\n"
        f"print(sorted({HEAVY!r} & (set(sys.modules) - before)))"
    )
    found = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
