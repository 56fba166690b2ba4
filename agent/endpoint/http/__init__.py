"""What every route needs of HTTP: connections, authentication, limits, event streams, metrics."""
