"""The networks, a file each, and their cards."""
