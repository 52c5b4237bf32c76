"""Models in the format of llama.cpp, in and out."""
