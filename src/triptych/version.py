"""The version of the package, apart from its root so that every module can import it."""

__version__ = "0.1.0"
