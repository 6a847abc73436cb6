"""Configs of networks. Nothing here imports torch."""
