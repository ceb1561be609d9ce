"""Changes of a model's weights that must not change its function, and the guard that proves it."""
