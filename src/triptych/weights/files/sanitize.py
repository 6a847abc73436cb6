"""Text from untrusted files, made safe to print."""


def printable(text: object, length: int = 200) -> str:
    """Return `text` as one printable line of at most `length` characters.

    White space becomes single spaces, and control characters (terminal escapes among them) become question marks.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= length else line[:length] + "..."
