"""Readers of dataset layouts: folders, masks, tables, tar shards."""
