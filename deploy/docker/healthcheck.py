#!/usr/bin/env python3
"""Whether the server in this container answers: exit code 0 if /health is 200, else 1 and the problem.

QEMBED_HEALTH_URL replaces http://127.0.0.1:8000/health, for a server with another `--port` or with TLS.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8000/health"
SECONDS = 8.0


def problem(url: str) -> str | None:
    """The problem with the server at `url`, None if there is none."""
    context = ssl.create_default_context()  # the connection is local, so the certificate's name does not matter
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=SECONDS, context=context):
            return None
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"{url}: {error}"


if __name__ == "__main__":
    sys.exit(problem(os.environ.get("QEMBED_HEALTH_URL", URL)))
