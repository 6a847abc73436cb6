"""Sources read in order, in place, in constant memory."""
