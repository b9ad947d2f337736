from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import InvalidDigest, InvalidReference
from containerkit.image.digest import Digest
from containerkit.image.reference import Reference
from support.said import everything_said

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
        (f"docker.io/library/{HEX}", f"docker.io/library/{HEX}:latest", f"{HEX}:latest"),
        (f"docker.io/{HEX}", f"docker.io/library/{HEX}:latest", f"{HEX}:latest"),
        (f"{HEX}:1", f"docker.io/library/{HEX}:1", f"{HEX}:1"),
        (HEX[1:], f"docker.io/library/{HEX[1:]}:latest", f"{HEX[1:]}:latest"),
        ("docker.io/foo.bar/baz", "docker.io/foo.bar/baz:latest", "docker.io/foo.bar/baz:latest"),
        ("docker.io/localhost/a", "docker.io/localhost/a:latest", "docker.io/localhost/a:latest"),
        (f"a@sha384:{HEX}{HEX[:32]}", f"docker.io/library/a@sha384:{HEX}{HEX[:32]}", f"a@sha384:{HEX}{HEX[:32]}"),
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


@pytest.mark.parametrize(
    "text",
    [
        "https://me:SECRET@quay.io/app",
        "https://SECRET@quay.io/app:1",
        "https://me:SEC/RET@quay.io:5000",
        "https://me:SEC@RET@quay.io",
        "me:SECRET@quay.io/app",
        "me:SECRET@quay.io:5000",
        "me:SECRET@quay.io",
        "me:SEC@RET@quay.io/app",
        f"me:SECRET@quay.io/app@{DIGEST}",
        "me:SECRET@quay.io/app@sha256:bad",
        "https://me:SECRET@quay.io/" + "a" * 300,
        "https://me:SECRET@quay.io/" + "a" * 5000,
    ],
)
def test_no_password_is_in_a_message(text: str) -> None:
    with pytest.raises(InvalidReference, match=r"\*\*\*@quay\.io") as caught:
        Reference.parse(text)
    assert not re.search("SEC|RET", everything_said(caught.value))


def test_a_wrong_digest_is_shown() -> None:
    for text in ("debian:12@sha256:bad", "quay.io:5000/app@sha256:bad", "debian@latest", f"debian:12@{DIGEST}0"):
        with pytest.raises(InvalidReference, match=re.escape(text)):
            Reference.parse(text)


F64, F128 = "f" * 64, "f" * 128

# What the distribution project's grammar says of each: registry, repository, tag, digest.
GRAMMAR: dict[str, tuple[str, str, str, str]] = {
    "test_com": ("docker.io", "library/test_com", "latest", ""),
    "test.com:tag": ("docker.io", "library/test.com", "tag", ""),
    "test.com:5000": ("docker.io", "library/test.com", "5000", ""),
    "test.com/repo:tag": ("test.com", "repo", "tag", ""),
    "test:5000/repo": ("test:5000", "repo", "latest", ""),
    "test:5000/repo:tag": ("test:5000", "repo", "tag", ""),
    f"test:5000/repo@sha256:{F64}": ("test:5000", "repo", "", f"sha256:{F64}"),
    f"test:5000/repo:tag@sha256:{F64}": ("test:5000", "repo", "tag", f"sha256:{F64}"),
    f"localhost:8080@sha256:{F64}": ("docker.io", "library/localhost", "8080", f"sha256:{F64}"),
    f"localhost:8080/name@sha256:{F64}": ("localhost:8080", "name", "", f"sha256:{F64}"),
    "lowercase:Uppercase": ("docker.io", "library/lowercase", "Uppercase", ""),
    "sub-dom1.foo.com/bar/baz/quux:some-long-tag": ("sub-dom1.foo.com", "bar/baz/quux", "some-long-tag", ""),
    "b.gcr.io/test.example.com/app:test.example.com": ("b.gcr.io", "test.example.com/app", "test.example.com", ""),
    "xn--n3h.com/myimage:xn--n3h.com": ("xn--n3h.com", "myimage", "xn--n3h.com", ""),
    f"xn--7o8h.com/myimage:xn--7o8h.com@sha512:{F128}": ("xn--7o8h.com", "myimage", "xn--7o8h.com", f"sha512:{F128}"),
    "foo_bar.com:8080": ("docker.io", "library/foo_bar.com", "8080", ""),
    "foo/foo_bar.com:8080": ("docker.io", "foo/foo_bar.com", "8080", ""),
    "192.168.1.1": ("docker.io", "library/192.168.1.1", "latest", ""),
    "192.168.1.1:5000": ("docker.io", "library/192.168.1.1", "5000", ""),
    "192.168.1.1:5000/repo:5050": ("192.168.1.1:5000", "repo", "5050", ""),
    "[2001:db8::1]/repo": ("[2001:db8::1]", "repo", "latest", ""),
    "[2001:db8:1:2:3:4:5:6]/repo:tag": ("[2001:db8:1:2:3:4:5:6]", "repo", "tag", ""),
    f"[2001:db8::1]:5000/repo:tag@sha256:{F64}": ("[2001:db8::1]:5000", "repo", "tag", f"sha256:{F64}"),
    "[2001:db8::]:5000/repo": ("[2001:db8::]:5000", "repo", "latest", ""),
    "[fc00::1]:5000/docker/docker": ("[fc00::1]:5000", "docker/docker", "latest", ""),
    "index.docker.io/debian": ("docker.io", "library/debian", "latest", ""),
    "index.docker.io/library/debian": ("docker.io", "library/debian", "latest", ""),
    "Docker/docker": ("Docker", "docker", "latest", ""),
    "DOCKER/docker": ("DOCKER", "docker", "latest", ""),
    "Foo/bar/baz": ("Foo", "bar/baz", "latest", ""),
    "Asdf.com/foo/bar": ("Asdf.com", "foo/bar", "latest", ""),
    "0101.com/a": ("0101.com", "a", "latest", ""),
    "192.168.1.1:750050/a": ("192.168.1.1:750050", "a", "latest", ""),
    "docker---rules/docker": ("docker.io", "docker---rules/docker", "latest", ""),
    "dock__er/docker": ("docker.io", "dock__er/docker", "latest", ""),
    "d/docker": ("docker.io", "d/docker", "latest", ""),
    "jess/t": ("docker.io", "jess/t", "latest", ""),
    "aa/aa/aa/bb/bb": ("docker.io", "aa/aa/aa/bb/bb", "latest", ""),
    "registry.io/foo/project--id.module--name.ver---sion--name": (
        "registry.io", "foo/project--id.module--name.ver---sion--name", "latest", ""
    ),
    "example.com/some_separator__underscore/myimage": (
        "example.com", "some_separator__underscore/myimage", "latest", ""
    ),
    "example.com/" + "a/" * 127 + "a:" + "t" * 128: ("example.com", "a/" * 127 + "a", "t" * 128, ""),
    "sha256:" + F64: ("docker.io", "library/sha256", F64, ""),
}  # fmt: skip

