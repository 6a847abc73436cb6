"""Text out of a file that nobody vouches for, before a person sees it."""


def legible(text: object, length: int = 200) -> str:
    """Text that came out of a file, fit for one line on a terminal."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= length else line[:length] + "..."
