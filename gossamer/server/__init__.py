"""Entry points: Python API, HTTP server, command line."""