REFUSED = [
    ":justtag", f"@sha256:{F64}", "repo@sha256:" + "f" * 34, f"validname@invaliddigest:{F64}", "Uppercase:tag",
    "test:5000/Uppercase/lowercase:tag", "docker.io/" + "a/" * 128 + "a:tag", "aa/asdf$$^/aa", "[2001:db8::1]",
    "[2001:db8::1]:5000", "[2001:db8::1]:tag", "[fe80::1%eth0]:5000/repo", "[fe80::1%@invalidzone]:5000/repo",
    "https://github.com/docker/docker", "docker/Docker", "-docker", "-docker/docker", "-docker.io/docker/docker",
    "docker///docker", "docker.io/docker/Docker", "[fc00::1]", "fc00::1:5000/debian",
    "[2001:db8:3:4::192.0.2.33]:5000/debian", "docker-/docker", "-docker-/docker", "____/____", "_docker/_docker",
    "docker_/docker_", "dock..er/docker", "dock_.er/docker", "dock-.er/docker", "docker/", "docker./docker",
    ".docker/docker", "do__cker:8080/docker", "foo_bar.com:8080/app", "bad_hostname.com:8080/myapp:tag",
    "a/a/a/a/", "a//a/a", "a^a", "foo/bar-", "foo/-bar", "_foo/bar", "foo.com/a-/a/a", "foo.com:http/bar", "foo.com/",
    "example.com/__underscore/myimage", "example.com/..dots/myimage", "example.com/nodouble..dots/myimage",
    "registry.com:8080/myapp@sha256:badbadbadbad", "registry.com:8080/myapp:invalid~tag", "registry.com:8080/myapp@bad",
    "[fd00:1:2::3]75050/a", "[fd00:1:2::3]::75050/a", "ab-.com/x", "ab.-com/x", "ab.com-/x", f"a@SHA256:{F64}",
    f"a@sha256:{F64.upper()}", f"a@sha256:{F64}@sha256:{F64}", f"a@sha512:{F64}", "a:b:c", "a:" + "t" * 129, "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", GRAMMAR)
def test_the_grammar(text: str) -> None:
    found = Reference.parse(text)
    assert (found.registry, found.repository, found.tag, found.digest or "") == GRAMMAR[text]
    assert Reference.parse(str(found)) == Reference.parse(found.familiar) == found


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_grammar_refuses(text: str) -> None:
    with pytest.raises(InvalidReference):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("algorithm", "digits", "message"),
    [("blake3", 64, "blake3' is registered"), ("md5", 32, "md5' is unknown"), ("tarsum.v1+sha256", 64, "tarsum.v1")],
)
def test_other_algorithms_are_refused_by_name(algorithm: str, digits: int, message: str) -> None:
    with pytest.raises(InvalidDigest, match=re.escape(message)) as caught:
        Digest(f"{algorithm}:{'0' * digits}")
    assert "sha256, sha384, sha512" in caught.value.hint
    with pytest.raises(InvalidReference, match=re.escape(message)):
        Reference.parse(f"debian@{algorithm}:{'0' * digits}")


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
        "import containerkit.image.images\n"
        f"print(sorted({HEAVY!r} & (set(sys.modules) - before)))"
    )
    found = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
