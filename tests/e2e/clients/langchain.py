"""LangChain's OpenAIEmbeddings: `python langchain.py URL MODEL`; prints what it got as JSON."""

import asyncio
import json
import sys
from types import SimpleNamespace

import tiktoken
from langchain_openai import OpenAIEmbeddings
from openai import BadRequestError

url, model = sys.argv[1:]
TEXTS = ["an audio player", "a PDF viewer"]

client = OpenAIEmbeddings(model=model, base_url=url, api_key="none", check_embedding_ctx_length=False)
queries = OpenAIEmbeddings(
    model=model,
    base_url=url,
    api_key="none",
    check_embedding_ctx_length=False,
    model_kwargs={"extra_body": {"prompt_name": "query"}},
)

# Its default turns texts to ids of OpenAI's tokenizers, which tiktoken downloads; ids of anything show what becomes of them.
ids = SimpleNamespace(encode=lambda text, **_: list(text.encode()), encode_ordinary=lambda text: list(text.encode()))
tiktoken.encoding_for_model = tiktoken.get_encoding = lambda _: ids
try:
    OpenAIEmbeddings(model=model, base_url=url, api_key="none").embed_documents(TEXTS)
    message = None
except BadRequestError as error:
    message = str(error)

output = {
    "documents": client.embed_documents(TEXTS),
    "async": asyncio.run(client.aembed_documents(TEXTS)),
    "query": queries.embed_query("music player"),
    "refused": message,
}
print(json.dumps(output))
