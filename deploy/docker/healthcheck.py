#!/usr/bin/env python3
"""Whether the server in this container answers: exit code 0 if /health says 200, else 1 and what was wrong.

QEMBED_HEALTH_URL names another place than http://127.0.0.1:8000/health, for a server with another `--port` or with TLS.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8000/health"
SECONDS = 8.0


def trouble(url: str) -> str | None:
    """What is wrong with the server at `url`, None if nothing is."""
    context = ssl.create_default_context()  # to ourselves, whatever name the certificate is for
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=SECONDS, context=context):
            return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"{url}: {error}"


if __name__ == "__main__":
    found = trouble(os.environ.get("QEMBED_HEALTH_URL", URL))
    sys.exit(found)
