"""The engine loop, and the process that runs it behind the server."""
