"""Looking at one's vectors: a FAISS index of what `qembed embed` wrote, and questions to it."""
