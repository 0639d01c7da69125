"""Whether one tenant of a live server can see, hurt or feel another: asked over HTTP and through its engine."""
