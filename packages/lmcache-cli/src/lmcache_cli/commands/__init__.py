"""One file a command. How to add one: see ``app``."""
