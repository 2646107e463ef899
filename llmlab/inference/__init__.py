"""From one token to an engine that serves many requests at once."""
