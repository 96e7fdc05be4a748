"""A web page that segments images."""
