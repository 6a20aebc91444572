"""`qembed embed`: texts to vectors, file to file."""
