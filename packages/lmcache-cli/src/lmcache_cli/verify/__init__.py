"""Whether an engine answers the same with its cache as without: asked over HTTP, of the engine and of the server."""
