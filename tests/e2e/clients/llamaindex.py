"""LlamaIndex's OpenAILikeEmbedding: `python llamaindex.py URL MODEL`; prints what it got as JSON."""

import asyncio
import json
import sys

from llama_index.embeddings.openai_like import OpenAILikeEmbedding

url, model = sys.argv[1:]
TEXTS = ["an audio player", "a PDF viewer"]

client = OpenAILikeEmbedding(model_name=model, api_base=url, api_key="none", embed_batch_size=64)
queries = OpenAILikeEmbedding(
    model_name=model, api_base=url, api_key="none", additional_kwargs={"extra_body": {"prompt_name": "query"}}
)
output = {
    "documents": client.get_text_embedding_batch(TEXTS),
    "async": asyncio.run(client.aget_text_embedding_batch(TEXTS)),
    "query": queries.get_query_embedding("music player"),
}
print(json.dumps(output))
