"""Reference implementations that the suites compare with."""
