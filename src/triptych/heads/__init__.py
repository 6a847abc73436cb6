"""What goes on any backbone's maps: dense prediction."""
