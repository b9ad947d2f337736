"""Where registries listen, and what loading the client costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from containerkit.registry.addresses import endpoint
from containerkit.registry.failures import public


@pytest.mark.parametrize(
    ("registry", "root"),
    [
        ("docker.io", "https://registry-1.docker.io/v2/"),
        ("quay.io", "https://quay.io/v2/"),
        ("localhost", "http://localhost/v2/"),
        ("localhost:5000", "http://localhost:5000/v2/"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2/"),
        ("127.9.9.9", "http://127.9.9.9/v2/"),
        ("[::1]:5000", "http://[::1]:5000/v2/"),
        ("[2001:db8::1]:5000", "https://[2001:db8::1]:5000/v2/"),
        ("10.0.0.1:5000", "https://10.0.0.1:5000/v2/"),
        ("127.0.0.1.example.org", "https://127.0.0.1.example.org/v2/"),
        ("localhost.example.org:5000", "https://localhost.example.org:5000/v2/"),
    ],
)
def test_endpoint(registry: str, root: str) -> None:
    assert endpoint(registry) == root


def test_public_urls_have_no_secrets() -> None:
    assert public("https://user:hush@host:1/v2/a?token=hush#hush") == "https://host:1/v2/a"


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = (
        "import sys; import containerkit.registry.client;"
        "print(*{'requests', 'urllib3', 'attrs', 'attr', 'json', 'http.client', 'ssl'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
