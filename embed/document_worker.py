"""The process that parses documents, for `document_process`.

It writes no files, and its memory and computing time are limited, so a hostile document ends this process and nothing else.
"""

from __future__ import annotations

import json

from qembed.child.worker import NO_MEMORY, requests

TEXT, NOT_READABLE, MISSING = b"T", b"N", b"M"


def main() -> None:
    """Answer requests until stdin ends; the kind of each is the suffix of a document, and its content the document."""
    from qembed.embed import documents

    for (kind, content), respond in requests():
        try:
            document = documents.parse(content, kind)
            answer = TEXT, json.dumps([document.text, document.pages], ensure_ascii=False).encode(errors="surrogatepass")
        except documents.NotReadable as error:
            answer = NOT_READABLE, str(error).encode(errors="replace")
        except ModuleNotFoundError as error:
            answer = MISSING, str(error.name).encode()
        except MemoryError:
            answer = NO_MEMORY, b""
        del content
        respond(*answer)


if __name__ == "__main__":
    main()
