"""What is measured: time, memory, scaling, startup, training."""
