"""What text shows of a model, collected once: statistics that every method of a sweep shares."""
