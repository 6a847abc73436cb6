"""Configs of training runs. No module in this folder imports torch."""
