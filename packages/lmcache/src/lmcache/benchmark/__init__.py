"""`lmcache bench server`: an engine without a model, which stores, looks up and retrieves, and checks every byte."""
