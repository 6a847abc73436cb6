"""Configs of training runs. Nothing here imports torch."""
