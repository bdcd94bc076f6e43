"""The bench: noise put in on purpose, and figures of how well a method finds it and what it costs retrieval."""
