"""Sources that are read in place, nearly sequentially, in constant memory."""
