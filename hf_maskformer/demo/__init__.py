"""A page for the browser that segments pictures."""
