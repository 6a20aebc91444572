"""litellm: `python lite.py URL MODEL`; prints what it got as JSON."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network when it is imported

import litellm

url, model = sys.argv[1:]
TEXTS = ["an audio player", "a PDF viewer"]
SERVER = {"model": f"openai/{model}", "api_base": url, "api_key": "none"}


def vectors(answer: litellm.EmbeddingResponse) -> list[list[float]]:
    return [item["embedding"] for item in answer.data]


output = {
    "documents": vectors(litellm.embedding(input=TEXTS, **SERVER)),
    "async": vectors(asyncio.run(litellm.aembedding(input=TEXTS, encoding_format="float", **SERVER))),
    "query": vectors(litellm.embedding(input=["music player"], extra_body={"prompt_name": "query"}, **SERVER))[0],
}
print(json.dumps(output))
