"""What a run reports: log, throughput, anomalies, signals, image grids."""
