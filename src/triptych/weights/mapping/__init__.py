"""Tables that map foreign state dict keys to ours and back."""
