"""Process groups, and how a run is spread over them."""
