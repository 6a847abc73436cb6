"""Text tokenizers and prompt syntax."""
