"""Evaluation: how well a model predicts a text, and which of several continuations it prefers."""
