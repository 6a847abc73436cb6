"""The built-in emoji images and the scenes composed of them."""
