"""Programs that the suites run in fresh interpreters, each by the path of its file: so that one which measures another
library imports nothing of ours but `process_memory`."""
