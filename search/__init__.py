"""FAISS indexes of the vectors that `qembed embed` wrote, and search in them."""
