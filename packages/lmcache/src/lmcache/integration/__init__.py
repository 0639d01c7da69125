"""Import paths that stock engines look for; everything real is in ``lmcache.connectors``."""
