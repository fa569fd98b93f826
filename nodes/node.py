"""One node, put together: sockets, mesh, engines, API; and the order in which they start and end."""
