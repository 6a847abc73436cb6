"""Arrays in, figures out. Nothing here knows a network, and nothing touches pyplot's global state."""
