"""Training and evaluation in one call: `triptych.train` and `triptych.evaluate`, which the command line runs, too."""
