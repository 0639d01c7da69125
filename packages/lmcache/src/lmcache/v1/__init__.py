"""Import paths that stock engines look for."""
